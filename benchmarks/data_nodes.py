"""How many data nodes keep GPUs busy, simulated: actors whose times vary, and a short queue.

As `data.stream` does it: each actor makes its part of every step, a step is there when the slowest
part is, and `BATCHES_AHEAD` steps may wait. All GPUs of a run wait for one another, so the actors
are those of all ranks. What Ray Data lets an actor make beyond that queue is left out: it helps
against short stalls, so that the figures are on the safe side.
"""

from __future__ import annotations

import json
from typing import Any, Final

import numpy as np

from benchmarks.record import RESULTS
from simclr_ray.data.ahead import BATCHES_AHEAD

CAPACITIES: Final = (0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 2.0, 3.0)  # made, of what the GPUs take
ACTORS: Final = (16, 256)  # of a run: 4 and 32 workers' in the shipped presets
VARIATIONS: Final = {"steady": 0.2, "unsteady": 1.0}  # standard deviation of a time, of its mean
STEPS: Final = 5_000


def data_nodes() -> dict[str, Any]:
    """Return how busy GPUs are by what data nodes can make of what they take."""
    rows = [
        {"capacity": capacity, "actors": actors}
        | {
            f"busy_{name}": round(busy_fraction(capacity, variation, actors=actors), 3)
            for name, variation in VARIATIONS.items()
        }
        for actors in ACTORS
        for capacity in CAPACITIES
    ]
    return {"images_per_s_of_a_core": round(core_rate()), "rows": rows}


def core_rate() -> float:
    """Return the images whose two views at 224 px one core makes in a second, as measured."""
    measured = json.loads((RESULTS / "views_224.json").read_text())
    return float(measured["images_per_s"]["encoded"]["simclr_ray"] / measured["threads"])


def busy_fraction(
    capacity: float,
    variation: float,
    *,
    actors: int,
    steps: int = STEPS,
    ahead: int = BATCHES_AHEAD,
) -> float:
    """Return the part of the time that the GPUs compute, where each step has a part of every actor.

    An actor takes a time of gamma distribution for its part, and begins one when the step that is
    `ahead` before it was taken. The GPUs compute a step in a time of 1.

    Args:
        capacity: Of an actor: its parts in that time.
        variation: Standard deviation of an actor's time, of its mean.
        actors: Of all ranks.
        steps: Simulated.
        ahead: Steps that wait for the GPUs at most.
    """
    shape = 1 / variation**2
    takes = np.random.default_rng(0).gamma(shape, 1 / capacity / shape, (steps, actors))
    free = np.zeros(actors)  # when an actor has made its last part
    taken = np.zeros(steps)
    gpu = 0.0
    for step in range(steps):
        allowed = taken[step - ahead] if step >= ahead else 0.0
        free = np.maximum(free, allowed) + takes[step]
        taken[step] = max(gpu, free.max())
        gpu = taken[step] + 1.0
    return steps / gpu
