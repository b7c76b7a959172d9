"""What a study varies: the dimensions of its space, and how their values are named."""

from __future__ import annotations

import json
from typing import Any

from simclr_ray import config as cfg
from simclr_ray.config import Config, Field, Scalar

DIGITS = 4  # of numbers drawn from a range


class Dimension(Config):
    """What varies: one of the five keys.

    A path of the experiment has values; `cases` move several paths together, each case with a name.
    """

    grid: list[Any] = Field([], description="Every value is run.")
    choice: list[Any] = Field([], description="One of these is drawn.")
    uniform: list[float] = Field([], description="[low, high]: drawn evenly.")
    loguniform: list[float] = Field([], description="[low, high]: drawn evenly in the logarithm.")
    cases: dict[str, dict[str, Any]] = Field(
        {},
        description="Name -> path -> value; all are run. A value of null takes a path away that "
        "another dimension sets; a path that ends with + adds the items to a list.",
    )

    @cfg.model_validator(mode="before")
    @classmethod
    def _refuse_bare(cls, tree: Any) -> Any:
        if isinstance(tree, list):
            raise ValueError(f"got {tree!r}; write {{grid: {json.dumps(tree)}}}")
        return tree

    @cfg.model_validator(mode="after")
    def _check_one(self) -> Dimension:
        if len(self.model_fields_set) != 1:
            raise ValueError("needs one of: grid, choice, uniform, loguniform, cases")
        for bounds in (self.uniform, self.loguniform):
            if bounds and (len(bounds) != 2 or not bounds[0] < bounds[1]):
                raise ValueError(f"needs [low, high] with low below high, got {bounds}")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("loguniform needs bounds above 0")
        if not (self.listed or self.uniform or self.loguniform):
            raise ValueError("is empty: there is nothing to run")
        for path, value in ((p, v) for case in self.cases.values() for p, v in case.items()):
            if path.endswith("+") and not isinstance(value, list):
                raise ValueError(f"{path} adds the items of a list, got {value!r}")
        labels = [label_of(value) for value in self.listed]
        if len(set(labels)) < len(labels):
            raise ValueError(f"names a value twice: {', '.join(map(str, labels))}")
        return self

    @property
    def common_paths(self) -> set[str]:
        """Return the paths to which every case gives a value."""
        paths = [
            {path for path, v in case.items() if v is not None} for case in self.cases.values()
        ]
        return set.intersection(*paths) if paths else set()

    @property
    def listed(self) -> list[Any]:
        """Return the values, or the names of the cases; none where they are drawn from a range."""
        return list(self.cases) or self.grid or self.choice

    @property
    def values(self) -> list[Any]:
        """Return what is listed, or the two ends of the range."""
        return self.listed or self.uniform or self.loguniform

    @property
    def is_whole(self) -> bool:
        """Return whether all values can be run, one after the other."""
        return bool(self.grid or self.cases)


def label_of(value: Any) -> Scalar:
    """Return a value of the space as a scalar that can name it; lists and nodes as JSON."""
    return value if isinstance(value, str | int | float | bool) else json.dumps(value)


def is_same(a: Scalar, b: Scalar) -> bool:
    """Return whether two values are one: numbers as numbers, whatever they are written as."""
    try:
        return float(a) == float(b)
    except ValueError:
        return str(a) == str(b)
