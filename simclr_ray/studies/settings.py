"""What decides a study's results: its digest, and as settings that a later file is held against."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, Final

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.studies.definition import Study
from simclr_ray.studies.space import DIGITS

LOOKS: Final = (
    "question",
    "answers",
    "notes",
    "figure",
    "comparisons",
    "paper",
    "budget",
    "extra_metrics",
    "expected_deviation",
)
SEPARATE: Final = ("concurrency", "images_per_s", "scale", "base", "set")
OF_STUDY: Final = "study."  # that overrides of the study's own keys begin with


def digest_of_study(study: Study, base: Experiment) -> str:
    """Return 16 hex digits over what decides the results: the base by its content, not its name."""
    tree = _deciding(study)
    if any(dim.uniform or dim.loguniform for dim in study.space.values()):
        tree["digits"] = DIGITS  # of drawn numbers
    evaluation = cfg.to_tree(base.evaluation)
    return cfg.digest_of({"study": tree, "base": base.digest(), "evaluation": evaluation})


def settings_of(study: Study, base: Experiment) -> dict[str, Any]:
    """Return what decides the results but for seeds and images, as JSON has it.

    Args:
        study: Of it, all but name, looks and where it runs.
        base: Its experiment before anything varies.
    """
    tree = {k: v for k, v in _deciding(study).items() if k not in ("name", "seeds")}
    tree["space"] = {
        name: {kind: values for kind, values in dimension.items() if values}
        for name, dimension in tree["space"].items()
    }
    return {
        "study": tree,
        "base": {**cfg.identity(base), "evaluation": cfg.identity(base.evaluation)},
    }


def changed_settings(
    then: Mapping[str, Any], now: Mapping[str, Any], command: str = ""
) -> list[str]:
    """Return the paths of settings that differ.

    Args:
        then: What `settings_of` gave.
        now: What it gives.
        command: What its overrides set, they set again.
    """
    before, after = cfg.leaves(then), cfg.leaves(now)
    # what a later release can set as well had its default then; values of the space come and go
    both = [path for path in after if path in before or not path.startswith(OF_STUDY)]
    both += [path for path in after if path not in both and path.startswith(f"{OF_STUDY}space.")]
    paths = [p for p in {**before, **dict.fromkeys(both)} if before.get(p) != after.get(p)]
    paths_set = _paths_set(command)
    return [
        path.removeprefix("base.").removeprefix(OF_STUDY)
        for path in paths
        if not any(path == own or path.startswith(f"{own}.") for own in paths_set)
    ]


def _deciding(study: Study) -> dict[str, Any]:
    return {k: v for k, v in cfg.to_tree(study).items() if k not in (*LOOKS, *SEPARATE)}


def _paths_set(command: str) -> list[str]:
    """Return the paths of settings that a command line's overrides set."""
    paths = [word.partition("=")[0] for word in shlex.split(command) if "=" in word]
    own = {f"{OF_STUDY}base": "base", f"{OF_STUDY}set": "base"}
    return [own.get(p, p if p.startswith(OF_STUDY) else f"base.{p}") for p in paths]
