"""Typed config nodes: frozen, strict, unions told apart by their name.

What an experiment *is* (its digest) and where it runs stand in one tree. A field says of itself
which of both it belongs to (`placement=True`), and from which format on it exists (`since=`): a
digest leaves both out, the second as long as its value reproduces what earlier releases did.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Self, TypeVar

import pydantic

model_validator = pydantic.model_validator

Tree = dict[str, Any]
Scalar = str | int | float | bool
HALVED_URI: Final = re.compile(r"(s3|gs|gcs|hdfs|abfss?|file|https?|hf):/([^/].*)")
BASE_FORMAT: Final = 2  # the first format whose digests stay what they are
AUTO: Final = "auto"  # a value that the images decide
_DEFAULT: Final = object()


def Field(  # noqa: N802 - pydantic's own name
    default: Any = ...,
    *,
    placement: bool = False,
    since: int = BASE_FORMAT,
    neutral: Any = _DEFAULT,
    **constraints: Any,
) -> Any:
    """Return a config field: pydantic's, with what the digest has to know of it.

    Args:
        default: Value where none is given; `...`: one must be given.
        placement: Whether it says where or how a run runs, and not what it computes.
        since: Format that brought the field.
        neutral: Value that reproduces what releases before `since` did, where it is not `default`.
        **constraints: Of `pydantic.Field`: bounds, description, discriminator.

    Example:
        >>> class Views(Config):
        ...     size: int = Field(32, ge=8)
        ...     cutmix: float = Field(0.0, ge=0, since=3)
        >>> identity(Views()), identity(Views(cutmix=0.5))
        ({'size': 32}, {'size': 32, 'cutmix': 0.5})
    """
    marks: dict[str, Any] = {}
    if placement:
        marks["placement"] = True
    if since > BASE_FORMAT:
        marks["neutral"] = default if neutral is _DEFAULT else neutral
    return pydantic.Field(default, json_schema_extra=marks or None, **constraints)


def absolute_path(where: str) -> str:
    """Return a local path made absolute; URIs and empty text as they are.

    Raises:
        ValueError: It is a URI with one slash, such as `s3:/bucket`.
    """
    halved = HALVED_URI.match(where)
    if halved and not Path(where).exists():
        slashes = "///" if halved[1] == "file" else "//"
        raise ValueError(f"got {where!r}; a URI is {halved[1]}:{slashes}{halved[2]}")
    return where if "://" in where or not where else str(Path(where).expanduser().resolve())


def _check_white(level: float | list[float] | str) -> float | list[float] | str:
    levels = level if isinstance(level, list) else [level]
    if level == AUTO or (levels and all(isinstance(v, float) and v >= 0 for v in levels)):
        return level
    raise ValueError(
        f"got {level!r}; allowed: a number from 0, a list of one for each channel, or {AUTO}"
    )


WhiteLevel = Annotated[float | list[float] | str, pydantic.AfterValidator(_check_white)]

# A local path is absolute from the moment it is read: workers have other working directories.
PathOrURI = Annotated[str, pydantic.AfterValidator(absolute_path)]


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
            if (default := default_name(field))
            and isinstance(tree.get(key), Mapping)
            and "name" not in tree[key]
        }
        return {**tree, **named}

    def __hash__(self) -> int:
        """Return a hash of the values, of which some are lists."""
        return hash(self.model_dump_json())

    def canonical(self) -> Self:
        """Return the config with what has no effect at its default: equal runs, equal digests."""
        return self


ConfigT = TypeVar("ConfigT", bound=Config)


def identity(config: Config) -> Tree:
    """Return the tree of what decides the result: without placement and neutral newer fields."""
    config = config.canonical()
    tree: Tree = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        marks = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        if marks.get("placement") or ("neutral" in marks and value == marks["neutral"]):
            continue
        tree[name] = _identity_of(value)
    return tree


def _identity_of(value: Any) -> Any:
    if isinstance(value, Config):
        return identity(value)
    if isinstance(value, list):
        return [_identity_of(item) for item in value]
    return value


def default_name(field: pydantic.fields.FieldInfo) -> str:
    """Return the variant that a union's field has by default, or nothing where it is no union."""
    name = getattr(field.default, "name", "") if field.discriminator else ""
    return str(name)


def configs_in(annotation: Any) -> list[type[Config]]:
    """Return the config classes that a field's annotation names, those of a union or list too."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [c for part in typing.get_args(annotation) for c in configs_in(part)]
    return []


def name_of(schema: type[Config]) -> str:
    """Return the variant that a config class is, or nothing where it is none."""
    field = schema.model_fields.get("name")
    return str(field.default) if field else ""
