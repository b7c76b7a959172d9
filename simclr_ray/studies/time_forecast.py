"""How long a study will take on the cluster at hand, from the command to its report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final, NamedTuple

from simclr_ray.studies.definition import Study
from simclr_ray.studies.driver import can_share_processes, shared_cores, start_cluster
from simclr_ray.studies.plan import Trial
from simclr_ray.studies.step_timing import Pace, pace_of

# Imports before Ray starts, the definition, MLflow's run and Tune's own start; then the report. An
# estimate: of 4 trials of 16 steps, what neither the trials nor the baselines explain.
BESIDE_S: Final = 7.0


class TimeForecast(NamedTuple):
    """What a study should take.

    Attributes:
        at_a_time: Trials that the cluster runs.
        pace: All trials; the start of the cluster, of the study and of its processes among it.
        started_s: What the start of the cluster took.
        seconds_spent: By the forecast itself, the start of the cluster among it.
    """

    at_a_time: int
    pace: Pace
    started_s: float
    seconds_spent: float


def forecast_time(study: Study, trials: Sequence[Trial]) -> TimeForecast:
    """Connect to the cluster or start one, time steps on it, and return what a study takes.

    Args:
        study: What is to run; of a search that learns, `trials` stand for more of them.
        trials: As `studies.trials.plan` returns them.

    Raises:
        ClusterError: No cluster answers, or it cannot hold one trial.
        SimclrRayError: What `step_timing.pace_of` raises.
    """
    began = time.monotonic()
    at_a_time = start_cluster(study, trials).now
    started_s = time.monotonic() - began
    runs_per_trial = study.search.runs_per_trial(len(trials))
    are_small = can_share_processes(trials)
    cores = shared_cores(trials)
    pace = pace_of(
        trials, at_a_time, cores, study.protocols, baselines=are_small and runs_per_trial == 1
    )
    start = BESIDE_S + started_s + pace.start
    whole = Pace(
        start + runs_per_trial * (pace.seconds - pace.start),
        runs_per_trial * pace.device_seconds,
        start,
        runs_per_trial * pace.evaluation,
    )
    return TimeForecast(at_a_time, whole, started_s, time.monotonic() - began)
