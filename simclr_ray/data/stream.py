"""The two-view stream: Ray Data processes the batch plan, not the rows of the files.

Step numbers -> one actor that makes its part of each step -> batches in order. One execution
serves the whole run; a resume starts at a later step. A pipeline has a pool
of exactly one actor, since Ray Data hands blocks to any free actor of a pool and two actors would
then both read everything; a rank with several actors opens several pipelines and joins them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray.data
import torch
from numpy.typing import NDArray

from simclr_ray.config.experiment import Experiment
from simclr_ray.config.logging import name_process
from simclr_ray.data.ahead import BATCHES_AHEAD, ahead
from simclr_ray.data.batch import Batch
from simclr_ray.data.batches import (
    BatchBuilder,
    BatchPart,
    build_plan,
    join,
    least_sides_of,
    view_builder,
)
from simclr_ray.data.bytes_read import BYTES_READ
from simclr_ray.data.decoding import check_decoder
from simclr_ray.data.source import Source
from simclr_ray.distributed.collectives import partition
from simclr_ray.distributed.malloc import keep_freed_memory
from simclr_ray.distributed.object_store import HAND_OVER_BYTES
from simclr_ray.distributed.placement import hand_over_bytes, staying_nodes
from simclr_ray.distributed.ray_metrics import RunMetrics
from simclr_ray.distributed.worker_exit import skip_destructors
from simclr_ray.errors import DataError, TooManyBadImages

# Blocks of step numbers, each a task of the actor. Measured (Ray 2.60): many more delay the first
# batch by minutes on long runs; between two tasks the actor waits some 0.05 s; an actor that is
# restarted makes the steps of its block again.
MAX_BLOCKS, STEPS_PER_BLOCK = 64, 1000
# What an actor makes in one call, as what it hands over at once (`HAND_OVER_BYTES`): steps of so
# many bytes of views, or of encoded images, whichever are fewer. A call and a hand-over each cost
# some milliseconds whatever they hold; what is decoded in a call is in memory together; and what
# waits in the actor is not there for the next step.
CALL_BYTES = 4 * 2**20
LOOP_PAUSE_S = (0.01, 0.25)  # least and most
T = TypeVar("T")
COLUMNS = ("about", "ids", "pixels")


class _Actor:
    """A Ray Data actor around a `BatchBuilder`."""

    def __init__(
        self, experiment: Experiment, source: Source, places: tuple[int, int], stop: int,
        metrics: RunMetrics | None = None, *, hand_over: int = HAND_OVER_BYTES,
    ) -> None:  # fmt: skip
        skip_destructors()
        torch.set_num_threads(1)
        keep_freed_memory()
        self.data, self.metrics, self.hand_over = experiment.data, metrics, hand_over
        if metrics is not None:
            name_process(metrics.run, metrics.rank)
        plan, views = build_plan(experiment, source), view_builder(experiment)
        self.builder = BatchBuilder(
            source, plan, views, experiment.data, places,
            stop=stop, least_sides=least_sides_of(experiment),
        )  # fmt: skip
        num = places[1] - places[0]
        views_bytes = 2 * experiment.data.channels * num * experiment.augment.size**2
        images = num * (2 if source.num_groups else 1)
        self.step_bytes = max(views_bytes, int(images * source.row_bytes))

    def __call__(self, rows: dict[str, Any]) -> Iterator[pa.Table]:
        """Yield the part of each step, some steps at a time.

        Which ones depends on their numbers alone: if the actor dies, Ray makes the block again in
        another, and leaves out as many tables as have been taken.
        """
        made: list[Batch] = []
        in_a_call = max(1, CALL_BYTES // self.step_bytes)
        try:
            check_decoder(self.data)
            for steps in self._handed_over(rows["step"].tolist()):
                for at in range(0, len(steps), in_a_call):
                    self._make(steps[at : at + in_a_call], made)
                yield _packed(made)
                made = []
                if self.metrics is not None:
                    self.metrics.add("simclr_read_bytes_total", BYTES_READ.take())
        except DataError as error:
            if made:
                yield _packed(made)
            yield _failed(error)

    def _make(self, steps: list[int], made: list[Batch]) -> None:
        """Add these steps to `made`: where one fails, those before it, and raise its error."""
        try:
            made += self.builder.build(steps)
        except DataError:
            for step in steps:
                made.append(self.builder.make(step))

    def _handed_over(self, steps: list[int]) -> Iterator[list[int]]:
        """Yield the steps that are handed over together.

        From the first of the block and of an epoch on they double until they have enough bytes, so
        that nobody waits for those after it; an epoch's last one ends a group: an evaluation waits
        for it.
        """
        most = max(1, self.hand_over // self.step_bytes)
        per_epoch = self.builder.plan.steps_per_epoch
        group: list[int] = []
        size = 1
        for step in steps:
            if step % per_epoch == 0:
                size = 1
            group.append(step)
            if len(group) == size or step % per_epoch == per_epoch - 1:
                yield group
                group, size = [], min(2 * size, most)
        if group:
            yield group


def stream(
    experiment: Experiment, source: Source, steps: range, rank: int, num_ranks: int, run: str = ""
) -> Iterator[Batch]:
    """Yield this rank's batches of `steps`, in order, through Ray Data.

    Args:
        experiment: Views, batch and scaling.
        source: The dataset.
        steps: Global steps, consecutive.
        rank: This worker's rank.
        num_ranks: R.
        run: Name of the run, for which the bytes read are exported; empty: for none.

    Raises:
        DataError: A file cannot be read, or no row is left to stand in for a bad one.
        TooManyBadImages: More rows than allowed cannot be used.
        RuntimeError: Ray Data lost or repeated a step, as it might where an actor died; a restart
            from the checkpoint mends it.
    """
    if not steps:
        return
    # Read when Ray Data is first used. With the thread, what it fetched is passed on when the next
    # block comes, or after 0.1 s.
    os.environ.setdefault("RAY_DATA_METADATA_PREFETCH_ON_THREAD", "0")
    first, last = partition(experiment.batch_size, rank, num_ranks)
    actors = min(experiment.scaling.data_actors_per_worker, last - first)
    # shares of the global batch, so that they are cut where lanes are cut
    places = [
        partition(experiment.batch_size, rank * actors + index, num_ranks * actors)
        for index in range(actors)
    ]
    metrics = RunMetrics(run, rank) if run else None
    hand_over = hand_over_bytes(experiment, staying_nodes())
    pipelines = [
        _pipeline(experiment, source, steps, part, metrics, hand_over=hand_over) for part in places
    ]
    yield from _Pace.observed(ahead(_joined(pipelines), BATCHES_AHEAD))


def _joined(pipelines: list[Iterator[BatchPart]]) -> Iterator[Batch]:
    yield _first(pipelines)
    for parts in zip(*pipelines, strict=True):
        yield join(parts)


def _first(pipelines: list[Iterator[BatchPart]]) -> Batch:
    """Return the first step; it keeps nothing that would hold Ray's memory for the whole run."""
    with ThreadPoolExecutor(len(pipelines)) as pool:  # else each waits for the other's actor
        return join(list(pool.map(next, pipelines)))


