"""How long a run will take on this machine, by steps that are timed in this process."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from simclr_ray.config.experiment import Experiment
from simclr_ray.config.wording import clock, counted
from simclr_ray.distributed.machine import cores, machine_memory
from simclr_ray.distributed.ray_address import names_cluster
from simclr_ray.errors import RunError, one_line
from simclr_ray.evaluation.cost import ENCODED, OnlineSeconds, online_seconds
from simclr_ray.storage.run_status import newest_whole_step
from simclr_ray.train.dry_run import step_memory
from simclr_ray.train.resolve import ResolvedExperiment
from simclr_ray.train.step_seconds import (
    AT_SIDE,
    MOST_IMAGES,
    NEVER,
    STEPS_S,
    StepSeconds,
    step_seconds,
)
from simclr_ray.train.worker import threads_of

FROZEN: Final = "not measured: a frozen encoder passes the images once, and no step is trained"
NO_GPU: Final = (
    "not measured: workers take GPUs, and PyTorch sees none here; ask on a machine that has one"
)
MEMORY_FRACTION: Final = 0.5  # of this machine's, for the steps that are timed
TIMES: Final = {1.0: "as fast as one", 2.0: "twice as fast"}


class RunSeconds(NamedTuple):
    """What a run takes.

    Attributes:
        training: All steps that are left.
        evaluation: While it trains.
    """

    training: float
    evaluation: float


def time_rows(resolved: ResolvedExperiment, *, is_anew: bool = False) -> dict[str, str]:
    """Return how long a run will take, and by what, as name -> text; steps are timed for it.

    Args:
        resolved: The run.
        is_anew: It is to begin again, whatever its checkpoints hold.

    Raises:
        DataError: The images cannot be read.
        DivergedError: A loss is not finite, as in code of the user's own.
        RunError: A step does not fit into memory.
    """
    config = resolved.config
    if obstacle := untimed(config):
        return {"time": obstacle}
    try:
        timed = step_seconds(resolved, images_that_fit(config))
        image_s = timed.image_s(config.scaling)
        most = int(min(ENCODED, 2 * STEPS_S / image_s))
        evaluated = online_seconds(config, resolved.source, timed.model, most)
    except (torch.OutOfMemoryError, MemoryError) as error:
        problem = f"a step of this model does not fit into memory: {one_line(error)}"
        raise RunError(f"{problem}; a smaller encoder or augment.size is needed") from error
    done = 0 if is_anew else newest_whole_step(resolved.folder)
    seconds = run_seconds(resolved, timed, evaluated, done)
    bound = "at most " if getattr(config.augment, "start_size", 0) else ""
    from_step = f" from step {done:,} on" if done else ""
    return {
        "time": f"{bound}{clock(seconds.training + seconds.evaluation)}{from_step}, "
        f"{clock(seconds.evaluation)} of it evaluation; the start and the scores at the end come "
        "on top",
        "measured": f"{1 / image_s:,.{0 if image_s < 0.1 else 2}f} images/s here by one worker, in "
        f"{counted(timed.steps, 'step')} of {timed.images:,} images, as busy as this machine is"
        f"{_of_workers(config)}",
    }


def untimed(experiment: Experiment) -> str:
    """Return why no step of an experiment can be timed here; empty: it can."""
    if experiment.init.freeze:
        return FROZEN
    if experiment.scaling.gpus_per_worker and not torch.cuda.is_available():
        return NO_GPU
    return ""


def run_seconds(
    resolved: ResolvedExperiment, timed: StepSeconds, evaluated: OnlineSeconds, done: int = 0
) -> RunSeconds:
    """Return what the steps that are left of a run take with the most workers.

    Args:
        resolved: The run.
        timed: Of one worker, for an image.
        evaluated: What an evaluation takes of one worker.
        done: Steps that its newest checkpoint holds.
    """
    config, total = resolved.config, resolved.total_steps
    times = speedup(config)
    every, epochs = config.evaluation.every_epochs, config.epochs
    begun = done // resolved.steps_per_epoch
    evaluations = -(-epochs // every) - begun // every if every and done < total else 0
    evaluation = evaluations * evaluated.epoch + (0.0 if done else evaluated.start)
    image_s = timed.image_s(config.scaling)
    training = (total - done) * config.batch_size * image_s
    if done < total:  # a run that goes on decodes anew what is kept
        decoding = timed.image_s(config.scaling, decodes=True) - image_s
        training += resolved.source.num_rows * decoding
    return RunSeconds(training / times, evaluation / times)


def speedup(experiment: Experiment) -> float:
    """Return how many times as fast as one the most workers are taken to be.

    On CPUs of this machine no faster than its cores, on shared GPUs no faster than those.
    """
    scaling = experiment.scaling
    workers = scaling.max_workers
    if scaling.gpus_per_worker:
        return workers * min(1.0, scaling.gpus_per_worker)
    if names_cluster():
        return float(workers)
    return max(1.0, min(workers, cores() / threads_of(experiment)))


def images_that_fit(experiment: Experiment) -> int:
    """Return the images of a timed step at most: what takes seconds, and fits half of the memory.

    On CPUs fewer tell as much; of a batch in groups only one group's activations are kept.
    """
    memory = step_memory(experiment)
    if experiment.scaling.gpus_per_worker:
        whole, most = torch.cuda.get_device_properties(0).total_memory, NEVER
    else:
        by_side = max(1.0, (AT_SIDE / experiment.augment.size) ** 2)
        whole, most = machine_memory(), int(MOST_IMAGES["cpu"] / 4 * by_side)
    room = max(0.0, MEMORY_FRACTION * whole - memory.weights - memory.loss)
    fitting = int(room / max(1, memory.activations // max(1, memory.images)))
    return max(2, min(most, fitting * min(2, experiment.num_groups)))


def _of_workers(experiment: Experiment) -> str:
    """Return what is assumed of several workers; nothing of one."""
    scaling = experiment.scaling
    workers, times = scaling.max_workers, speedup(experiment)
    if workers == 1:
        return ""
    fast = TIMES.get(times, f"{times:g} times as fast")
    where = " on machines like this" if names_cluster() else ""
    fewer = "; fewer take longer" if scaling.is_elastic else ""
    return f"; {workers} workers{where} are taken to be {fast}{fewer}"
