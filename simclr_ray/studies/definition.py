"""A study's definition: the question, what varies, how it is searched and drawn, and the paper.

A file of `tune_configs/` holds one. `set` and `space` name dotted paths of the experiment; a scale
(`cpu`, `cifar10`, `imagenet`) is the same question at another size and replaces some of the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from simclr_ray import config as cfg
from simclr_ray.config import Config, Field, Scalar
from simclr_ray.config.metrics import EPOCH_METRICS, is_fraction
from simclr_ray.config.protocols import (
    DEFAULT_PROTOCOLS,
    PROBE,
    PROTOCOL_NAMES,
    StudyProtocol,
    protocol_named,
    same_metric,
)
from simclr_ray.studies.comparisons import Comparison, Paper, check_comparisons, check_paper
from simclr_ray.studies.space import DIGITS, Dimension

NO_PBT = (
    "pbt is refused: it copies weights and changes settings while training, which leaves no run "
    "that could be named or repeated, and a cosine schedule has no meaning halfway"
)
CLASSIFIER_METRICS = (
    "final/classifier/top1",
    "final/classifier/top5",
    "final/classifier/mean_per_class",
    "final/classifier/voc07_map",
)
PROBES = {  # our name -> that of `evaluation.probes`
    "color": "color vs grayscale",
    "rotation": "rotation",
    "noise": "orig. vs corrupted",
    "sobel": "orig. vs Sobel filtered",
    "class": "class",  # of labelled images, by linear evaluation
}
PROBE_METRICS = tuple(f"probe/{name}_{part}" for name in PROBES for part in ("h", "z"))
VIEW_METRICS = ("views/global_to_local", "views/adjacent")  # `augment.crop_statistics`
EITHER = "downstream_top1"  # linear evaluation of h, or the run's own classifier where it has one


class Scheduler(Config):
    """What ends hopeless trials, comparing them at equal epochs."""

    name: Literal["none", "asha", "median"] = "none"
    grace_epochs: int = Field(1, ge=1, description="No trial ends before.")
    reduction_factor: int = Field(3, ge=2, description="asha: one in so many goes on.")
    max_epochs: int = Field(0, ge=0, description="asha: of the last rung; 0: the longest trial's.")

    @cfg.model_validator(mode="before")
    @classmethod
    def _refuse_pbt(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("name") in ("pbt", "pb2"):
            raise ValueError(NO_PBT)
        return tree


class Search(Config):
    """How points of the space are chosen."""

    name: Literal["grid", "random", "optuna"] = "grid"
    trials: int = Field(0, ge=0, description="random, optuna: points that are tried.")
    seed: int = Field(
        0, ge=0, description="Of points, and of the order in which a grid is compared."
    )

    @property
    def learns(self) -> bool:
        """Return whether points are chosen by what earlier ones gave: unknown before it runs."""
        return self.name == "optuna"

    def runs_per_trial(self, num_planned: int) -> float:
        """Return how many runs each of some planned trials stands for: one, unless it learns."""
        return self.trials / num_planned if self.learns else 1.0


class Budget(Config):
    """What a study may take at most; 0 is no limit."""

    trials: int = Field(0, ge=0, description="More are refused before anything starts.")
    hours: float = Field(0.0, ge=0, description="Of wall time; the study stops and can be resumed.")


class Figure(Config):
    """How the result is drawn."""

    kind: Literal["lines", "bars", "matrix"] = "lines"
    x: str = Field(min_length=1, description="Dimension along the axis (matrix: columns).")
    series: str = Field("", description="Dimension of the lines or groups (matrix: rows).")
    panel: str = Field("", description="Dimension that has an image for each value.")
    x_scale: Literal["linear", "log2", "log10", "category"] = "category"
    x_label: str = ""
    y_label: str = ""


class Study(Config):
    """One study at one scale."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    question: str = Field(min_length=1)
    answers: str = Field("", description="Figure or table of the paper.")
    notes: str = ""
    base: str = Field(min_length=1, description="Preset or YAML file of the experiment.")
    set: dict[str, Any] = Field({}, description="Path -> value, for all trials.")
    space: dict[str, Dimension] = Field(description="Path, or name of cases, -> what varies.")
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field([0], min_length=1)
    metric: str = "final/linear_top1"
    extra_metrics: list[str] = Field([], description="Metrics that the table shows besides.")
    mode: Literal["max", "min"] = "max"
    protocols: list[StudyProtocol] = Field(
        [*DEFAULT_PROTOCOLS],
        description="Protocols after training: final/... and probe/... metrics.",
    )
    scheduler: Scheduler = Scheduler()
    search: Search = Search()
    budget: Budget = Budget()
    concurrency: int = Field(0, ge=0, description="Trials at a time; 0: as many as the CPUs hold.")
    images_per_s: float = Field(0.0, ge=0, description="Of one trial, for the forecast.")
    figure: Figure
    comparisons: list[Comparison] = Field([], description="The claims that are tested.")
    expected_deviation: float = Field(
        0.0,
        ge=0,
        description="Of differences between paired seeds, from earlier ones, in the metric's unit: "
        "the power of claims with a smallest_effect follows before anything runs. 0: unknown.",
    )
    smallest_effect: float = Field(
        0.0,
        ge=0,
        description="Of claims by the study's metric that state none of their own; 0: none.",
    )
    paper: Paper = Paper(source="-", metric="-", columns=[], rows=[])
    scale: str = Field("", description="The scale that was chosen.")

    @cfg.model_validator(mode="before")
    @classmethod
    def _fill_figure(cls, tree: Any) -> Any:
        """Draw along the first dimension where nothing is said of the figure."""
        if not isinstance(tree, dict) or "figure" in tree:
            return tree
        space = tree.get("space")
        first = next(iter(space), "") if isinstance(space, dict) else ""
        return {**tree, "figure": {"x": first or "space"}}

    @cfg.model_validator(mode="before")
    @classmethod
    def _fill_smallest_effects(cls, tree: Any) -> Any:
        """Give claims by the study's metric its smallest effect where they state none."""
        smallest = tree.get("smallest_effect") if isinstance(tree, dict) else None
        claims = tree.get("comparisons") if smallest else None
        if not isinstance(claims, list):
            return tree
        filled = [
            {"smallest_effect": smallest, **claim}
            if isinstance(claim, dict) and not claim.get("metric")
            else claim
            for claim in claims
        ]
        return {**tree, "comparisons": filled}

    @cfg.model_validator(mode="after")
    def _check_together(self) -> Study:
        if not self.space:
            raise ValueError("space is empty: nothing varies")
        for key in ("seeds", "protocols", "extra_metrics"):
            if len(set(getattr(self, key))) < len(getattr(self, key)):
                raise ValueError(f"{key} names one twice: {getattr(self, key)}")
        if problem := same_metric([name for name in self.protocols if name != PROBE]):
            raise ValueError(f"protocols: {problem}")
        reported = self.metrics()
        named = [("metric", self.metric), *(("extra_metrics", m) for m in self.extra_metrics)]
        for key, metric in named:
            if metric not in reported:
                protocol = metric.removeprefix("final/").removesuffix("_top1")
                hint = cfg.nearest(metric, reported)
                if protocol in PROTOCOL_NAMES:
                    hint = f" without {protocol!r} in protocols"
                raise ValueError(
                    f"{key}: nobody reports {metric!r}{hint}; reported are: {', '.join(reported)}"
                )
        if self.scheduler.name != "none" and self.metric not in EPOCH_METRICS:
            raise ValueError(
                f"scheduler.name={self.scheduler.name} compares trials at epoch ends; metric must "
                f"be one of: {', '.join(EPOCH_METRICS)}"
            )
        self._check_search()
        self._check_paths()
        self._check_names()
        self._check_figure()
        if self.expected_deviation >= 1 and is_fraction(self.metric):
            problem = f"of {self.metric}, a fraction; a point is 0.01"
            raise ValueError(f"expected_deviation={self.expected_deviation:g} {problem}")
        check_paper(self.paper, self.space)
        check_comparisons(self.comparisons, self.space, reported, self.metric)
        return self

    def _check_paths(self) -> None:
        """Raise for values that never count, since every case of another dimension has its own."""
        for name, dim in self.space.items():
            taken = sorted(dim.common_paths & (self.space.keys() - {name}))
            if taken:
                raise ValueError(
                    f"space.{taken[0]}: each case of space.{name} sets it: what is given here "
                    "would never count"
                )

    def _check_search(self) -> None:
        if self.search.name == "grid":
            drawn = [name for name, dim in self.space.items() if not dim.is_whole]
            if drawn:
                raise ValueError(
                    f"search.name=grid runs every value, but values of {', '.join(drawn)} are "
                    "drawn; use grid or cases there, or search.name=random"
                )
        elif not self.search.trials:
            raise ValueError(f"search.name={self.search.name} needs search.trials above 0")
        if self.search.learns and len(self.seeds) > 1:
            raise ValueError("search.name=optuna learns from one seed; give one")
        if self.search.learns and all(d.listed for d in self.space.values()):
            raise ValueError("search.name=optuna needs a range; run listed values by grid")

    def _check_names(self) -> None:
        """Raise for a figure or comparison that speaks of what does not vary."""
        wanted = [self.figure.x, self.figure.series, self.figure.panel]
        gaps = [gap for c in self.comparisons for gap in (c, c.than)]
        wanted += [k for gap in gaps for k in (*gap.better, *gap.worse)]
        for name in filter(None, wanted):
            if name not in self.space:
                hint = cfg.nearest(name, self.space)
                raise ValueError(
                    f"figure or comparison: {name!r} does not vary{hint}; space has: "
                    f"{', '.join(self.space)}"
                )

    def _check_figure(self) -> None:
        """Raise for axes that cannot be drawn."""
        drawn = [n for n in (self.figure.x, self.figure.series, self.figure.panel) if n]
        if len(set(drawn)) < len(drawn):
            raise ValueError(f"figure: x, series and panel must differ, got {', '.join(drawn)}")
        numbers = [v for v in self.space[self.figure.x].values if not isinstance(v, bool)]
        scale, is_log = self.figure.x_scale, self.figure.x_scale.startswith("log")
        if scale != "category" and not all(
            isinstance(v, int | float) and (v > 0 or not is_log) for v in numbers
        ):
            above = ", all above 0" if is_log else ""
            raise ValueError(f"figure.x_scale={scale} needs numbers along x{above}")

    def metrics(self) -> list[str]:
        """Return the metrics that trials of this study report."""
        scored = [name for name in self.protocols if name != PROBE]
        final = [f"final/{protocol_named(name).metric}" for name in scored]
        probes = PROBE_METRICS if PROBE in self.protocols else ()
        either = (EITHER,) if self.protocols else ()
        return [*EPOCH_METRICS, *final, *probes, *CLASSIFIER_METRICS, *VIEW_METRICS, *either]


def point_of(study: Study, drawn: Mapping[str, Any]) -> dict[str, Scalar]:
    """Return what was drawn as a point: of a range, numbers that can be read, named and typed."""
    point = {}
    for name, dim in study.space.items():
        value = drawn[name]
        bounds = dim.uniform or dim.loguniform
        if bounds:
            value = min(max(float(f"{value:.{DIGITS}g}"), bounds[0]), bounds[1])
        point[name] = value
    return point
