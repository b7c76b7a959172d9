"""Makes one part of a planned batch: reads the rows it names, decodes them, makes both views.

Plain Python and torch, no Ray: the same object serves a Ray Data actor, a test, and a GPU machine
without Ray. What it returns depends on the plan alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from simclr_ray.augment.ops import ChannelJitter, Op
from simclr_ray.augment.pipeline import Crop, Pipelines, Stage
from simclr_ray.augment.views import Pixels, TwoViews, ViewPair
from simclr_ray.config.components import build
from simclr_ray.config.experiment import (
    DataConfig,
    Experiment,
    PipelineViewsConfig,
    SimCLRViewsConfig,
)
from simclr_ray.config.sections.views import AnyStageConfig
from simclr_ray.config.wording import GIB
from simclr_ray.data.batch import Batch
from simclr_ray.data.decoding import training_decoder
from simclr_ray.data.image_cache import DecodedImage
from simclr_ray.data.image_groups import groups_of
from simclr_ray.data.plan import BatchPlan, replacement
from simclr_ray.data.row_reader import RowReader, UnusableRow
from simclr_ray.data.rowgroups import RowGroups
from simclr_ray.data.source import Source
from simclr_ray.distributed.collectives import partition
from simclr_ray.errors import DataError, TooManyBadImages

LeastSides = Callable[[NDArray[np.int64], int], NDArray[np.int64]]
# images, ids, epoch, ids of view b where it is of other images (see `TwoViews`)
MakeViews = Callable[[list[Pixels], NDArray[np.int64], int, NDArray[np.int64] | None], ViewPair]
# the image of both views, or of view a and of view b
Shown = tuple[DecodedImage, ...]
MAX_ATTEMPTS = 64  # then any row that is left


class BatchPart(NamedTuple):
    """A part of a step, in memory that may be another's: as `Batch`, but arrays."""

    step: int
    a: Pixels  # uint8 [n, C, S, S]
    b: Pixels  # uint8 [n, C, S, S]
    ids: NDArray[np.int64]  # [n]
    bad: NDArray[np.int64]  # [m]
    reasons: tuple[str, ...]
    paths: tuple[str, ...]
    ids_b: NDArray[np.int64] | None = None  # [n]


