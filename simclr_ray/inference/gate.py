"""The gate before the registry: an encoder that is no better than an untrained one is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from simclr_ray.errors import CollapseError
from simclr_ray.evaluation.scores import TRAINED, UNTRAINED
from simclr_ray.storage.metrics_log import read_series
from simclr_ray.storage.run_folder import METRICS, RunFolder
from simclr_ray.storage.run_status import SCORES

FEW_DIMENSIONS: Final = 2.0  # effective rank; a trained encoder has ten times that and more
NO_WORSE: Final = ("effective_rank", "feature_std")  # known of every encoder with two images
RANK: Final = "effective_rank"


def check_scores(folder: RunFolder) -> None:
    """Raise `CollapseError` where, by what a run has stored, its encoder has not learned.

    That is its table of scores or, where it has none, as a study's trial, what it logged.
    """
    scores = {score["name"]: score for score in folder.read_json(SCORES, list) or []}
    if TRAINED in scores:
        check_learned(folder.uri, scores[TRAINED], scores.get(UNTRAINED, {}))
    else:
        check_learned(folder.uri, *_logged_ranks(folder))


def check_learned(run: str, trained: Mapping[str, Any], untrained: Mapping[str, Any]) -> None:
    """Raise `CollapseError` where an encoder has not learned.

    Args:
        run: Folder or URI of its run.
        trained: Its scores.
        untrained: Those of the untrained encoder.
    """
    problem = why_not_learned(trained, untrained)
    if problem:
        remedy = "`model register --force` does it all the same"
        raise CollapseError(f"{run}: {problem}, so it is not registered ({remedy})")


def why_not_learned(trained: Mapping[str, Any], untrained: Mapping[str, Any]) -> str:
    """Return why an encoder is no use, by its scores and those of the untrained one; "": it is.

    Its features span next to nothing, and fewer dimensions than those of the untrained encoder; or
    it is better than that in nothing: no accuracy, no effective rank and no deviation.
    """
    both = {k: (v, untrained[k]) for k, v in trained.items() if _is_number(v, untrained.get(k))}
    if RANK not in both:
        return ""
    now, then = both[RANK]
    if now < min(FEW_DIMENSIONS, then):
        return (
            f"the features' effective rank is {now:.2f}, that of the untrained encoder {then:.2f}: "
            "all images look alike to it"
        )
    compared = {k: values for k, values in both.items() if k != "uniformity"}
    if set(NO_WORSE) <= both.keys() and not any(a > b for a, b in compared.values()):
        shown = (f"{k} {a:.3g} (untrained {b:.3g})" for k, (a, b) in compared.items())
        return f"the encoder is no better than the untrained one: {', '.join(shown)}"
    return ""


def _logged_ranks(folder: RunFolder) -> tuple[dict[str, float], dict[str, float]]:
    """Return the effective rank of the last evaluation while training, and before the first step.

    No accuracy is logged before the first step, and an encoder that is better in that alone has
    learned: nothing else is compared.
    """
    series = read_series(folder.read_text(METRICS) or "")
    now, then = series.get(f"eval/{RANK}", {}), series.get(f"start/{RANK}", {})
    return {RANK: now[max(now)]} if now else {}, {RANK: then[min(then)]} if then else {}


def _is_number(*values: object) -> bool:
    return all(isinstance(value, float) for value in values)
