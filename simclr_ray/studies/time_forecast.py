"""How long a study will take on the cluster at hand, from the command to its report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from simclr_ray.studies.definition import Study
from simclr_ray.studies.driver import can_share_processes, shared_cores
from simclr_ray.studies.plan import Trial
from simclr_ray.studies.step_timing import Pace, pace_of

# Imports before Ray starts, the definition, MLflow's run and Tune's own start; then the report. An
# estimate: of 4 trials of 16 steps, what neither the trials nor the baselines explain.
BESIDE_S: Final = 7.0


def forecast_time(study: Study, trials: Sequence[Trial], at_a_time: int, started_s: float) -> Pace:
    """Return what all trials of a study take, start and baselines among it.

    Args:
        study: What is to run; of a search that learns, `trials` stand for more of them.
        trials: As `studies.trials.plan` returns them.
        at_a_time: That the cluster runs.
        started_s: What it took to start the cluster.

    Raises:
        Same as `step_timing.pace_of`.
    """
    share = study.search.runs_per_trial(len(trials))
    are_small = can_share_processes(trials)
    cores = shared_cores(trials)
    pace = pace_of(trials, at_a_time, cores, study.protocols, baselines=are_small)
    start = BESIDE_S + started_s + pace.start
    return Pace(
        start + share * (pace.seconds - pace.start),
        share * pace.device_seconds,
        start,
        share * pace.evaluation,
    )
