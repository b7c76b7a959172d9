"""Trials under Ray Tune: with `search`, the one door to it.

A Tune trial has one run made and reports the run's epoch ends (`tune_trainable`), so that a
scheduler can compare and end it. Nothing of Tune's own state is needed to go on after a kill.
Trials that have an outcome are not run again; where a scheduler or a search has to see them, they
report once more what is stored, and open trials what their runs have logged. One trial at a time,
that is the order in which it was seen, so that the same is decided; with several at a time a
scheduler's decisions depend on who is quicker, always.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Self

import ray
from ray import tune
from ray.tune.execution import class_cache
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from simclr_ray.config.logging import held_back
from simclr_ray.config.metrics import EPOCH_METRICS
from simclr_ray.distributed.malloc import one_arena
from simclr_ray.errors import TrackingError, last_line
from simclr_ray.studies.concurrency import DRIVER_CPUS, Concurrency
from simclr_ray.studies.definition import Study, point_of
from simclr_ray.studies.folder import FINAL, Curve, StudyFolder, TrialOutcome
from simclr_ray.studies.plan import Trial, make_trials
from simclr_ray.studies.search import (
    EPOCH,
    TrialQueue,
    in_drawn_order,
    optuna_search,
    scheduler_of,
    searched_space,
)
from simclr_ray.studies.trial_runner import Job, outcome_of, store_outcome
from simclr_ray.studies.tune_trainable import ENDED, Ends, report_trial
from simclr_ray.tracking.runs import TrackedRun

log = logging.getLogger(__name__)

WAIT_S = 1.0  # between two looks whether the study is to stop
END_S = 120.0  # for a run to end by itself: it looks whenever it logs
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_RESTORE_RETRY_NUM": "0",
}
OF_ACTORS = {  # of the processes that report trials, and train some
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths of a config are relative to where all processes are
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": str(int(END_S)),  # for a trial that is ended, before the next
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    **one_arena(),
}


def run_trials(
    job: Job, tree: dict[str, Any], trials: Sequence[Trial], concurrency: Concurrency
) -> bool:
    """Run what has no outcome yet; return whether all trials have one now.

    Args:
        job: The study.
        tree: Of its base, as `trials.base_tree` returns it.
        trials: All of the study; of a search, any: it suggests its own.
        concurrency: How many at a time.
    """
    study, folder = job.study, job.folder
    searched = study.search.learns
    compared = searched or study.scheduler.name != "none"
    if study.search.name == "grid" and study.scheduler.name != "none":
        trials = in_drawn_order(study, trials)
    final_names = {o.trial for o in folder.outcomes() if o.status in FINAL}
    todo = {t.name: t for t in trials if compared or t.name not in final_names}
    if not searched and final_names >= set(todo):
        return True

    def trial_of(config: dict[str, Any]) -> Trial:
        if not searched:
            return todo[config["trial"]]
        return make_trials(study, tree, [point_of(study, config)])[0]

    def report(config: dict[str, Any]) -> None:
        report_trial(job, trial_of(config), ends)

    named = _Names(trial_of, is_searched=searched)
    ends = None
    if study.scheduler.name != "none" and not job.in_process:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        ends = ray.remote(num_cpus=0)(Ends).options(scheduling_strategy=here).remote()
    watch = _Driver(study, folder, trial_of, ends)
    queue = None if searched else TrialQueue(concurrency, len(todo))
    names = {"trial": tune.grid_search(list(todo))}
    cpus, restarts = DRIVER_CPUS, 0  # Ray Train's own
    if job.in_process:  # what would be a worker's and its data actor's, and how often it may die
        cpus = concurrency.scaling.num_cpus
        restarts = concurrency.scaling.max_failures
    with _quiet(), nullcontext() if queue is None else queue:
        tune.Tuner(
            tune.with_resources(report, {"CPU": cpus}),
            param_space=searched_space(study) if searched else names,
            tune_config=tune.TuneConfig(
                metric=study.metric if compared else None,
                mode=study.mode if compared else None,
                scheduler=scheduler_of(study, trials),
                search_alg=optuna_search(study) if queue is None else queue,
                num_samples=study.search.trials if searched else 1,
                max_concurrent_trials=concurrency.now if queue is None else None,
                reuse_actors=job.in_process,
                trial_name_creator=named,
                trial_dirname_creator=named,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=folder.uri,
                stop=watch,
                callbacks=[watch],
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=restarts),
            ),
        ).fit()
    if searched:
        return not watch.is_stopping
    return all_ended(folder.outcomes(), todo, is_stopping=watch.is_stopping)


def all_ended(outcomes: Iterable[TrialOutcome], names: Iterable[str], *, is_stopping: bool) -> bool:
    """Return whether trials have outcomes; in a stop those that failed before may be to come."""
    ended = {o.trial for o in outcomes if o.status in FINAL or not is_stopping}
    return ended >= set(names)


class _OfThisProcess:
    """What Tune pickles into its folder, and we never read: there, URIs would have passwords."""

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: object) -> Self:
        return self


class _Names(_OfThisProcess):
    """Names Tune's trials as the study does."""

    def __init__(self, trial_of: Callable[[dict[str, Any]], Trial], *, is_searched: bool) -> None:
        self.trial_of, self.is_searched = trial_of, is_searched

    def __call__(self, trial: Any) -> str:
        """Return the name of a trial; a search may suggest a point twice."""
        name = self.trial_of(trial.config).name
        return f"{name}-{trial.trial_id}" if self.is_searched else name


