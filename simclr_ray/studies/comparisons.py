"""What a study claims, and the numbers of the paper beside it: as data, checked whole."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from simclr_ray import config as cfg
from simclr_ray.config import Config, Field, Scalar
from simclr_ray.config.metrics import is_fraction
from simclr_ray.studies.space import Dimension, is_same, label_of

ROWS: Final = "rows"  # where an effect of the paper is from, unless it is given
Side = dict[str, Scalar]  # dimension -> value (of cases: the name); empty: every point


class Gap(Config):
    """Two sides, of which one is claimed to be above the other, all else being equal."""

    better: Side = Field({}, description="Dimension -> value (of cases: the name).")
    worse: Side = Field({}, description="The same dimensions, with other values.")


class Comparison(Gap):
    """A claim: `better` beats `worse`, all else being equal."""

    claim: str = Field(min_length=1)
    metric: str = Field("", description="That `better` is read from; empty: the study's.")
    worse_metric: str = Field(
        "",
        description="That `worse` is read from; empty: `metric`. Where they differ, both sides may "
        "be the same points; empty sides are all of them.",
    )
    than: Gap = Field(
        Gap(),
        description="Another gap of the same dimensions: better - worse is claimed to be larger "
        "than it, with the same metrics.",
    )
    smallest_effect: float = Field(
        0.0, ge=0, description="Smallest of interest, in the metric's unit; 0: none is given."
    )
    expected_deviation: float = Field(
        0.0, ge=0, description="Of this claim's differences between seeds; 0: the study's."
    )
    paper_effect: Scalar = Field(
        ROWS, description="The paper's, in the unit of its rows; `rows`: computed from them."
    )

    @cfg.model_validator(mode="after")
    def _check_paper_effect(self) -> Comparison:
        effect = self.paper_effect
        if effect != ROWS and (isinstance(effect, str | bool) or not math.isfinite(effect)):
            raise ValueError(f"paper_effect must be a number or {ROWS!r}, got {effect!r}")
        return self


class Reads(NamedTuple):
    """What a claim reads of one side, and whether it counts for the claim or against it."""

    side: Side
    metric: str
    sign: int


def reads_of(comparison: Comparison, metric: str) -> list[Reads]:
    """Return what a claim adds and takes away: two sides, or four of a difference of differences.

    Args:
        comparison: The claim.
        metric: The study's, for sides that name none.
    """
    better_metric = comparison.metric or metric
    worse_metric = comparison.worse_metric or better_metric
    reads = [Reads(comparison.better, better_metric, 1), Reads(comparison.worse, worse_metric, -1)]
    if comparison.than != Gap():
        reads.append(Reads(comparison.than.better, better_metric, -1))
        reads.append(Reads(comparison.than.worse, worse_metric, 1))
    return reads


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

    def setting(self, name: str, value: Scalar) -> Scalar:
        """Return the paper's setting that a value of ours stands for: itself unless `matches`."""
        like = self.matches.get(name, {})
        return next((theirs for own, theirs in like.items() if is_same(own, value)), value)


def paper_effect_of(
    comparison: Comparison, paper: Paper, space: Mapping[str, Dimension], metric: str
) -> float | None:
    """Return the effect that the paper's rows have for a claim, in their unit, or None.

    Args:
        comparison: The claim; what it gives as the paper's effect goes first.
        paper: Its rows are numbers of `metric`; other metrics have none.
        space: Settings that the claim leaves open count where one of these values stands for them.
        metric: The study's.
    """
    if comparison.paper_effect != ROWS:
        return float(comparison.paper_effect)
    reads = reads_of(comparison, metric)
    names = comparison.better
    open_names = [name for name in names if name not in paper.columns]
    is_apart = any(len({str(r.side[name]) for r in reads}) > 1 for name in open_names)
    if is_apart or any(r.metric != metric for r in reads):
        return None
    sides = [
        {name: paper.setting(name, r.side[name]) for name in names if name in paper.columns}
        for r in reads
    ]
    if sides[0] == sides[1]:
        return None
    values = [dict(_paper_rows(paper, space, side)) for side in sides]
    effects = [
        sum(r.sign * value[key] for r, value in zip(reads, values, strict=True))
        for key in values[0]
        if all(key in value for value in values)
    ]
    return statistics.fmean(effects) if effects else None


