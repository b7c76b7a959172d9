"""Typed config nodes: frozen, strict, unions told apart by their name."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import pydantic

Field = pydantic.Field
model_validator = pydantic.model_validator

Tree = dict[str, Any]
Scalar = str | int | float | bool


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
