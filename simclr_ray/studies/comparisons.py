"""What a study claims, and the numbers of the paper beside it: as data, checked whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from simclr_ray import config as cfg
from simclr_ray.config import Config, Field, Scalar
from simclr_ray.studies.space import Dimension, is_same, label_of


class Comparison(Config):
    """A claim: `better` beats `worse`, all else being equal."""

    claim: str = Field(min_length=1)
    better: dict[str, Scalar] = Field(description="Dimension -> value (of cases: the name).")
    worse: dict[str, Scalar]


class Paper(Config):
    """The paper's numbers, as data."""

    source: str = Field(min_length=1, description="Figure or table.")
    metric: str = Field(min_length=1)
    columns: list[str] = Field(description="Dimensions, in order; the value comes last.")
    rows: list[list[Scalar]]
    matches: dict[str, dict[str, Scalar]] = Field(
        {}, description="Dimension -> our value -> the paper's that it stands for."
    )

    @cfg.model_validator(mode="after")
    def _check_rows(self) -> Paper:
        wanted = len(self.columns) + 1
        wrong = [r for r in self.rows if len(r) != wanted or isinstance(r[-1], str | bool)]
        if wrong:
            raise ValueError(f"each row needs {wanted} entries, the last a number; got {wrong[0]}")
        return self


def check_paper(paper: Paper, space: Mapping[str, Dimension]) -> None:
    """Raise `ValueError` for what the paper's table names and the space does not have."""
    columns, matches = paper.columns, paper.matches
    for key, names in (("columns", columns if paper.rows else ()), ("matches", matches)):
        for name in names:
            if name not in space:
                hint = cfg.nearest(name, space)
                raise ValueError(f"paper.{key}: {name!r} does not vary in space{hint}")
    for name, theirs in matches.items():
        ours = [label_of(value) for value in space[name].listed]
        for value in theirs:
            if ours and not any(is_same(value, own) for own in ours):
                there = ", ".join(map(str, ours))
                raise ValueError(f"paper.matches.{name}: {value} is not run; there are: {there}")


def check_comparisons(comparisons: Sequence[Comparison], space: Mapping[str, Dimension]) -> None:
    """Raise `ValueError` for a claim about what is not run, or about nothing."""
    for comparison in comparisons:
        claim = f"comparison {comparison.claim!r}"
        if set(comparison.better) != set(comparison.worse):
            raise ValueError(f"{claim}: both sides must name the same dimensions")
        if comparison.better == comparison.worse:
            raise ValueError(f"{claim}: both sides are the same: {comparison.better}")
        for side in (comparison.better, comparison.worse):
            for name, value in side.items():
                listed = [label_of(v) for v in space[name].listed]
                if listed and label_of(value) not in listed:
                    raise ValueError(
                        f"{claim}: {name}={value!r} is not run; there are: "
                        f"{', '.join(map(repr, listed))}"
                    )
    claims = [comparison.claim for comparison in comparisons]
    if len(set(claims)) < len(claims):
        raise ValueError(f"comparisons names a claim twice: {claims}")