def _paper_rows(
    paper: Paper, space: Mapping[str, Dimension], side: Side
) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield the paper's rows of a side: the settings that it leaves open, and the value."""
    open_names = [name for name in paper.columns if name not in side]
    listed = {n: [paper.setting(n, label_of(v)) for v in space[n].listed] for n in open_names}
    for row in paper.rows:
        point = dict(zip(paper.columns, row[:-1], strict=True))
        if all(is_same(point[name], value) for name, value in side.items()) and all(
            not listed[n] or any(is_same(point[n], own) for own in listed[n]) for n in open_names
        ):
            yield tuple(str(point[n]) for n in open_names), float(row[-1])


def check_paper(paper: Paper, space: Mapping[str, Dimension]) -> None:
    """Raise `ValueError` for what the paper's table names and the space does not have."""
    columns, matches = paper.columns, paper.matches
    for key, names in (("columns", columns if paper.rows else ()), ("matches", matches)):
        for name in names:
            if name not in space:
                hint = cfg.nearest(name, space)
                raise ValueError(f"paper.{key}: {name!r} does not vary in space{hint}")
    for name, theirs in matches.items():
        listed = [label_of(value) for value in space[name].listed]
        for value in theirs:
            if listed and not any(is_same(value, own) for own in listed):
                there = ", ".join(map(str, listed))
                raise ValueError(f"paper.matches.{name}: {value} is not run; there are: {there}")


def check_comparisons(
    comparisons: Sequence[Comparison],
    space: Mapping[str, Dimension],
    reported: Sequence[str],
    metric: str,
) -> None:
    """Raise `ValueError` for a claim about what is not run or reported, or about nothing."""
    for comparison in comparisons:
        claim = f"comparison {comparison.claim!r}"
        reads = reads_of(comparison, metric)
        _check_gaps(claim, reads)
        for read in reads:
            _check_side(claim, read.side, space)
        _check_units(claim, comparison, reads, reported)
    claims = [comparison.claim for comparison in comparisons]
    if len(set(claims)) < len(claims):
        raise ValueError(f"comparisons names a claim twice: {claims}")


def _check_gaps(claim: str, reads: Sequence[Reads]) -> None:
    """Raise for sides that cannot differ, or that cannot be paired."""
    better, worse, *than = reads
    if set(better.side) != set(worse.side):
        raise ValueError(f"{claim}: both sides must name the same dimensions")
    if any(set(side) != set(better.side) for side, _, _ in than):
        raise ValueError(f"{claim}: both sides of than must name the dimensions of better")
    if better[:2] == worse[:2]:
        raise ValueError(f"{claim}: both sides are the same: {better.side}")
    if than and than[0][:2] == than[1][:2]:
        raise ValueError(f"{claim}: both sides of than are the same: {than[0].side}")
    if than and [r.side for r in than] == [better.side, worse.side]:
        raise ValueError(f"{claim}: than is the gap that it is compared with")


def _check_side(claim: str, side: Side, space: Mapping[str, Dimension]) -> None:
    for name, value in side.items():
        listed = [label_of(v) for v in space[name].listed]
        if listed and label_of(value) not in listed:
            raise ValueError(
                f"{claim}: {name}={value!r} is not run; there are: {', '.join(map(repr, listed))}"
            )


def _check_units(
    claim: str, comparison: Comparison, reads: Sequence[Reads], reported: Sequence[str]
) -> None:
    """Raise for metrics that nobody reports or that have no common unit, and points for shares."""
    for _, metric, _ in reads:
        if metric not in reported:
            raise ValueError(f"{claim}: nobody reports {metric!r}{cfg.nearest(metric, reported)}")
    better, worse = reads[0].metric, reads[1].metric
    if is_fraction(better) != is_fraction(worse):
        raise ValueError(f"{claim}: {better} and {worse} have no common unit")
    for key in ("smallest_effect", "expected_deviation"):
        value = getattr(comparison, key)
        if value >= 1 and is_fraction(better):
            raise ValueError(
                f"{claim}: {key}={value:g} of {better}, a fraction; a point is {key}: 0.01"
            )
