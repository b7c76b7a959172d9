"""Typed config: YAML and dotted overrides in, a frozen checked tree out, one line per mistake.

The only place that knows pydantic and YAML. YAML is 1.2, so `1e-4` is a number and `yes` a string.
A union of configs is told apart by its `name` key, which may be left out for the default variant;
overriding `name` drops the keys of the old variant. Errors say the dotted path, what was given,
what is allowed, and the nearest valid name.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from simclr_ray.errors import ConfigError, Mistake

Field = pydantic.Field
model_validator = pydantic.model_validator

Tree = dict[str, Any]
Scalar = str | int | float | bool
Where = tuple[str | int, ...]


class Config(pydantic.BaseModel):
    """Base of every config node: frozen, strict, no unknown keys, defaults validated too."""

    model_config = pydantic.ConfigDict(
        frozen=True, strict=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _name_variants(cls, tree: Any) -> Any:
        """Give a union's node without a name that of the field's default."""
        if not isinstance(tree, Mapping):
            return tree
        named = {
            key: {"name": default, **tree[key]}
            for key, field in cls.model_fields.items()
            if (default := _default_name(field))
            and isinstance(tree.get(key), Mapping)
            and "name" not in tree[key]
        }
        return {**tree, **named}


ConfigT = TypeVar("ConfigT", bound=Config)


def parse_yaml(text: str, source: str = "config") -> Any:
    """Return the value of one YAML 1.2 document; raise `ConfigError` naming `source` if broken."""
    try:
        return YAML(typ="safe", pure=True).load(io.StringIO(text))
    except YAMLError as error:
        first_line = " ".join(str(error).split())
        raise ConfigError([Mistake(source, f"is not YAML: {first_line}")]) from error


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """Return `tree` as a YAML 1.2 document, keys in the order given."""
    out = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    for option in ("default_flow_style", "sort_base_mapping_type_on_output"):
        setattr(yaml, option, False)  # typed by its default, None
    yaml.dump(dict(tree), out)
    return out.getvalue()


def apply_overrides(
    tree: Mapping[str, Any], overrides: Sequence[str], schema: type[Config] | None = None
) -> Tree:
    """Return a copy of `tree` with each `dotted.path=value` set; values are YAML scalars or lists.

    Setting `x.name` to another variant drops the other keys of `x`, since they belong to the old
    one; with a `schema`, only where `x` has variants.

    Raises:
        ConfigError: One mistake per override that is not of the form `path=value`.
    """
    out: Tree = json.loads(json.dumps(tree))
    mistakes = []
    parsed = []
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not all(path.split(".")):
            mistakes.append(Mistake(text, "is no override; the form is key.path=value"))
        else:
            parsed.append((path.split("."), parse_yaml(value, text)))
    for keys, value in sorted(parsed, key=lambda item: item[0][-1] != "name"):  # variants first
        node = out
        for depth, key in enumerate(keys[:-1]):
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                at = ".".join(keys[: depth + 1])
                mistakes.append(Mistake(".".join(keys), f"{at} is a value and has no keys"))
                break
        else:
            if keys[-1] == "name" and len(keys) > 1:
                usual = _usual_name(schema, keys[:-1]) if schema else value
                other = node.get("name", usual or value) != value
                if other and (schema is None or _has_variants(schema, keys[:-1])):
                    node.clear()
            node[keys[-1]] = "" if value is None else value
    if mistakes:
        raise ConfigError(mistakes)
    return out


def validate(schema: type[ConfigT], tree: Any) -> ConfigT:
    """Return `tree` as a `schema`; raise `ConfigError` with a mistake per wrong key or value."""
    try:
        return schema.model_validate(tree)
    except pydantic.ValidationError as error:
        found = [_mistake(schema, tree, item) for item in error.errors()]
        raise ConfigError(list(dict.fromkeys(found))) from None


def to_tree(config: Config) -> Tree:
    """Return the config as plain dicts, lists and scalars, defaults included."""
    tree: Tree = config.model_dump(mode="json")
    return tree


def leaves(config: Config) -> dict[str, Scalar]:
    """Return every dotted leaf of the config, in order: what a tracker stores as parameters."""
    return dict(_leaves(to_tree(config), ""))


def digest_of(tree: Mapping[str, Any]) -> str:
    """Return 16 hex digits that change if and only if `tree` does (key order aside)."""
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return `path: old -> new` for each leaf that differs between two trees."""
    a, b = dict(_leaves(old, "")), dict(_leaves(new, ""))
    return [
        f"{k}: {a.get(k, '(absent)')} -> {b.get(k, '(absent)')}"
        for k in dict.fromkeys([*a, *b])
        if a.get(k) != b.get(k)
    ]


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the closest of `allowed`, or nothing when none is close."""
    close = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _leaves(node: Any, path: str) -> Iterable[tuple[str, Scalar]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, Mapping | list):
        yield path, json.dumps(node)
    else:
        yield path, node


def _mistake(schema: type[Config], tree: Any, item: Any) -> Mistake:
    where = _without_tags(tree, item["loc"])
    path = ".".join(str(part) for part in where)
    kind, given, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "extra_forbidden":
        keys = _keys_at(schema, tree, where[:-1])
        hint = nearest(str(where[-1]), keys)
        allowed = f"; allowed here: {', '.join(sorted(keys))}" if keys else ""
        return Mistake(path, f"unknown key{hint}{allowed}")
    if kind == "missing":
        return Mistake(path, "missing key, and it has no default")
    if kind == "literal_error":
        options = [part.strip("' ") for part in context["expected"].replace(" or ", ",").split(",")]
        return Mistake(
            path, f"got {given!r}; allowed: {', '.join(options)}{nearest(str(given), options)}"
        )
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        options = _variants_at(schema, tree, where)
        tag = given.get("name") if isinstance(given, Mapping) else given
        hint = nearest(str(tag), options)
        shown = "missing" if tag is None else f"got {tag!r}"
        return Mistake(f"{path}.name", f"{shown}; allowed: {', '.join(options)}{hint}")
    if kind == "value_error":
        return Mistake(path, str(context["error"]))
    return Mistake(path, f"got {given!r}; {_sentence(item['msg'])}")


def _sentence(message: str) -> str:
    return message.replace("Input should be", "it must be").replace("Input", "it").strip()


def _without_tags(tree: Any, loc: Where) -> Where:
    """Drop the union tags that pydantic puts into a path: they are no keys of the user's file."""
    kept: list[str | int] = []
    node = tree
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        if isinstance(node, Mapping) and part not in node and not last:
            continue
        kept.append(part)
        if isinstance(node, Mapping):
            node = node.get(part, {})
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
    return tuple(kept)


