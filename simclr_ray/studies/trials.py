"""Which trials a study has, before it runs and from its folder. Imports neither torch nor ray."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from simclr_ray import config as cfg
from simclr_ray.errors import ConfigError
from simclr_ray.storage.scratch import scratch_folder
from simclr_ray.studies.definition import Budget, Study, point_of
from simclr_ray.studies.folder import StudyFolder
from simclr_ray.studies.plan import Point, Trial, base_tree, make_trials, points_of, restored
from simclr_ray.studies.space import Dimension, label_of


def plan(study: Study, tree: dict[str, Any]) -> list[Trial]:
    """Return the trials of a study; for optuna some that hold every listed value, to be checked.

    Raises:
        ConfigError: A trial cannot be.
    """
    if study.search.name == "grid":
        return make_trials(study, tree, points_of(study))
    if study.search.name == "random":
        return make_trials(study, tree, random_points(study))
    wanted, allowed = study.search.trials, study.budget.trials
    if allowed and wanted > allowed:
        problem = f"search.trials={wanted} are wanted, budget.trials={allowed} allows fewer"
        raise ConfigError.of("budget.trials", problem)
    dims = study.space
    longest = max(len(dim.values) for dim in dims.values())
    points = [
        {name: label_of(dim.values[at % len(dim.values)]) for name, dim in dims.items()}
        for at in range(longest)
    ]
    return make_trials(study.model_copy(update={"budget": Budget()}), tree, points)


@contextmanager
def stored_study(where: str) -> Iterator[tuple[Study, list[Trial]]]:
    """Give a study that was begun and its trials; its base is a file that goes with the block.

    Raises:
        ConfigError: There is none, or its folder has another name than it.
    """
    folder = StudyFolder.at(where)
    study, tree = folder.definition()
    if study.name != folder.files.name:
        raise ConfigError.of(where, f"holds study {study.name!r}; folders keep their names")
    with scratch_folder() as scratch:
        base = scratch / "base.yaml"
        base.write_text(cfg.dump_yaml(restored(tree, folder.uri)), encoding="utf-8")
        study = study.model_copy(update={"base": str(base)})
        yield study, plan(study, base_tree(study))


def random_points(study: Study) -> list[Point]:
    """Return points drawn by the study's own seed: the same after every restart.

    The draws are those that Ray Tune's domains give for the same generator (a test compares them).
    They are written out here because a study's status needs its trials, and not Ray.
    """
    rng = np.random.default_rng(study.search.seed)
    draws = [
        point_of(study, {name: _drawn(dim, rng) for name, dim in study.space.items()})
        for _ in range(study.search.trials)
    ]
    return list({json.dumps(point, default=float): point for point in draws}.values())


def _drawn(dim: Dimension, rng: np.random.Generator) -> Any:
    if dim.uniform:
        low, high = dim.uniform
        return float(rng.uniform(low, high))
    if dim.loguniform:
        low, high = np.log(dim.loguniform)
        return float(np.exp(rng.uniform(low, high)))
    labels = [label_of(value) for value in dim.listed]
    return labels[rng.choice(np.arange(len(labels)), size=1)[0]]
