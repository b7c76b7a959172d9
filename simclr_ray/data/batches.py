"""Makes one part of a planned batch: reads the rows it names, decodes them, makes both views.

Plain Python and torch, no Ray: the same object serves a Ray Data actor, a test, and a GPU machine
without Ray. What it returns depends on the plan alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from simclr_ray.augment.decode import ImageDecoder, ImageError
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
from simclr_ray.data.batch import Batch
from simclr_ray.data.decoding import training_decoder
from simclr_ray.data.image_cache import DecodedImage, ImageCache
from simclr_ray.data.plan import BatchPlan, replacement
from simclr_ray.data.rowgroups import EncodedRow, RecentGroups, RowGroups
from simclr_ray.data.source import Source
from simclr_ray.distributed.collectives import partition
from simclr_ray.errors import DataError, TooManyBadImages

Take = Callable[[int], EncodedRow | None]
MakeViews = Callable[[list[Pixels], NDArray[np.int64], int], ViewPair]
LeastSides = Callable[[NDArray[np.int64], int], NDArray[np.int64]]
GIB = 2**30
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


class Bad(NamedTuple):
    """A row that cannot be used: its id, why, and the file that it was, where that is known."""

    id: int
    reason: str
    path: str


class RowReader:
    """Decoded rows by number, through a bounded cache.

    `bad` names each row that could not be decoded, by its id and why.

    Args:
        source: The dataset.
        decoder: Of its images.
        cache_gib: For decoded rows.
        shared: Whether the readers of this node that share a dataset also share the cache.

    Attributes:
        least_sides: Returns the height and width of images, [n, 2], that suffice in this epoch, by
            their ids; None: images are decoded whole. Not to be set with a cache.
    """

    def __init__(
        self, source: Source, decoder: ImageDecoder, *, cache_gib: float, shared: bool = False
    ) -> None:
        self.decoder = decoder
        name = f"{source.uri} {source.fingerprint} {decoder}" if shared else ""
        self.cache = ImageCache(name, source.num_rows, int(cache_gib * GIB), decoder.channels)
        self.recent = RecentGroups(source)
        self.bad: dict[int, Bad] = {}
        self.least_sides: Callable[[NDArray[np.int64]], NDArray[np.int64]] | None = None

    def images(self, rows: Sequence[int], take: Take) -> list[DecodedImage | None]:
        """Return the decoded rows, None for each that cannot be used.

        Args:
            rows: Row numbers.
            take: Where encoded rows come from; those for which it has None are read one by one.
        """
        images = self.cache.find(rows)
        new: dict[int, DecodedImage] = {}
        missing = [
            (place, row, take(row) or self.recent.take(row))
            for place, (row, image) in enumerate(zip(rows, images, strict=True))
            if image is None and row not in self.bad
        ]
        for (place, row, encoded), least in zip(missing, self._least(missing), strict=True):
            images[place] = decoded = self._decode(row, encoded, least)
            if decoded is not None:
                new[row] = decoded
        self.cache.keep(new)
        return images

    def image(self, row: int) -> DecodedImage | None:
        """Return one decoded row, or None where it cannot be used."""
        return self.images([row], self.recent.take)[0]

    def missing(self, first: int, last: int) -> list[int]:
        """Return those of the rows [first, last) that were never decoded, or not kept."""
        unknown = np.flatnonzero(~self.cache.holds(first, last)) + first
        return [row for row in unknown.tolist() if row not in self.bad]

    def _least(self, missing: list[tuple[int, int, EncodedRow]]) -> list[tuple[int, int]]:
        if self.least_sides is None or not missing:
            return [(0, 0)] * len(missing)
        ids = np.array([encoded.id for _, _, encoded in missing], np.int64)
        return [(height, width) for height, width in self.least_sides(ids).tolist()]

    def _decode(self, row: int, encoded: EncodedRow, least: tuple[int, int]) -> DecodedImage | None:
        try:
            if encoded.image is None:
                raise ImageError("null image")
            return DecodedImage(encoded.id, self.decoder.decode(encoded.image, least))
        except ImageError as error:
            self.bad[row] = Bad(encoded.id, str(error), encoded.path)
            return None


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
        self.groups = RowGroups(
            source,
            plan,
            places,
            stop,
            missing=self.reader.missing,
            read_beyond_epoch=lambda: self.reader.cache.full,
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
        images = [p for step_images, _ in gathered for p in step_images]
        ids = np.array([p.id for p in images], np.int64)
        views = self.views([p.pixels for p in images], ids, epochs.pop())
        columns = (*views, torch.from_numpy(ids))
        parts = zip(*(column.chunk(len(steps)) for column in columns), strict=True)
        batches = []
        for step, (_, bad), (a, b, own) in zip(steps, gathered, parts, strict=True):
            unusable = torch.tensor([b.id for b in bad], dtype=torch.int64)
            reasons, paths = tuple(b.reason for b in bad), tuple(b.path for b in bad)
            batches.append(Batch(step, a, b, own, unusable, reasons, paths))
        return batches

    def _gathered(self, step: int) -> tuple[list[DecodedImage], list[Bad]]:
        """Return the images of this part of a step, and the rows that others stand in for."""
        first, last = self.places
        rows = self.plan.rows_of(step, first, last).tolist()
        self.groups.advance(step)
        if self.least_sides is not None:
            self.reader.least_sides = partial(_of_epoch, self.least_sides, self.plan.epoch_of(step))
        images, bad = [], []
        decoded = self.reader.images(rows, self.groups.take)
        for place, (row, planned) in enumerate(zip(rows, decoded, strict=True), start=first):
            image = planned
            if image is None:
                self._check_fraction()
                bad.append(self.reader.bad[row])
                image = self._stand_in(row, place, step)
            images.append(image)
        return images, bad

    def _stand_in(self, row: int, place: int, step: int) -> DecodedImage:
        stand_in_row = self._keyed(row, place, step)
        if stand_in_row < 0:
            stand_in_row = self._left_over(place, step)
        image = self.reader.image(stand_in_row) if stand_in_row >= 0 else None
        if image is None:
            raise DataError(f"no usable row is left to stand in for row {row} of step {step}")
        return image

    def _keyed(self, row: int, place: int, step: int) -> int:
        """Return the row that the key names to stand in at `place`, or -1."""
        batch: set[int] = set(self.plan.rows(step).tolist())
        epoch = self.plan.epoch_of(step)
        for attempt in range(MAX_ATTEMPTS):
            candidate = replacement(row, place, batch, attempt, plan=self.plan, epoch=epoch)
            if candidate >= 0:
                if self.reader.image(candidate) is not None:
                    return candidate
                self._check_fraction()
        return -1

    def _left_over(self, place: int, step: int) -> int:
        """Return the row for a place that the key names none for, or -1: in a set of few batches.

        All bad places of the batch are gone through in order, those of other parts too, so that
        every part agrees on who takes what, and no row is taken twice.
        """
        rows = self.plan.rows(step).tolist()
        bad = [(p, row) for p, row in enumerate(rows) if self.reader.image(row) is None]
        keyed = {p: self._keyed(row, p, step) for p, row in bad}
        used = {*rows, *keyed.values()}
        free = (r for r in range(self.plan.num_rows) if r not in used and self.reader.image(r))
        waiting = [p for p, row in keyed.items() if row < 0]
        given = dict(zip(waiting, free, strict=False))
        self._check_fraction()
        return given.get(place, -1)

    def _check_fraction(self) -> None:
        num_bad, rows = len(self.reader.bad), self.plan.num_rows
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

    def make(images: list[Pixels], ids: NDArray[np.int64], epoch: int) -> ViewPair:
        sized = views.with_size(config.size_at(epoch, experiment.epochs))
        if isinstance(sized, TwoViews) and experiment.scaling.color_augment_on == "worker":
            return sized.crops(images, ids, epoch)
        return sized(images, ids, epoch)

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
    sizes = tuple(g.num_rows for g in source.row_groups)
    most = int(data.shuffle_gib * GIB / source.row_bytes)
    return BatchPlan(sizes, experiment.batch_size, experiment.seed, min(data.shuffle_rows, most))


def local_batches(
    experiment: Experiment, source: Source, steps: range, rank: int = 0, num_ranks: int = 1
) -> Iterator[Batch]:
    """Yield this rank's batches of `steps`, made in this process: for tests and lone machines."""
    places = partition(experiment.batch_size, rank, num_ranks)
    plan, views = build_plan(experiment, source), view_builder(experiment)
    builder = BatchBuilder(
        source, plan, views, experiment.data, places,
        stop=steps.stop, least_sides=least_sides_of(experiment),
    )  # fmt: skip
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
    return Batch(parts[0].step, a, b, ids, bad, reasons, paths)
