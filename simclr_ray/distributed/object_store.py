"""Ray's object store, through which views travel: how much a run has in it, and where it fits.

Each decode actor hands over tables of some steps, and Ray keeps a few of each in the store of a
node. What does not fit there Ray writes to disk and reads again, every batch of it, for as long as
the run lasts.
"""

from __future__ import annotations

import math
from typing import Final

from simclr_ray.config.experiment import Experiment
from simclr_ray.config.wording import GIB, counted
from simclr_ray.distributed.machine import SHARED, free_shared_memory, machine_memory
from simclr_ray.distributed.ray_address import names_cluster

# What an actor hands over at once: so many bytes of views, or one step where that is larger.
HAND_OVER_BYTES: Final = 16 * 2**20
# Of each actor's in the store at a time, measured (Ray 2.60): three that are not taken yet, and the
# one whose steps are.
TABLES: Final = 4
# Ray begins to spill at 0.8 of a store: measured, four actors with 248 MiB in all spilled at 310
# MiB, and did not at 372 and 390.
FILLED_FRACTION: Final = 2 / 3
LEAST_BYTES: Final = 2**30  # of a store that is started here
MEMORY_FRACTION: Final = 0.3  # Ray's own default
SHM_FRACTION: Final = 0.95  # of what is free there; a larger store Ray puts on disk, or refuses
ADVICE: Final = (
    "more of /dev/shm (docker run --shm-size), a larger `ray start --object-store-memory`, a "
    "smaller batch_size, or more nodes that decode"
)


def num_decode_actors(experiment: Experiment) -> int:
    """Return the decode actors of a run with its most workers."""
    workers, batch_size = experiment.scaling.max_workers, experiment.batch_size
    of_worker = min(experiment.scaling.data_actors_per_worker, max(1, batch_size // workers))
    return workers * of_worker


def table_bytes(experiment: Experiment, hand_over: int = HAND_OVER_BYTES) -> int:
    """Return the most bytes of views that a decode actor hands over at once."""
    size, channels = experiment.augment.size, experiment.data.channels
    least, more = divmod(experiment.batch_size, num_decode_actors(experiment))
    steps = [2 * channels * images * size**2 for images in (least, least + bool(more)) if images]
    return max(max(1, hand_over // step) * step for step in steps)


def store_bytes(experiment: Experiment, actors: int, hand_over: int = HAND_OVER_BYTES) -> int:
    """Return how large a store has to be for what so many of a run's decode actors hand over."""
    return math.ceil(actors * TABLES * table_bytes(experiment, hand_over) / FILLED_FRACTION)


def local_store_bytes(experiment: Experiment | None, copies: int = 1) -> int:
    """Return the size of a store that is started here, for `copies` of a run side by side.

    As much as they need, at most what memory and /dev/shm have room for, and never less than
    `LEAST_BYTES`.
    """
    if experiment is None:
        return LEAST_BYTES
    needed = copies * store_bytes(experiment, num_decode_actors(experiment))
    shared = free_shared_memory()
    room = [] if shared is None else [int(SHM_FRACTION * shared)]
    return max(LEAST_BYTES, min([needed, int(MEMORY_FRACTION * machine_memory()), *room]))


def store_line(experiment: Experiment) -> str:
    """Return what a run has in Ray's object store, and whether that fits this machine.

    Args:
        experiment: Of the run.

    Returns:
        A line; empty where the usual size is enough.
    """
    actors = num_decode_actors(experiment)
    needed = store_bytes(experiment, actors)
    if needed <= LEAST_BYTES:
        return ""
    line = f"{needed / GIB:.1f} GiB for the views of {counted(actors, 'decode actor')}"
    if names_cluster():
        return f"{line}, on all nodes together; `doctor --cluster` compares it with what they have"
    here, shared = local_store_bytes(experiment), free_shared_memory()
    if shared is not None and shared < here:
        there = f"{SHARED} has {shared / GIB:.1f} free"
        return f"{line}; {there}, so that Ray keeps them on disk: {ADVICE}"
    if here >= needed:
        return f"{line}, in /dev/shm"
    there = f"this machine has room for {here / GIB:.1f}"
    if here < store_bytes(experiment, actors, hand_over=0):
        return f"{line}; {there}, so that Ray writes each batch to disk: {ADVICE}"
    return f"{line}; {there}: fewer steps are handed over at once"
