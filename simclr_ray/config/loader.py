"""Typed config: YAML and dotted overrides in, a frozen checked tree out, one line an issue.

The only place that reads an experiment's YAML, which is 1.2: `1e-4` is a number, `yes` a string.
A union of configs is told apart by its `name` key, which may be left out for the default variant;
overriding `name` drops the keys of the old variant. Errors say the dotted path, what was given,
what is allowed, and the nearest valid name.

OmegaConf (Hydra) does not replace it: it reads YAML 1.1, where `yes` is true, knows no union of
configs told apart by a key, and stops at the first issue. pydantic does the checking; here is
only what surrounds it: YAML, dotted overrides, presets, digests and the wording of issues.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pydantic
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from simclr_ray.config.moves import CONFIG_FILE, relocated_run
from simclr_ray.config.schema import (
    AUTO,
    Config,
    ConfigT,
    Scalar,
    Tree,
    configs_in,
    default_name,
)
from simclr_ray.config.validation import issues_of, nearest, yaml_problem
from simclr_ray.errors import ConfigError, ConfigIssue

YAML_SUFFIXES = (".yaml", ".yml")


def parse_yaml(text: str, source: str = "config") -> Any:
    """Return the value of one YAML 1.2 document; raise `ConfigError` naming `source` if broken."""
    try:
        value = YAML(typ="safe", pure=True).load(io.StringIO(text))
        json.dumps(value, default=_as_text)  # finds loops
    except YAMLError as error:
        raise ConfigError.of(source, f"is not YAML: {yaml_problem(error)}") from error
    except (ValueError, TypeError, RecursionError) as error:
        problem = "holds what is no text, number, list or mapping with names as keys"
        raise ConfigError.of(source, problem) from error
    return _plain(value)


def _as_text(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time):  # 2024-01-01: no such type in JSON
        return value.isoformat()
    raise TypeError


def _plain(value: Any) -> Any:
    """Return a value as what JSON has: mappings, lists and scalars, dates as text."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float) else _as_text(value)


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """Return `tree` as a YAML 1.2 document, keys in the order given."""
    out = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    for option in ("default_flow_style", "sort_base_mapping_type_on_output"):
        setattr(writer, option, False)  # typed by its default, None
    writer.dump(dict(tree), out)
    return out.getvalue()


def parse_overrides(overrides: Sequence[str]) -> tuple[list[tuple[str, Any]], list[ConfigIssue]]:
    """Return path and value of each `dotted.path=value`, in order, and an issue for each other.

    Values are YAML. What a shell has torn apart (`epochs = 3`) is one issue.
    """
    issues = []
    parsed = []
    for is_form, group in itertools.groupby(overrides, _is_override):
        texts = list(group)
        if is_form:
            pairs = [(text, *text.partition("=")[::2]) for text in texts]
            parsed += [(path, parse_yaml(value, text)) for text, path, value in pairs]
            continue
        torn = " ".join(texts)
        is_torn = "=" in torn or (parsed and parsed[-1][1] is None)
        spaces = ", without spaces" if is_torn else ""
        shown = torn or repr(torn)
        issues.append(ConfigIssue(shown, f"is no override; the form is key.path=value{spaces}"))
    return parsed, issues


def _is_override(text: str) -> bool:
    path, equals, _ = text.partition("=")
    return bool(equals) and all(path.split(".")) and not re.search(r"\s", path)


