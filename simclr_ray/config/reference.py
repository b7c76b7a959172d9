"""What each key of a config is: its sentence, what it takes, and its default, read off the schema.

`simclr-ray config --explain KEY` prints it, and the documentation has a page of it.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import annotated_types
from pydantic.fields import FieldInfo

from simclr_ray.config.experiment import Experiment
from simclr_ray.config.schema import Config, configs_in, default_name, name_of
from simclr_ray.errors import ConfigError

NAME: Final = "name"
STAGE_LIST: Final = "a list of stages"
STAGES: Final = re.compile(r"^augment\.(shared|a|b)\[\d*\]")  # all three take the same stages


class Key(NamedTuple):
    """A key of an experiment.

    Attributes:
        path: Dotted, such as `loss.temperature`.
        variant: `NAME` of the component that has it, where its section is one of several.
        takes: What values are allowed, in words.
        default: As YAML has it; empty: one must be given.
        says: What it means.
    """

    path: str
    variant: str
    takes: str
    default: str
    says: str


def keys(schema: type[Config] = Experiment) -> list[Key]:
    """Return all keys of a config in the order of its file; those of each variant by themselves.

    The same choice of stages for another list is not repeated.
    """
    return list(_keys(schema, "", "", set()))


def keys_at(path: str) -> list[Key]:
    """Return a key, of each variant that has it; of a section all that is in it.

    Raises:
        ConfigError: There is none; the nearest is named.
    """
    everything = keys()
    path = STAGES.sub("augment.shared[]", path)
    chosen = [key for key in everything if key.path == path and key.takes != "keys"]
    if any(key.takes == STAGE_LIST for key in chosen):
        chosen += [key for key in everything if key.path.startswith("augment.shared[].")]
    chosen = chosen or [key for key in everything if key.path.startswith(f"{path}.")]
    if not chosen:
        near = difflib.get_close_matches(path, {key.path for key in everything}, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError.of(path, f"is no key{hint}")
    return chosen


def described(key: Key, preset: str = "", values: Mapping[str, Any] | None = None) -> str:
    """Return a key as lines of text.

    Args:
        key: What is described.
        preset: Whose value is named as well.
        values: Its tree.
    """
    of = f"  (of `{key.variant}`)" if key.variant else ""
    default = f"; default {key.default}" if key.default else ""
    text = f"{key.path}{of}\n  {key.says.replace('`', '')}\n  takes {key.takes}{default}"
    node: Any = values or {}
    *sections, last = key.path.split(".")
    for name in sections:
        node = node.get(name) if isinstance(node, Mapping) else None
    if not isinstance(node, Mapping) or last not in node:
        return text
    is_other = key.variant and node.get(NAME) != key.variant
    return text if is_other else f"{text}\n  is {_shown(node[last])} in {preset}"


def _keys(
    schema: type[Config], prefix: str, variant: str, lists: set[tuple[type[Config], ...]]
) -> Iterator[Key]:
    """Yield the keys below a prefix; `lists` are the choices of stages that were met."""
    for name, field in schema.model_fields.items():
        path, configs = f"{prefix}{name}", tuple(configs_in(field.annotation))
        if not configs:
            if name != NAME or not variant:
                yield _key(path, variant, field)
            continue
        is_list = typing.get_origin(field.annotation) is list
        if is_list:
            yield Key(path, variant, STAGE_LIST, "[]", field.description or "")
            if configs in lists:
                continue
            lists.add(configs)
        inner = f"{path}[]" if is_list else path
        if len(configs) > 1:
            names = ", ".join(name_of(config) for config in configs)
            says = "; ".join(f"`{name_of(c)}`: {_first_line(c)}" for c in configs)
            yield Key(f"{inner}.{NAME}", variant, f"one of {names}", default_name(field), says)
        elif not is_list:
            yield Key(path, variant, "keys", "", field.description or _first_line(configs[0]))
        for config in configs:
            own = name_of(config) if len(configs) > 1 else variant
            yield from _keys(config, f"{inner}.", own, lists)


def _key(path: str, variant: str, field: FieldInfo) -> Key:
    default = "" if field.is_required() else _shown(field.get_default(call_default_factory=True))
    return Key(path, variant, _takes(field), default, field.description or "")


def _takes(field: FieldInfo) -> str:
    """Return what a field takes, in words."""
    kind = _kind_of(field.annotation)
    bounds = []
    for mark in field.metadata:
        if isinstance(mark, annotated_types.Ge):
            bounds.append(f"from {mark.ge}")
        elif isinstance(mark, annotated_types.Gt):
            bounds.append(f"above {mark.gt}")
        elif isinstance(mark, annotated_types.Le):
            bounds.append(f"to {mark.le}")
        elif isinstance(mark, annotated_types.Lt):
            bounds.append(f"below {mark.lt}")
    return " ".join([kind, *bounds])


def _kind_of(annotation: Any) -> str:
    named = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if annotation in named:
        return named[annotation]
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return f"one of {', '.join(map(_shown, parts))}"
    if origin is typing.Annotated:
        return _kind_of(parts[0])
    if origin is typing.Union or isinstance(annotation, types.UnionType):
        return " or ".join("null" if p is type(None) else _kind_of(p) for p in parts)
    if origin in (list, tuple):
        return f"a list of {_kind_of(parts[0])}"
    if origin is dict or annotation is dict:
        return "a mapping"
    return getattr(annotation, "__name__", str(annotation))


def _first_line(schema: type[Config]) -> str:
    return (schema.__doc__ or "").strip().partition("\n")[0].rstrip(".")


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Config):
        return "{…}"
    if isinstance(value, str):
        return value or "''"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
