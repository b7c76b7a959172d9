"""Training in the driver's own process, by one rank on CPU: what a study's small trials do.

No process is started and nothing is sent: a trial of seconds would wait for both longer than it
trains. What is computed is what a worker of Ray Train computes, to the last bit at the same number
of threads, and the run's folder is the same: either goes on where the other stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import last_line
from simclr_ray.train.context import SingleRankContext
from simclr_ray.train.failures import end_of_run, will_recur
from simclr_ray.train.health import HealthWatch
from simclr_ray.train.heartbeat import Beat, RanksFailed
from simclr_ray.train.recorder import OnProgress, RunRecorder
from simclr_ray.train.resolve import ResolvedExperiment
from simclr_ray.train.rollback import Rollbacks, kept_by_ray
from simclr_ray.train.tracked import Tracked
from simclr_ray.train.worker import TrainWorker, WorkerInput

# How a resolved run is trained to its end, or until a stop: here, or by workers that Ray starts.
Fit = Callable[[ResolvedExperiment, Tracked, OnProgress | None, HealthWatch, Rollbacks], None]


class _Inbox:
    """Takes what the rank says, in the rank's own thread; what ends the run is raised there."""

    def __init__(self, recorder: RunRecorder) -> None:
        self._recorder = recorder

    def put(self, item: Any) -> None:
        """Take one item."""
        if isinstance(item, Beat):  # from another thread; nobody waits for one
            return
        with self._recorder.ended_by_errors():
            self._recorder.take_all([item])
        if self._recorder.fatal is not None:
            raise self._recorder.fatal


def fit_in_process(
    resolved: ResolvedExperiment,
    tracked: Tracked,
    on_progress: OnProgress | None,
    health: HealthWatch,
    rollbacks: Rollbacks,
) -> None:
    """Train in this process from the newest checkpoint to the end, or until a stop.

    What fails is tried again from there, as often as `scaling.max_failures` says.

    Raises:
        SimclrRayError: What no restart mends, or `on_progress` raised; or it failed too often.
    """
    recorder = RunRecorder(tracked, on_progress, resolved, health)
    worker_input = WorkerInput(resolved, _Inbox(recorder), rollbacks)
    while True:
        context = SingleRankContext(resolved.folder, kept_by_ray(resolved.config))
        worker = TrainWorker(worker_input, context)
        try:
            worker.run()
        except Exception as error:  # noqa: BLE001 - whatever it is: it is tried again, or raised
            _count(recorder, resolved.config, error)
        else:
            recorder.say_bad_rows()
            return
        finally:
            worker.close()


def _count(recorder: RunRecorder, experiment: Experiment, error: Exception) -> None:
    """Note that a rank has failed; raise where that is the end."""
    if recorder.fatal is None:
        cause = f"{type(error).__name__}: {last_line(error)}"  # Ray's errors name theirs themselves
        final = end_of_run(error, cause, experiment.scaling.max_failures)
        recorder.take(final or RanksFailed({"rank 0": cause}, will_recur(error)))
    if recorder.fatal is not None:
        raise recorder.fatal from error