def apply_overrides(
    tree: Mapping[str, Any], overrides: Sequence[str], schema: type[Config] | None = None
) -> Tree:
    """Return a copy of `tree` with each `dotted.path=value` set; values are YAML scalars or lists.

    Setting `x.name` to another variant drops the other keys of `x`, since they belong to the old
    one; with a `schema`, only where `x` has variants.

    Raises:
        ConfigError: One issue per override that is not of the form `path=value`.
    """
    out: Tree = json.loads(json.dumps(tree))
    values, issues = parse_overrides(overrides)
    parsed = [(path.split("."), value) for path, value in values]
    for keys, value in sorted(parsed, key=lambda item: item[0][-1] != "name"):  # variants first
        node = out
        for depth, key in enumerate(keys[:-1]):
            if node.get(key) == AUTO and keys[0] == "scaling":  # `scaling: auto`, and more of it
                node[key] = {"num_workers": AUTO}
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                at = ".".join(keys[: depth + 1])
                issues.append(ConfigIssue(".".join(keys), f"{at} is a value and has no keys"))
                break
        else:
            if keys[-1] == "name" and len(keys) > 1:
                usual = _usual_name(schema, keys[:-1]) if schema else value
                other = node.get("name", usual or value) != value
                if other and (schema is None or _has_variants(schema, keys[:-1])):
                    node.clear()
            node[keys[-1]] = "" if value is None else value
    if issues:
        raise ConfigError(issues)
    return out


def validate(schema: type[ConfigT], tree: Any, source: str = "") -> ConfigT:
    """Return `tree` as a `schema`; raise `ConfigError` with an issue for each wrong key.

    Args:
        schema: What it is to be.
        tree: Keys and values.
        source: Name of the file that they are from, for messages.
    """
    try:
        return schema.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigError(issues_of(schema, tree, error.errors(), source)) from None


def to_tree(config: Config) -> Tree:
    """Return the config as plain dicts, lists and scalars, defaults included."""
    tree: Tree = config.model_dump(mode="json")
    return tree


def leaves(tree: Mapping[str, Any]) -> dict[str, Scalar]:
    """Return every dotted leaf of a tree, in order: what a tracker stores as parameters."""
    return dict(_leaves(tree, ""))


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


def _leaves(node: Any, path: str) -> Iterable[tuple[str, Scalar]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, Mapping | list):
        yield path, json.dumps(node)
    else:
        yield path, node


def _has_variants(schema: type[Config], keys: Sequence[str]) -> bool:
    """Return whether the node at `keys` is a union of configs, told apart by `name`."""
    schemas = [schema]
    for key in keys:
        field = schemas[0].model_fields.get(key)
        schemas = configs_in(field.annotation) if field else []
        if not schemas:
            return False
    return len(schemas) > 1


def _usual_name(schema: type[Config], keys: Sequence[str]) -> str:
    """Return the name that the union at `keys` has by default, or nothing."""
    schemas, usual = [schema], ""
    for key in keys:
        field = schemas[0].model_fields.get(key) if schemas else None
        if field is None:
            return ""
        usual, schemas = default_name(field), configs_in(field.annotation)
    return usual


def preset_names() -> list[str]:
    """Return the names of the presets that come with the package."""
    folder = resources.files("simclr_ray.config") / "presets"
    return sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )


def read_tree(source: str) -> tuple[Tree, str]:
    """Return the keys and values of a YAML file or of a preset, and the name to show for it.

    Raises:
        ConfigError: There is none, or it holds something else.
    """
    text, shown = _read_source(source)
    tree = parse_yaml(text, shown)
    if not isinstance(tree, dict):
        held = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise ConfigError.of(shown, f"holds {held}, not keys and values")
    path = Path(source)
    return relocated_run(tree, path.parent) if path.name == CONFIG_FILE else tree, shown


def read_yaml_file(path: str) -> str:
    """Return the text of a YAML file; raise `ConfigError` where there is none that can be read."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError:
        problem = "no such file"
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8: {error}"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    raise ConfigError.of(path, problem)


def _read_source(source: str) -> tuple[str, str]:
    """Return the text of a YAML file or of a preset, and the name to show for it."""
    if source.endswith(YAML_SUFFIXES):
        return read_yaml_file(source), source
    names = preset_names()
    if source not in names:
        is_there = Path(source).exists()
        message = "is no .yaml file" if is_there else "no preset and no .yaml file"
        message += f"{'' if is_there else nearest(source, names)}; presets: {', '.join(names)}"
        raise ConfigError.of(source or repr(source), message)
    return (resources.files("simclr_ray.config") / "presets" / f"{source}.yaml").read_text(
        "utf-8"
    ), source
