"""The two-view stream: Ray Data processes the batch plan, not the rows of the files.

Step numbers -> one actor that makes its part of each step -> batches in order. One execution
serves the whole run; a resume starts at a later step. A pipeline has a pool
of exactly one actor, since Ray Data hands blocks to any free actor of a pool and two actors would
then both read everything; a rank with several actors opens several pipelines and joins them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray.data
import torch
from numpy.typing import NDArray

from simclr_ray.allocator import keep_freed_memory
from simclr_ray.data.maker import PartMaker, join, plan_of, view_maker
from simclr_ray.data.source import Source
from simclr_ray.dist import share
from simclr_ray.errors import DataError, TooManyBadImages
from simclr_ray.experiment import Experiment
from simclr_ray.loop import Batch

# Measured (Ray 2.60): many more blocks delay the first batch by minutes on long runs.
MAX_BLOCKS = 64
BLOCK_BYTES = 4 * 2**20
MAX_STEPS_PER_CALL = 8
LOOP_PAUSE_S = (0.005, 0.25)  # least and most
REASON_BYTES = 2048  # of a part of a step; what is beyond is counted and not named
T = TypeVar("T")
NO_ID = np.iinfo(np.int64).min
FAILED = -1  # in place of a step: the part holds an error


class _Actor:
    """A Ray Data actor around a `PartMaker`."""

    def __init__(
        self, experiment: Experiment, source: Source, places: tuple[int, int], stop: int
    ) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        plan, views = plan_of(experiment, source), view_maker(experiment)
        self.maker = PartMaker(source, plan, views, experiment.data, places, stop=stop)

    def __call__(self, rows: dict[str, Any]) -> Iterator[dict[str, Any]]:
        try:
            batches = [self.maker.make(int(step)) for step in rows["step"]]
        except DataError as error:
            yield self._failed(error, len(rows["step"]))
            return
        for _, alike in groupby(batches, lambda batch: batch.a.shape):  # views may grow in between
            yield self._packed(list(alike))

    def _packed(self, batches: list[Batch]) -> dict[str, Any]:
        n = len(batches[0].ids)
        bad = np.full((len(batches), n), NO_ID, np.int64)  # a column needs one width
        for row, batch in zip(bad, batches, strict=True):
            row[: len(batch.bad)] = batch.bad.numpy()
        return {
            "step": np.array([b.step for b in batches]),
            "a": np.stack([b.a.numpy() for b in batches]),
            "b": np.stack([b.b.numpy() for b in batches]),
            "ids": np.stack([b.ids.numpy() for b in batches]),
            "bad": bad,
            "reasons": np.stack([_as_bytes(b.reasons) for b in batches]),
        }

    def _failed(self, error: DataError, count: int) -> dict[str, Any]:
        """Return an error as data: one that is raised here loses its type on the way."""
        first, last = self.maker.places
        nothing = np.zeros((count, last - first, 3, 1, 1), np.uint8)
        ids = np.full((count, last - first), NO_ID, np.int64)
        text = _as_bytes((type(error).__name__, " ".join(str(error).split())))
        return {
            "step": np.full(count, FAILED),
            "a": nothing,
            "b": nothing,
            "ids": ids,
            "bad": ids,
            "reasons": np.stack([text] * count),
        }


def stream(
    experiment: Experiment, source: Source, steps: range, rank: int, num_ranks: int
) -> Iterator[Batch]:
    """Yield this rank's batches of `steps`, in order, through Ray Data.

    Args:
        experiment: Views, batch and scaling.
        source: The dataset.
        steps: Global steps, consecutive.
        rank: This worker's rank.
        num_ranks: R.
    """
    if not steps:
        return
    _set_context()
    first, last = share(experiment.batch_size, rank, num_ranks)
    actors = min(experiment.scaling.data_actors_per_worker, last - first)
    # shares of the global batch, so that they are cut where lanes are cut
    parts = [
        share(experiment.batch_size, rank * actors + index, num_ranks * actors)
        for index in range(actors)
    ]
    pipelines = [_pipeline(experiment, source, steps, places) for places in parts]
    for made in zip(*pipelines, strict=True):
        yield join(list(made))


def _pipeline(
    experiment: Experiment, source: Source, steps: range, places: tuple[int, int]
) -> Iterator[Batch]:
    scaling = experiment.scaling
    step_bytes = (places[1] - places[0]) * 2 * 3 * experiment.augment.size**2
    per_call = max(1, min(MAX_STEPS_PER_CALL, BLOCK_BYTES // step_bytes))
    resources = {scaling.data_resource: 0.001} if scaling.data_resource else {}
    # The step numbers themselves, as blocks: `ray.data.range` would make them in tasks that each
    # wait for a whole CPU, which workers and actors may have taken.
    numbers = np.array_split(np.arange(steps.start, steps.stop), min(MAX_BLOCKS, len(steps)))
    dataset = ray.data.from_blocks([pa.table({"step": part}) for part in numbers]).map_batches(
        _Actor,
        fn_constructor_args=(experiment, source, places, steps.stop),
        batch_size=per_call,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=scaling.cpus_per_data_actor,
        resources=resources,
    )
    items = dataset.iter_torch_batches(batch_size=1, prefetch_batches=4, device="cpu")
    for item in _Pace.observed(iter(items)):
        step, bad = int(item["step"]), item["bad"][0]
        if step == FAILED:
            name, message = _as_reasons(item["reasons"][0].numpy(), 2)
            raise TooManyBadImages(message) if name == "TooManyBadImages" else DataError(message)
        bad = bad[bad != NO_ID]
        reasons = _as_reasons(item["reasons"][0].numpy(), len(bad))
        a, b, ids = (item[name][0] for name in ("a", "b", "ids"))
        yield Batch(step, a, b, ids, bad, reasons)


def _as_bytes(reasons: tuple[str, ...]) -> NDArray[np.uint8]:
    """Return reasons as one row of bytes: a tensor column has no text, and needs one width."""
    text = "\n".join(reasons).encode()[:REASON_BYTES]
    return np.frombuffer(text.ljust(REASON_BYTES, b"\0"), np.uint8)


def _as_reasons(row: NDArray[np.uint8], count: int) -> tuple[str, ...]:
    """Return `count` reasons; those that did not fit are empty."""
    found = row.tobytes().rstrip(b"\0").decode(errors="replace").split("\n")
    return tuple((found + [""] * count)[:count])


class _Pace:
    """Makes Ray Data's scheduling loop pause in each round; the four methods are its protocol.

    While the consumer is slower than the actors, `ray.wait` has something ready that back-pressure
    forbids to take, and the loop spins in a thread of the training process. Measured (Ray 2.60, two
    workers on two cores): 150 images/s with the spinning, 350 with a pause of 20 ms. A round is
    some milliseconds of Python, in which neither rank's global batch norm gets on: so it pauses
    for half a step while batches are there in time, and hardly where the consumer waits.
    """

    pause_s = LOOP_PAUSE_S[0]

    @classmethod
    def observed(cls, items: Iterator[T]) -> Iterator[T]:
        """Yield the items, setting the pause by how they are asked for and how long they take."""
        left = time.perf_counter()
        while True:
            asked = time.perf_counter()
            item = next(items, None)
            now = time.perf_counter()
            least, most = LOOP_PAUSE_S
            in_time = now - asked < least
            cls.pause_s = min(max((asked - left) / 2, least), most) if in_time else least
            if item is None:
                return
            left = now
            yield item

    def before_execution_starts(self, executor: object) -> None:
        """Do nothing."""

    def on_execution_step(self, executor: object) -> None:  # noqa: ARG002 - the protocol's
        """Give the interpreter lock back for a while."""
        time.sleep(self.pause_s)

    def after_execution_succeeds(self, executor: object) -> None:
        """Do nothing."""

    def after_execution_fails(self, executor: object, error: Exception) -> None:
        """Do nothing."""


def _set_context() -> None:
    context = ray.data.DataContext.get_current()
    callbacks: list[Any] = context.custom_execution_callback_classes
    if _Pace not in callbacks:
        callbacks.append(_Pace)
    context.execution_options.preserve_order = True
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    context.print_on_execution_start = False