class _Driver(_OfThisProcess, tune.Callback, tune.Stopper):
    """The study's side of Tune: stops when asked or out of time; stores what Tune has ended."""

    def __init__(
        self,
        study: Study,
        folder: StudyFolder,
        trial_of: Callable[[dict[str, Any]], Trial],
        ends: Any,
    ) -> None:
        self.study, self.folder, self.trial_of, self.ends = study, folder, trial_of, ends
        self.is_stopping = False
        hours = study.budget.hours
        self._ends_at = time.monotonic() + 3600 * hours if hours else math.inf
        self._checked_at = 0.0
        self._reported: dict[str, Curve] = {}  # a remote run's own log may lag behind
        self._started: set[str] = set()  # trials, in this start of the study

    def __call__(self, *_: Any) -> bool:
        """Return whether one trial is to end: that is the scheduler's to say."""
        return False

    def stop_all(self) -> bool:
        """Return whether the study is to stop now."""
        now = time.monotonic()
        if not self.is_stopping and now - self._checked_at > WAIT_S:
            self._checked_at = now
            self.is_stopping = now > self._ends_at or self.folder.stop_requested()
        return self.is_stopping

    def on_trial_start(
        self,
        iteration: int,  # noqa: ARG002 - Tune's
        trials: list[Any],  # noqa: ARG002
        trial: Any,
        **_: Any,
    ) -> None:
        """Remove the outcome of a trial that failed before: it is open again."""
        planned = self.trial_of(trial.config)
        self._started.add(planned.name)
        if not self._is_final(planned):
            self.folder.remove_outcome(planned.name)

    def on_trial_result(
        self,
        iteration: int,  # noqa: ARG002 - Tune's
        trials: list[Any],  # noqa: ARG002
        trial: Any,
        result: dict[str, Any],
        **_: Any,
    ) -> None:
        """Remember what a trial has reported."""
        values = {key: float(result[key]) for key in EPOCH_METRICS if key in result}
        curve = self._reported.setdefault(self.trial_of(trial.config).name, {})
        curve[int(result[EPOCH])] = values

    def on_trial_complete(
        self,
        iteration: int,  # noqa: ARG002 - Tune's
        trials: list[Any],  # noqa: ARG002
        trial: Any,
        **_: Any,
    ) -> None:
        """Store the outcome of a trial that the scheduler ends, and have its run end.

        Tune would kill it. A run of Ray Train that is killed while its cluster goes on can keep its
        CPUs and GPUs for good; one that ends by itself gives them back.
        """
        planned = self.trial_of(trial.config)
        if self.is_stopping or ENDED in trial.last_result or self._is_final(planned):
            return
        epoch = int(trial.last_result[EPOCH])
        reason = f"{self.study.scheduler.name}: others were better at epoch {epoch}"
        run = self.folder.run_of(planned.name)
        outcome = outcome_of(
            planned, run, "stopped", reason=reason, curve=self._reported[planned.name]
        )
        store_outcome(outcome, self.study.name, self.folder)
        self._end(planned)
        with suppress(TrackingError):  # the study ends what is left running
            tracked = TrackedRun.attach(outcome.run["tracking_uri"], outcome.run["mlflow_run_id"])
            tracked.finish("KILLED")

    def on_trial_error(
        self,
        iteration: int,  # noqa: ARG002 - Tune's
        trials: list[Any],  # noqa: ARG002
        trial: Any,
        **_: Any,
    ) -> None:
        """Store the outcome of a trial that died without one: a lost node, no memory."""
        planned = self.trial_of(trial.config)
        if self.is_stopping or self._is_final(planned):
            return
        # of one that has not even started the outcome is that of an earlier start of the study
        if planned.name in self._started and self.folder.outcome(planned.name) is not None:
            return
        text = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
        reason = last_line(text.strip() or "its process died")
        run = self.folder.run_of(planned.name)
        store_outcome(
            outcome_of(planned, run, "failed", reason=reason), self.study.name, self.folder
        )

    def _end(self, trial: Trial) -> None:
        """Have a trial's run end, if there is one; wait until it has."""
        if self.ends is None:
            return
        deadline = time.monotonic() + END_S
        ray.get(self.ends.request.remote(trial.name))
        while ray.get(self.ends.is_running.remote(trial.name)):
            if time.monotonic() > deadline:
                log.warning("%s does not end by itself and is killed", trial.name)
                return
            time.sleep(0.1)

    def _is_final(self, trial: Trial) -> bool:
        outcome = self.folder.outcome(trial.name)
        return outcome is not None and outcome.status in FINAL


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Tune's own tables and handlers away while it runs, ours show the study; and keys."""
    before = {key: os.environ.get(key) for key in (*QUIET, *OF_ACTORS)}
    os.environ.update(QUIET | OF_ACTORS)
    class_cache.ENV_VARS_TO_PROPAGATE.update(OF_ACTORS)
    # Tune sends them to its trials by a way that Ray logs; a node has its own, as for a run
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(KEYS)
    try:
        with held_back(("ray.tune", "ray.air", "ray.train"), logging.CRITICAL):
            yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
