"""The gate before the registry: an encoder that is no better than an untrained one is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.moves import stored_tree
from simclr_ray.config.sections.training import ImportedLossConfig
from simclr_ray.errors import CollapseError, ConfigError
from simclr_ray.evaluation.scores import TRAINED, UNTRAINED
from simclr_ray.storage.metrics_log import read_series
from simclr_ray.storage.run_folder import CONFIG_FILE, METRICS, RunFolder
from simclr_ray.storage.run_status import SCORES

FEW_DIMENSIONS: Final = 2.0  # effective rank; a trained encoder has ten times that and more
OF_TRAINED: Final = 10.0
SHRUNK_ALONE: Final = 0.2  # of the deviation before, where no rank speaks for or against it
FEWEST_CLASSES: Final = 2
RANK, DEVIATION = "effective_rank", "feature_std"  # known of every encoder with two images
FIRST: Final = "before the first step"  # of random weights, or as `init` names them


def check_scores(folder: RunFolder) -> None:
    """Raise `CollapseError` where, by what a run has stored, its encoder has not learned.

    That is its table of scores or, where it has none, as a study's trial, what it logged.
    """
    scores = {score["name"]: score for score in folder.read_json(SCORES, list) or []}
    if TRAINED in scores:
        check_learned(folder, scores[TRAINED], scores.get(UNTRAINED, {}))
        return
    # no accuracy is logged before the first step, and an encoder that is better in that alone has
    # learned: nothing else is compared
    _refuse(folder, _why_alike(*_logged(folder), classes_of_run(folder), FIRST))


def check_learned(
    folder: RunFolder, trained: Mapping[str, Any], untrained: Mapping[str, Any]
) -> None:
    """Raise `CollapseError` where an encoder has not learned.

    Args:
        folder: Of its run.
        trained: Its scores.
        untrained: Those of the untrained encoder.
    """
    _refuse(folder, why_not_learned(trained, untrained, classes_of_run(folder)))


def why_not_learned(
    trained: Mapping[str, Any], untrained: Mapping[str, Any], num_classes: int
) -> str:
    """Return why an encoder is no use, by its scores and those of the untrained one; "": it is.

    All images look alike to it, as `are_alike` has it; or it is better than the untrained encoder
    in nothing: no accuracy, no effective rank and no deviation.

    Args:
        trained: Its scores.
        untrained: Those of the untrained encoder.
        num_classes: As of `are_alike`.
    """
    alike = _why_alike(trained, untrained, num_classes, f"that of the {UNTRAINED}")
    if alike:
        return alike
    both = {k: (v, untrained[k]) for k, v in trained.items() if _is_number(v, untrained.get(k))}
    compared = {k: values for k, values in both.items() if k != "uniformity"}
    if {RANK, DEVIATION} <= both.keys() and not any(a > b for a, b in compared.values()):
        shown = (f"{k} {a:.3g} (untrained {b:.3g})" for k, (a, b) in compared.items())
        return f"the encoder is no better than the untrained one: {', '.join(shown)}"
    return ""


def are_alike(
    now: Mapping[str, Any], before: Mapping[str, Any], num_classes: int, least: float
) -> bool:
    """Return whether features point one way, as those of an encoder to which all images are alike.

    The features of K classes end as K points (neural collapse: Papyan et al. 2020,
    arXiv:2008.08186), of effective rank K - 1 to K, and less where classes differ in size: with
    few of them a low rank is no sign by itself, and only features that vary less than before are.

    Args:
        now: Effective rank and deviation of the features, by name.
        before: Those before training.
        num_classes: K that training told apart, as `classes_of` has it; 0: without labels.
        least: Effective rank of an encoder without labels below which it has collapsed.
    """
    if now[RANK] >= least:
        return False
    if not num_classes or now[RANK] < (num_classes - 1) / OF_TRAINED:
        return True
    return bool(now.get(DEVIATION, math.nan) < SHRUNK_ALONE * before.get(DEVIATION, math.nan))


def classes_of(experiment: Experiment) -> int:
    """Return how many classes training tells apart; 0: without labels.

    Where the config names no number, as of SupCon, the fewest that there can be; a loss of the
    user's own is taken to have labels, as its file may not be where this is asked.
    """
    head = experiment.classifier
    if head is not None and head.num_classes:
        return head.num_classes
    is_own = isinstance(experiment.loss, ImportedLossConfig)
    return FEWEST_CLASSES if head is not None or is_own or experiment.takes_labels else 0


def classes_of_run(folder: RunFolder) -> int:
    """Return how many classes a run tells apart, as `classes_of` of its stored config."""
    text = folder.read_text(CONFIG_FILE)
    if text is None:
        return 0
    try:
        return classes_of(cfg.validate(Experiment, stored_tree(cfg.parse_yaml(text))))
    except ConfigError:  # of another release, which what reads its checkpoint says
        return 0


def _why_alike(
    trained: Mapping[str, Any], other: Mapping[str, Any], num_classes: int, whose: str
) -> str:
    """Return why, beside another encoder, all images look alike to one; "": they do not."""
    if not _is_number(trained.get(RANK), other.get(RANK)):
        return ""
    now, then = trained[RANK], other[RANK]
    if not are_alike(trained, other, num_classes, min(FEW_DIMENSIONS, then)):
        return ""
    return (
        f"the features' effective rank is {now:.2f}, {whose} {then:.2f}: all images look alike "
        "to the encoder"
    )


def _refuse(folder: RunFolder, problem: str) -> None:
    if problem:
        remedy = "`model register --force` does it all the same"
        raise CollapseError(f"{folder.uri}: {problem}, so it is not registered ({remedy})")


def _logged(folder: RunFolder) -> tuple[dict[str, float], dict[str, float]]:
    """Return rank and deviation of the last evaluation while training, and before the first step.

    The latter are of the weights that it began with, which `init` may have named.
    """
    series = read_series(folder.read_text(METRICS) or "")
    now, before = {}, {}
    for key in (RANK, DEVIATION):
        if evaluated := series.get(f"eval/{key}"):
            now[key] = evaluated[max(evaluated)]
        if first := series.get(f"start/{key}"):
            before[key] = first[min(first)]
    return now, before


def _is_number(*values: object) -> bool:
    return all(isinstance(value, float) for value in values)