def _pipeline(
    experiment: Experiment, source: Source, steps: range, places: tuple[int, int],
    metrics: RunMetrics | None, *, hand_over: int,
) -> Iterator[BatchPart]:  # fmt: skip
    scaling = experiment.scaling
    # The step numbers themselves, as blocks: `ray.data.range` would make them in tasks that each
    # wait for a whole CPU, which workers and actors may have taken.
    blocks = min(MAX_BLOCKS, -(-len(steps) // STEPS_PER_BLOCK))
    numbers = np.array_split(np.arange(steps.start, steps.stop), blocks)
    planned = ray.data.from_blocks([pa.table({"step": part}) for part in numbers])
    _configure(planned.context)
    dataset = planned.map_batches(
        _Actor,
        fn_constructor_args=(experiment, source, places, steps.stop, metrics),
        fn_constructor_kwargs={"hand_over": hand_over},
        batch_size=None,
        # With a second task waiting at the actor, Ray Data's loop waits 0.1 s for both in each of
        # its rounds, and takes two blocks at most: measured, 68 steps a second at any speed.
        compute=ray.data.ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=1),
        num_cpus=scaling.cpus_per_data_actor,
        label_selector=scaling.data_label_selector,
    )
    # Ray Data passes a block on when so many others have come after it: those of an epoch's end
    # would wait for the next epoch's. `ahead` overlaps what prefetching would.
    tables = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    expected = steps.start
    for table in tables:
        for part in _unpacked(table):
            if part.step != expected:
                raise RuntimeError(f"the stream gave step {part.step} for {expected}")
            expected += 1
            yield part
    if expected != steps.stop:
        raise RuntimeError(f"the stream ended before step {expected} of {steps.stop}")


def _packed(batches: list[Batch]) -> pa.Table:
    """Return parts of consecutive steps as a table of one row.

    Bytes in one piece, and one row a hand-over: Ray Data's own columns for tensors cost it ten
    times the work, and it groups rows by their size, so that some would wait for others.
    """
    about = {
        "steps": [b.step for b in batches],
        "shapes": [b.a.shape[1:] for b in batches],
        "bad": [b.bad.tolist() for b in batches],
        "reasons": [b.reasons for b in batches],
        "paths": [b.paths for b in batches],
        "paired": batches[0].ids_b is not None,
    }
    # of each batch its ids, and then those of view b where they are others
    columns = [ids for b in batches for ids in (b.ids, b.ids_b) if ids is not None]
    ids = np.concatenate([column.numpy() for column in columns])
    pixels = np.concatenate([view.numpy().ravel() for b in batches for view in (b.a, b.b)])
    return _row(about, ids, pixels)


def _failed(error: DataError) -> pa.Table:
    """Return an error as data: one that is raised in an actor loses its type on the way."""
    nothing = np.empty(0, np.uint8)
    return _row({"error": type(error).__name__, "message": str(error)}, nothing, nothing)


def _row(about: dict[str, Any], *columns: NDArray[Any]) -> pa.Table:
    values = [np.frombuffer(json.dumps(about).encode(), np.uint8), *columns]
    arrays = [
        pa.Array.from_buffers(
            pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, v.nbytes])), pa.py_buffer(v)]
        )
        for v in values
    ]
    return pa.table(dict(zip(COLUMNS, arrays, strict=True)))