def _keys_at(schema: type[Config], tree: Any, where: Where) -> list[str]:
    """Return the keys that the node at `where` may have, following unions by their `name`."""
    node = _node_at(schema, tree, where)
    return list(node.model_fields) if node else []


def _variants_at(schema: type[Config], tree: Any, where: Where) -> list[str]:
    """Return the names that the union at `where` knows, or the list of one."""
    if isinstance(where[-1], int):
        where = where[:-1]
    parent = _node_at(schema, tree, where[:-1])
    annotation = parent.model_fields[str(where[-1])].annotation if parent else None
    return [_name_of(variant) for variant in _configs_in(annotation)]


def _node_at(schema: type[Config], tree: Any, where: Where) -> type[Config] | None:
    """Return the config class of the node at `where`, None where it is no config."""
    current: type[Config] = schema
    variants: list[type[Config]] = []
    node = tree
    for part in where:
        if isinstance(part, int):  # a list's: its items have the variants of the field
            node = node[part] if isinstance(node, list) and part < len(node) else {}
            named = [
                v for v in variants if isinstance(node, Mapping) and _name_of(v) == node.get("name")
            ]
            current = (named or variants or [schema])[0]
            continue
        node = node[part] if isinstance(node, Mapping) and part in node else {}
        field = current.model_fields.get(part)
        if field is None:  # below a mapping, whose keys are the user's
            return None
        variants, usual = _configs_in(field.annotation), _default_name(field)
        given = node.get("name", usual) if isinstance(node, Mapping) else usual
        named = [v for v in variants if _name_of(v) == (given or _name_of(v))]
        if not (named or variants):
            return None
        current = (named or variants)[0]
    return current


def _has_variants(schema: type[Config], keys: Sequence[str]) -> bool:
    """Return whether the node at `keys` is a union of configs, told apart by `name`."""
    found = [schema]
    for key in keys:
        field = found[0].model_fields.get(key)
        found = _configs_in(field.annotation) if field else []
        if not found:
            return False
    return len(found) > 1


def _usual_name(schema: type[Config], keys: Sequence[str]) -> str:
    """Return the name that the union at `keys` has by default, or nothing."""
    found, usual = [schema], ""
    for key in keys:
        field = found[0].model_fields.get(key) if found else None
        if field is None:
            return ""
        usual, found = _default_name(field), _configs_in(field.annotation)
    return usual


def _default_name(field: pydantic.fields.FieldInfo) -> str:
    """Return the variant that a union's field has by default, or nothing where it is no union."""
    name = getattr(field.default, "name", "") if field.discriminator else ""
    return str(name)


def _configs_in(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [c for part in typing.get_args(annotation) for c in _configs_in(part)]
    return []


def _name_of(schema: type[Config]) -> str:
    field = schema.model_fields.get("name")
    return str(field.default) if field else ""


def preset_names() -> list[str]:
    """Return the names of the presets that come with the package."""
    folder = resources.files("simclr_ray") / "presets"
    return sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )


def read_source(source: str) -> tuple[str, str]:
    """Return the text of a YAML file or of a preset, and the name to show for it."""
    if source.endswith((".yaml", ".yml")):
        path = Path(source)
        if not path.is_file():
            raise ConfigError([Mistake(source, "no such file")])
        try:
            return path.read_text(encoding="utf-8"), source
        except UnicodeDecodeError as error:
            raise ConfigError([Mistake(source, f"is not UTF-8: {error}")]) from error
    names = preset_names()
    if source not in names:
        hint = nearest(source, names)
        message = f"no preset and no .yaml file{hint}; presets: {', '.join(names)}"
        raise ConfigError([Mistake(source, message)])
    return (resources.files("simclr_ray") / "presets" / f"{source}.yaml").read_text("utf-8"), source