class BatchBuilder:
    """Makes places [first, last) of each planned batch.

    Args:
        source: The dataset.
        plan: Over its row groups.
        views: Makes both views of images with these ids in this epoch; see `view_builder`.
        data: Limits and cache.
        places: [first, last) of the global batch's list.
        stop: The step before which the run ends.
        least_sides: As of `least_sides_of`.
    """

    def __init__(
        self,
        source: Source,
        plan: BatchPlan,
        views: MakeViews,
        data: DataConfig,
        places: tuple[int, int],
        *,
        stop: int = sys.maxsize,
        least_sides: LeastSides | None = None,
    ) -> None:
        self.least_sides = least_sides
        self.plan, self.views, self.places = plan, views, places
        self.max_bad_fraction = data.max_bad_fraction
        self.reader = RowReader(
            source,
            training_decoder(data),
            cache_gib=0 if least_sides else data.cache_gib,  # an image is another in each epoch
            shared=True,
        )
        self.num_rows = source.num_rows
        self.images = groups_of(source) if source.num_groups else None
        self.groups = RowGroups(
            source,
            plan,
            places,
            stop,
            missing=self.reader.missing,
            read_beyond_epoch=lambda: self.reader.cache.full,
            images=self.images,
        )

    def make(self, step: int) -> Batch:
        """Return this part of global step `step`; raises what `build` does."""
        return self.build([step])[0]

    def build(self, steps: Sequence[int]) -> list[Batch]:
        """Return this part of global steps of one epoch, the views of all made together.

        Raises:
            TooManyBadImages: More than `data.max_bad_fraction` of all rows were found unusable.
            DataError: A parquet file cannot be read, or no row is left to stand in for a bad one.
            ValueError: The steps are not of one epoch.
        """
        epochs = {self.plan.epoch_of(step) for step in steps}
        if len(epochs) != 1:
            raise ValueError(f"steps {[*steps]} are of epochs {sorted(epochs)}")
        gathered = [self._gathered(step) for step in steps]
        by_view = [
            [image for images in same_view for image in images]
            for same_view in zip(*(shown for shown, _ in gathered), strict=True)
        ]
        ids, *others = (np.array([p.id for p in images], np.int64) for images in by_view)
        ids_b = others[0] if others else None
        pixels = [p.pixels for images in by_view for p in images]
        views = self.views(pixels, ids, epochs.pop(), ids_b)
        columns = (*views, *(torch.from_numpy(column) for column in (ids, *others)))
        parts = zip(*(column.chunk(len(steps)) for column in columns), strict=True)
        batches = []
        for step, (_, bad), (a, b, own, *own_b) in zip(steps, gathered, parts, strict=True):
            unusable = torch.tensor([b.id for b in bad], dtype=torch.int64)
            reasons, paths = tuple(b.reason for b in bad), tuple(b.path for b in bad)
            of_b = own_b[0] if own_b else None
            batches.append(Batch(step, a, b, own, unusable, reasons, paths, ids_b=of_b))
        return batches

    def _gathered(self, step: int) -> tuple[list[list[DecodedImage]], list[UnusableRow]]:
        """Return the images of this part of a step, and the rows that others stand in for.

        The images are those of both views, or those of view a and those of view b.
        """
        first, last = self.places
        units = self.plan.rows_of(step, first, last)
        epoch, num = self.plan.epoch_of(step), len(units)
        self.groups.advance(step)
        if self.least_sides is not None:
            self.reader.least_sides = partial(_of_epoch, self.least_sides, epoch)
        rows = self._rows(units, epoch)
        decoded = self._decoded(rows)
        images: list[list[Any]] = [decoded[num * v : num * (v + 1)] for v in range(len(rows))]
        bad: list[UnusableRow] = []
        if None not in decoded:
            return images, bad
        for index, unit in enumerate(units.tolist()):
            planned = [images_of_view[index] for images_of_view in images]
            own = [rows_of_view[index] for rows_of_view in rows]
            unusable = [row for row, image in zip(own, planned, strict=True) if image is None]
            if unusable:
                self._check_fraction()
                bad += [self.reader.bad[row] for row in dict.fromkeys(unusable)]
                shown = self._mended(unit, own, planned, epoch)
                shown = shown or self._stand_in(unit, first + index, step)
                for images_of_view, image in zip(images, shown, strict=True):
                    images_of_view[index] = image
        return images, bad

    def _decoded(self, rows: list[list[int]]) -> list[DecodedImage | None]:
        """Return the images of rows, one list after the other, each decoded once."""
        if len(rows) == 1:
            return self.reader.images(rows[0], self.groups.take)
        both = [row for own in rows for row in own]
        distinct = list(dict.fromkeys(both))  # a group may have one image
        image_of = dict(zip(distinct, self.reader.images(distinct, self.groups.take), strict=True))
        return [image_of[row] for row in both]

    def _rows(self, units: NDArray[np.int64], epoch: int) -> list[list[int]]:
        """Return the rows that an epoch shows: of both views, or of view a and of view b."""
        if self.images is None:
            return [units.tolist()]
        pairs = self.images.pairs(units, seed=self.plan.seed, epoch=epoch)
        return [rows.tolist() for rows in pairs]

    def _shown(self, unit: int, epoch: int) -> Shown | None:
        """Return the images of a row or group, None where none of it can be used."""
        rows = [row for (row,) in self._rows(np.array([unit]), epoch)]
        images = [self.reader.image(row) for row in rows]
        return self._mended(unit, rows, images, epoch)

    def _mended(
        self, unit: int, rows: list[int], images: list[DecodedImage | None], epoch: int
    ) -> Shown | None:
        """Return the images, where one cannot be used another of the group: the other view's last.

        None where no image of the group can be used.
        """
        usable = [image for image in images if image is not None]
        if len(usable) < len(images) and self.images is not None:
            others = self.images.stand_ins(unit, seed=self.plan.seed, epoch=epoch)
            spare = filter(None, (self.reader.image(r) for r in others if r not in rows))
            images = [image or next(spare, None) for image in images]
            self._check_fraction()
            usable = [image for image in images if image is not None]
            usable = usable * 2 if len(usable) == 1 else usable
        return tuple(usable) if usable else None

    def _stand_in(self, unit: int, place: int, step: int) -> Shown:
        named = self._keyed(unit, place, step)
        if named < 0:
            named = self._left_over(place, step)
        shown = self._shown(named, self.plan.epoch_of(step)) if named >= 0 else None
        if shown is None:
            kind = "row" if self.images is None else "group"
            problem = f"no usable {kind} is left to stand in for {kind} {unit} of step {step}"
            raise DataError(problem)
        return shown

    def _keyed(self, unit: int, place: int, step: int) -> int:
        """Return the row, or group, that the key names to stand in at `place`, or -1."""
        batch: set[int] = set(self.plan.rows(step).tolist())
        epoch = self.plan.epoch_of(step)
        for attempt in range(MAX_ATTEMPTS):
            candidate = replacement(unit, place, batch, attempt, plan=self.plan, epoch=epoch)
            if candidate >= 0:
                if self._shown(candidate, epoch) is not None:
                    return candidate
                self._check_fraction()
        return -1

    def _left_over(self, place: int, step: int) -> int:
        """Return the row, or group, for a place that the key names none for, or -1.

        That happens in a set of few batches.

        All bad places of the batch are gone through in order, those of other parts too, so that
        every part agrees on who takes what, and no row is taken twice.
        """
        rows, epoch = self.plan.rows(step).tolist(), self.plan.epoch_of(step)
        bad = [(p, row) for p, row in enumerate(rows) if self._shown(row, epoch) is None]
        keyed = {p: self._keyed(row, p, step) for p, row in bad}
        used = {*rows, *keyed.values()}
        free = (r for r in range(self.plan.num_rows) if r not in used and self._shown(r, epoch))
        waiting = [p for p, row in keyed.items() if row < 0]
        replacements = dict(zip(waiting, free, strict=False))
        self._check_fraction()
        return replacements.get(place, -1)

    def _check_fraction(self) -> None:
        num_bad, rows = len(self.reader.bad), self.num_rows
        if num_bad > self.max_bad_fraction * rows:
            reasons = sorted({bad.reason for bad in self.reader.bad.values()})
            names = [bad.path or f"row {row}" for row, bad in sorted(self.reader.bad.items())]
            raise TooManyBadImages(
                f"{num_bad} of {rows} rows cannot be used, more than data.max_bad_fraction="
                f"{self.max_bad_fraction:g} allows; reasons: {'; '.join(reasons[:5])}; "
                f"first: {', '.join(names[:10])}"
            )


