"""What a study's points are held against: the untrained encoder and raw pixels, once a study.

Both depend on the images, the encoder and the seed alone. They are of the study's base, before
anything varies, and of its first seed.
"""

from __future__ import annotations

import logging
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.protocols import PROBE
from simclr_ray.distributed.worker_exit import skip_destructors
from simclr_ray.errors import SimclrRayError, last_line
from simclr_ray.evaluation.baselines import baseline_scores
from simclr_ray.evaluation.scores import UNTRAINED
from simclr_ray.inference.gate import check_learned
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.studies.definition import EITHER, Study
from simclr_ray.studies.folder import StudyFolder, TrialOutcome
from simclr_ray.train.resolve import ResolvedExperiment, enter
from simclr_ray.train.worker import threads_of

FINAL_SCORES = "final/"  # that metrics of the trained encoder begin with
log = logging.getLogger(__name__)


class StudyBaselines:
    """Scores the baselines of a study in a process of their own, while trials run.

    Args:
        study: Its protocols say how; without any there are no baselines.
        base: Its experiment before anything varies.
        folder: Of the study; where it has baselines already, nothing is done.
    """

    def __init__(self, study: Study, base: Experiment, folder: StudyFolder) -> None:
        self._folder, self._scores = folder, None
        protocols = [name for name in study.protocols if name != PROBE]
        if protocols and base.data.test and not folder.baselines():
            seeded = base.model_copy(update={"seed": study.seeds[0]})
            task = ray.remote(num_cpus=0)(_scores_of)
            self._scores = task.remote(cfg.to_tree(seeded), protocols)

    def store(self, *, wait: bool = True) -> None:
        """Store the scores with the study; a failure is a line of the log.

        Args:
            wait: For them; else, of a study that was stopped, they are left to its next start
                where they are not there yet.
        """
        if self._scores is None:
            return
        if not wait and not ray.wait([self._scores], timeout=0)[0]:
            # It ends with this process. A task that is cancelled while its end is on the way
            # brings this process down (Ray 2.60).
            return
        try:
            self._folder.write_baselines(ray.get(self._scores))
        except (RayError, SimclrRayError) as error:
            log.warning("the study has no baselines: %s", last_line(error))


def check_trial(folder: StudyFolder, outcome: TrialOutcome) -> None:
    """Raise `CollapseError` where a trial's encoder is no better than the untrained one.

    By the study's own scores, if it has both; `register_run` looks at what the run logged.
    """
    untrained = folder.baselines().get(UNTRAINED, {})
    scores = (
        {key.removeprefix(FINAL_SCORES): value for key, value in values.items()}
        for values in (outcome.metrics, untrained)
    )
    check_learned(RunFolder.at(outcome.run["folder"]), *scores)


def _scores_of(tree: dict[str, Any], protocols: list[str]) -> dict[str, dict[str, float]]:
    """Return name of a baseline -> metric -> value."""
    skip_destructors()
    return enter(cfg.validate(Experiment, tree), _scored, protocols)


def _scored(resolved: ResolvedExperiment, protocols: list[str]) -> dict[str, dict[str, float]]:
    experiment = resolved.config
    torch.set_num_threads(threads_of(experiment))
    scores = {}
    for score in baseline_scores(experiment, protocols):
        numbers = score.numbers()
        scores[score.name] = {f"{FINAL_SCORES}{key}": value for key, value in numbers.items()}
        if "linear_top1" in numbers:
            scores[score.name][EITHER] = numbers["linear_top1"]
    return scores