def _unpacked(table: pa.Table) -> Iterator[BatchPart]:
    """Yield the parts in a table; their arrays lie in Ray's memory."""
    about, ids, pixels = (_value(table[name].chunk(0)) for name in COLUMNS)
    header = json.loads(about.tobytes())
    if "error" in header:
        kind = TooManyBadImages if header["error"] == "TooManyBadImages" else DataError
        raise kind(header["message"])
    numbers = ids.view(np.int64).reshape(len(header["steps"]), -1)
    rest = pixels
    columns = (header[name] for name in ("steps", "shapes", "bad", "reasons", "paths"))
    for row, step, shape_of_view, bad, *texts in zip(numbers, *columns, strict=True):
        images = len(row) // 2 if header["paired"] else len(row)
        ids_b = row[images:] if header["paired"] else None
        shape = (images, *shape_of_view)
        num = int(np.prod(shape))
        a, b, rest = rest[:num], rest[num : 2 * num], rest[2 * num :]
        unusable = np.array(bad, np.int64)
        reasons, paths = map(tuple, texts)
        views = a.reshape(shape), b.reshape(shape)
        yield BatchPart(step, *views, row[:images], unusable, reasons, paths, ids_b)


def _value(column: pa.Array) -> NDArray[np.uint8]:
    """Return the bytes of a column of one row, where they lie: a scalar of it would be a copy."""
    _, ends, content = column.buffers()
    begin, end = np.frombuffer(ends, np.int64, 2, 8 * column.offset).tolist()
    return np.frombuffer(content, np.uint8, end - begin, begin)


class _Pace:
    """Makes Ray Data's scheduling loop pause in each round; the four methods are its protocol.

    And forget what it keeps of each block for a summary that nobody reads: measured (Ray 2.60), 1.5
    kB a block in the training process, gigabytes in a week of steps that are handed over alone.

    While the consumer is slower than the actors, `ray.wait` has something ready that back-pressure
    forbids to take, and the loop spins in a thread of the training process. Measured (Ray 2.60, two
    workers on two cores): 150 images/s with the spinning, 350 with a pause of 20 ms. A round is
    some milliseconds of Python, in which neither rank's global batch norm gets on: so it pauses
    for half a step while batches are there in time, and hardly where the consumer waits. Ray Data
    has no option for it. On another Ray it does no harm but costs pauses that may not be needed
    any more: measure again (`benchmarks/stream.py`, with and without), then enter the version.
    """

    MEASURED_ON = ("2.60",)  # of Ray
    pause_s = LOOP_PAUSE_S[0]

    @classmethod
    def observed(cls, items: Iterator[T]) -> Iterator[T]:
        """Yield the items, setting the pause by how they are asked for and how long they take."""
        left = time.perf_counter()
        while True:
            requested_at = time.perf_counter()
            item = next(items, None)
            now = time.perf_counter()
            least, most = LOOP_PAUSE_S
            in_time = now - requested_at < least
            cls.pause_s = min(max((requested_at - left) / 2, least), most) if in_time else least
            if item is None:
                return
            left = now
            yield item

    def before_execution_starts(self, executor: object) -> None:
        """Do nothing."""

    def on_execution_step(self, executor: object) -> None:
        """Give the interpreter lock back for a while."""
        for operator in getattr(executor, "_topology", None) or ():
            stats = getattr(operator, "_output_blocks_stats", None)
            if isinstance(stats, list):
                stats.clear()
        time.sleep(self.pause_s)

    def after_execution_succeeds(self, executor: object) -> None:
        """Do nothing."""

    def after_execution_fails(self, executor: object, error: Exception) -> None:
        """Do nothing."""


def _configure(context: ray.data.DataContext) -> None:
    """Set how Ray Data runs a pipeline, in that pipeline's own context."""
    callbacks: list[Any] | None = getattr(context, "custom_execution_callback_classes", None)
    if callbacks is not None and _Pace not in callbacks:  # a Ray without them is not paced
        callbacks.append(_Pace)
    context.execution_options.preserve_order = True
    context.target_max_block_size = 1  # a block for each row: nothing waits for more to come
    context.memory_usage_poll_interval_s = None  # a thread in the actor that nobody asks
    context.enable_progress_bars = False
    context.print_on_execution_start = False