def _of_epoch(least: LeastSides, epoch: int, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    return least(ids, epoch)


def build_two_views(views: SimCLRViewsConfig, seed: int, channels: int = 3) -> TwoViews:
    """Return the paper's pipeline as a config describes it, for images of so many channels."""
    return build(views, TwoViews, seed=seed, channels=channels)


def build_views(
    views: SimCLRViewsConfig | PipelineViewsConfig, seed: int, channels: int = 3
) -> TwoViews | Pipelines:
    """Return what makes views as a config describes it, for images of so many channels."""
    if isinstance(views, SimCLRViewsConfig):
        return build_two_views(views, seed, channels)
    parts = (views.shared, views.a, views.stages_of_b)
    lists = ([_stage(s, channels) for s in part] for part in parts)
    return Pipelines(views.size, *lists, seed=seed, channels=channels)


def _stage(config: AnyStageConfig, channels: int) -> Stage:
    if config.name == "crop":
        return Stage(config.name, build(config, Crop), config.p)
    if config.name == "jitter" and channels != 3:
        amounts = (config.brightness, config.contrast)
        return Stage(config.name, ChannelJitter(channels, config.strength, *amounts), config.p)
    return Stage(config.name, build(config, Op), config.p)  # type: ignore[type-abstract] # a protocol


def view_builder(experiment: Experiment) -> MakeViews:
    """Return what a run makes of images: views of the epoch's size, or crops for the worker."""
    config = experiment.augment
    views = build_views(config, experiment.seed, experiment.data.channels)

    def make(
        images: list[Pixels],
        ids: NDArray[np.int64],
        epoch: int,
        ids_b: NDArray[np.int64] | None = None,
    ) -> ViewPair:
        sized = views.with_size(config.size_at(epoch, experiment.epochs))
        if isinstance(sized, TwoViews) and experiment.scaling.color_augment_on == "worker":
            return sized.crops(images, ids, epoch, ids_b)
        return sized(images, ids, epoch, ids_b)

    return make


def least_sides_of(experiment: Experiment) -> LeastSides | None:
    """Return what tells by ids and epoch how large images need to be; None: whole, always."""
    config = experiment.augment
    if experiment.data.decoder != "turbo_scaled" or not isinstance(config, SimCLRViewsConfig):
        return None
    views = build_two_views(config, experiment.seed)

    def least(ids: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        return views.with_size(config.size_at(epoch, experiment.epochs)).least_sides(ids, epoch)

    return least


def build_plan(experiment: Experiment, source: Source) -> BatchPlan:
    """Return the experiment's plan over `source`. Raises `DataError` if it fills no batch."""
    data = experiment.data
    most = min(data.shuffle_rows, int(data.shuffle_gib * GIB / source.row_bytes))
    if source.num_groups:  # of each, two rows are held
        sizes = tuple(np.diff(groups_of(source).firsts).tolist())
        return BatchPlan(sizes, experiment.batch_size, experiment.seed, most // 2, "groups")
    sizes = tuple(g.num_rows for g in source.row_groups)
    return BatchPlan(sizes, experiment.batch_size, experiment.seed, most)


def local_builder(
    experiment: Experiment, source: Source, stop: int, rank: int = 0, num_ranks: int = 1
) -> BatchBuilder:
    """Return what makes this rank's batches before step `stop` in this process."""
    places = partition(experiment.batch_size, rank, num_ranks)
    plan, views = build_plan(experiment, source), view_builder(experiment)
    return BatchBuilder(
        source, plan, views, experiment.data, places,
        stop=stop, least_sides=least_sides_of(experiment),
    )  # fmt: skip


def local_batches(
    experiment: Experiment, source: Source, steps: range, rank: int = 0, num_ranks: int = 1
) -> Iterator[Batch]:
    """Yield this rank's batches of `steps`, made in this process: for tests and one machine."""
    builder = local_builder(experiment, source, steps.stop, rank, num_ranks)
    for step in steps:
        yield builder.make(step)


def join(parts: Sequence[Batch] | Sequence[BatchPart]) -> Batch:
    """Return the parts of one step, in the order of their places, as a batch of its own memory."""
    steps = {part.step for part in parts}
    if len(steps) != 1:
        raise DataError(f"parts of different steps met: {sorted(steps)}")
    columns = zip(*(part[1:5] for part in parts), strict=True)
    a, b, ids, bad = (torch.from_numpy(np.concatenate(column)) for column in columns)
    reasons = tuple(reason for part in parts for reason in part.reasons)
    paths = tuple(path for part in parts for path in part.paths)
    of_b = [np.asarray(part.ids_b) for part in parts if part.ids_b is not None]
    ids_b = torch.from_numpy(np.concatenate(of_b)) if of_b else None
    return Batch(parts[0].step, a, b, ids, bad, reasons, paths, ids_b=ids_b)
