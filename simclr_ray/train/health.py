"""Whether a run still learns: signs in its records that it does not, and what is likely behind it.

The driver shows each record of a run's metrics to a `HealthWatch`. A sign has to last for some
steps, of which those of warm-up do not count, so that neither the time that steps take nor the
length of an epoch decides; `benchmarks/collapse.py` says how often it is right, and by which runs
the thresholds were chosen. What a run does about it is `health.*` of the config.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from simclr_ray.config.experiment import Experiment
from simclr_ray.config.imports import imports_in
from simclr_ray.errors import CollapseError, DivergedError, UnhealthyRunError
from simclr_ray.inference.gate import FIRST, SHRUNK_ALONE, are_alike, classes_of
from simclr_ray.nn.build import build_loss
from simclr_ray.train.causes import (
    LEAK_FRACTION,
    LEAK_TOP1,
    Evidence,
    cause_of_collapse,
    cause_of_divergence,
    wrong_views,
)

# RankMe of features that all point one way is 1. An untrained ResNet-10 has 2.3
# (`benchmarks/results/cifar10_cpu.json`), so that 1.1 is no healthy start either.
COLLAPSED_RANK: Final = 1.1
# NT-Xent of embeddings that are all equal is ln(2N − 1). Trained at τ = 1 it is about 1 below.
STUCK_FRACTION: Final = 0.998
# Of the rank beyond 1 and the deviation that features had before the first step; without a margin
# `SHRUNK_ALONE` is.
SHRUNK: Final = 0.5
NO_MARGIN: Final = 0.01  # of cosines; 50 steps after warm-up the healthy have 0.03 and more
FELL_TO: Final = 0.1  # of the largest margin
RISEN_MARGIN: Final = 0.1  # below, a margin has not yet risen
FROM_BATCH: Final = 8  # images; of fewer, chance finds a partner too often to tell anything
LASTING: Final = {"loss": 200, "top1": 200, "margin": 200, "leak": 100, "features": 50, "fall": 50}
CHANCE_SIGMAS: Final = 2.5  # beyond 1/N, of so many picks
OF_TRAINING: Final = ("loss", "top1")
OF_EVALUATION: Final = tuple(sign for sign in LASTING if sign not in OF_TRAINING)
FROZEN_AFTER: Final = 50  # steps at a rate above 0
START: Final = "start/"
LoggedRecord = Mapping[str, float]


class _Report(NamedTuple):
    """What a record of training says."""

    step: int
    loss: float
    top1: float
    grad_norm: float


class HealthWatch:
    """Looks at each record of a run's metrics, and raises where the run does not learn.

    Args:
        experiment: Its loss tells which level only a collapsed model has.
        warmup_steps: In which no sign counts but those that nothing healthy has.

    Attributes:
        collapsed_at: The epoch whose end is the last that counts; 0: all do.
        good_until: The last step at which no sign was there.
        last_step: Of the records.
    """

    def __init__(self, experiment: Experiment, warmup_steps: int = 0) -> None:
        self._experiment, self._warmup_steps = experiment, warmup_steps
        self._num_classes = classes_of(experiment)
        self._level: float | None = None  # of imported code, which need not be here any more
        is_builtin = not any(where == "loss" for where, _ in imports_in(experiment))
        if is_builtin:
            # 0 for D or K: no level that depends on them tells a collapsed model (`only_collapsed`)
            level = build_loss(experiment).chance_level(experiment.batch_size, 0)
            # a healthy loss may lie at a level that is not `only_collapsed`
            self._level = level.value if level is not None and level.only_collapsed else None
        self._is_contrastive = is_builtin and experiment.classifier is None
        self.collapsed_at = self.good_until = self.last_step = 0
        self._start: dict[str, float] = {}
        self._reports: list[_Report] = []
        self._evaluations: list[tuple[int, dict[str, float]]] = []  # step, metrics
        self._well_at = 0  # step of the last evaluation without a sign
        self._since: dict[str, int] = {}  # sign -> the first step at which it was there

    @property
    def well_until(self) -> int:
        """The last step at which neither training nor an evaluation had a sign."""
        return min(self.good_until, self._well_at) if self._start else self.good_until

    @property
    def _evaluation(self) -> dict[str, float]:
        """The last one; empty before the first."""
        return self._evaluations[-1][1] if self._evaluations else {}

    @property
    def _best_margin(self) -> float:
        return max((scores.get("margin", 0.0) for _, scores in self._evaluations), default=0.0)

    def replay(self, records: Iterable[LoggedRecord]) -> UnhealthyRunError | None:
        """Take what a run had logged before it was stopped; nothing of it is raised.

        Returns:
            The error that it would have ended by. None: there is none, or the run was rolled back
            or evaluated well since.
        """
        last: UnhealthyRunError | None = None
        raised_at = -1
        for record in records:
            step = int(record["step"])
            if step < raised_at:
                last = None
            try:
                self(record)
            except UnhealthyRunError as error:
                # where records follow, the run only warned or was rolled back: signs count anew
                self._since.clear()
                last, raised_at = error, step
            if self._well_at > raised_at:
                last = None
        return last

    def __call__(self, record: LoggedRecord) -> None:
        """Take one record of metrics.

        Raises:
            CollapseError: The encoder learns nothing more.
            DivergedError: A metric is not finite.
        """
        step = int(record["step"])
        self._rewind(step)
        wrong = next((k for k, v in record.items() if "/" in k and not math.isfinite(v)), "")
        if wrong:
            raise DivergedError(f"{wrong} is not finite at step {step}")
        self.last_step = step
        if "train/mean_loss" in record:
            self._take_report(step, record)
        elif f"{START}weight_norm" in record:
            self._start |= {k.removeprefix(START): v for k, v in record.items() if "/" in k}
            self._check_views()
        elif "eval/effective_rank" in record:
            self._take_evaluation(step, record)
        else:
            return
        self._raise_if_lasting(step, record["epoch"])
        if not self._since:
            self.good_until = step

    def explained(self, error: UnhealthyRunError) -> UnhealthyRunError:
        """Return an error that is not finite's with its likely cause; others as they are."""
        if isinstance(error, DivergedError) and error.rate_may_help:
            return DivergedError(f"{error}; {cause_of_divergence(self._evidence())}")
        return error

    def _rewind(self, step: int) -> None:
        """Forget what is of later steps: a restart or a rollback makes them anew."""
        if step >= self.last_step:
            return
        while self._reports and self._reports[-1].step >= step:
            self._reports.pop()
        while self._evaluations and self._evaluations[-1][0] > step:
            self._evaluations.pop()
        self._since = {sign: first for sign, first in self._since.items() if first < step}
        self.good_until, self._well_at = min(self.good_until, step), min(self._well_at, step)

    def _take_report(self, step: int, record: LoggedRecord) -> None:
        loss, top1 = record["train/mean_loss"], record.get("train/contrastive_top1", math.nan)
        self._reports.append(_Report(step, loss, top1, record.get("train/grad_norm", math.nan)))
        num = self._experiment.batch_size
        by_chance = False
        if self._is_contrastive and num >= FROM_BATCH and math.isfinite(top1):
            by_chance = self._is_by_chance()
            self._set("top1", step, there=by_chance)
        if self._level is not None:
            # at a low temperature a healthy loss lies above that level for long
            lost = by_chance or self._evaluation.get("margin", 1.0) < NO_MARGIN
            most = math.inf if lost else (2 - STUCK_FRACTION) * self._level
            self._set("loss", step, there=STUCK_FRACTION * self._level < loss < most)

    def _take_evaluation(self, step: int, record: LoggedRecord) -> None:
        now = {k.removeprefix("eval/"): v for k, v in record.items() if k.startswith("eval/")}
        self._evaluations.append((step, now))
        rank, epoch = now["effective_rank"], record["epoch"]
        if are_alike(now, self._start, self._num_classes, COLLAPSED_RANK):
            self.collapsed_at = round(epoch)
            raise self._collapse(
                f"collapsed: the features' effective rank is {rank:.2f} after epoch {epoch:.0f}; "
                "all images look alike to the encoder"
            )
        norm = now.get("weight_norm", 0.0)
        if step >= FROZEN_AFTER and norm and norm == self._start.get("weight_norm"):
            raise self._collapse(
                f"frozen: no weight of the encoder has moved in {step:,} steps", may_help=False
            )
        margin = now.get("margin", math.nan)
        apart = margin >= NO_MARGIN  # False for NaN: a classifier has none
        is_shrunk = bool(self._shrunk()) and not apart
        self._set("features", step, there=is_shrunk)
        if not self._is_contrastive or math.isnan(margin):
            self._well_at = self._well_at if is_shrunk else step
            return
        self._set("margin", step, there=not apart)
        fell = self._best_margin > RISEN_MARGIN and margin < FELL_TO * self._best_margin
        self._set("fall", step, there=fell)
        top1 = self._recent_top1(LASTING["leak"])
        leaks = top1 > LEAK_TOP1 and now["pair_top1"] < LEAK_FRACTION * top1
        self._set("leak", step, there=leaks)
        if not set(self._since) & set(OF_EVALUATION):
            self._well_at = step

    def _shrunk(self) -> list[str]:
        """Return the metrics of h and of z where it has shrunk below what it began with."""
        shrunk: list[str] = []
        most = SHRUNK if "margin" in self._evaluation else SHRUNK_ALONE
        for part in ("", "_z"):
            names = (f"effective_rank{part}", f"feature_std{part}")
            if all(name in of for name in names for of in (self._start, self._evaluation)):
                rank, deviation = (self._evaluation[name] for name in names)
                rank_before, deviation_before = (self._start[name] for name in names)
                if rank - 1 < most * (rank_before - 1) and deviation < most * deviation_before:
                    shrunk += names
        return shrunk

    def _recent(self, steps: int) -> list[_Report]:
        """Return the reports of the last steps."""
        first = bisect_right(self._reports, self.last_step - steps, key=lambda r: r.step)
        return self._reports[first:]

    def _recent_top1(self, steps: int) -> float:
        """Return the mean of the last steps' top-1; NaN where there are no such reports."""
        recent = [report.top1 for report in self._recent(steps)]
        return math.fsum(recent) / len(recent) if recent else math.nan

    def _is_by_chance(self) -> bool:
        """Return whether partners are found no more often than random picks find them."""
        num = self._experiment.batch_size
        picks = num * len(self._recent(LASTING["top1"]))
        if not picks:
            return False
        deviation = math.sqrt((1 / num) * (1 - 1 / num) / picks)
        return self._recent_top1(LASTING["top1"]) < 1 / num + CHANCE_SIGMAS * deviation

    def _set(self, sign: str, step: int, *, there: bool) -> None:
        """Remember from which step on a sign has been there without a break."""
        if not there:
            self._since.pop(sign, None)
        elif step > self._warmup_steps:
            self._since.setdefault(sign, step)

    def _check_views(self) -> None:
        if self._is_contrastive and not self._experiment.takes_labels:
            wrong = wrong_views(self._evidence())
            if wrong:
                raise self._collapse(f"there is nothing to learn: {wrong}", may_help=False)

    def _raise_if_lasting(self, step: int, epoch: float) -> None:
        for sign, first in self._since.items():
            # a first record stands for the steps before it: a report for those since the last
            if step - first + self._stands_for(sign) < LASTING[sign]:
                continue
            self.collapsed_at = max(1, math.floor(epoch))
            raise self._collapse(
                f"{self._description(sign)} at step {step:,} (epoch {epoch:.2f})",
                may_help=sign != "leak",
                by_loss=sign in OF_TRAINING,
            )

    def _stands_for(self, sign: str) -> int:
        return self._experiment.tracking.log_every_steps if sign in OF_TRAINING else 0

    def _description(self, sign: str) -> str:
        now, start = self._evaluation, self._start
        loss, top1 = self._reports[-1].loss if self._reports else math.nan, self._recent_top1(100)
        lasting = LASTING[sign]
        if sign == "loss":
            return (
                f"stuck: the loss is {loss:.4f}, and in {lasting} steps was never below that of "
                f"embeddings that are all equal ({self._level:.4f})"
            )
        if sign == "top1":
            return (
                f"stuck: a view's partner is found in {top1:.1%} of {lasting} steps, as by chance"
            )
        if sign == "leak":
            return (
                f"leaking: partners are found in {top1:.1%} of the batches in training, in "
                f"{now['pair_top1']:.1%} by running statistics"
            )
        if sign == "features":
            return "collapsed: " + ", ".join(
                f"{name.replace('_', ' ')} is {now[name]:.3g}, {FIRST} {start[name]:.3g}"
                for name in self._shrunk()
            )
        before = f", after {self._best_margin:.3f}" if sign == "fall" else ""
        return (
            f"stuck: the views of an image are nearer than those of others by {now['margin']:.4f} "
            f"(cosine){before}"
        )

    def _collapse(
        self, problem: str, *, may_help: bool = True, by_loss: bool = False
    ) -> CollapseError:
        cause = cause_of_collapse(self._evidence())
        error = CollapseError(problem if cause in problem else f"{problem}; {cause}")
        error.rate_may_help = may_help
        error.good_until = self.good_until if by_loss else self.well_until
        return error

    def _evidence(self) -> Evidence:
        return Evidence(
            experiment=self._experiment,
            start=self._start,
            now=self._evaluation,
            losses=[r.loss for r in self._reports],
            grad_norms=[r.grad_norm for r in self._reports],
            top1=self._recent_top1(LASTING["leak"]),
            is_by_chance=self._is_by_chance(),
            warmup_steps=self._warmup_steps,
            step=self.last_step,
        )
