"""Which trials a scheduler sees first, and what it lets through."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler

from simclr_ray import config as cfg
from simclr_ray.studies.definition import Search, Study, point_of
from simclr_ray.studies.plan import Trial, base_tree, make_trials, points_of
from simclr_ray.studies.search import EPOCH, in_drawn_order, scheduler_of, searched_space
from simclr_ray.studies.trials import random_points

RATES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
EPOCHS = 18


def study(seed: int = 0) -> Study:
    tree: dict[str, Any] = {
        "name": "s",
        "question": "?",
        "base": "cifar10_study_cpu",
        "set": {"epochs": EPOCHS},
        "space": {"schedule.learning_rate": {"grid": RATES}},
        "metric": "eval/knn_top1",
        "protocols": [],
        "scheduler": {"name": "asha", "grace_epochs": 2},
        "search": {"seed": seed},
    }
    return cfg.validate(Study, tree)


def trials_of(study: Study) -> list[Trial]:
    return make_trials(study, base_tree(study), points_of(study))


class TuneTrial:
    def __init__(self, trial: Trial) -> None:
        self.trial_id = self.trial_name = trial.name
        self.config: dict[str, Any] = {}


def epochs_run(study: Study, trials: list[Trial]) -> int:
    """Return what halving takes, one trial after the other, where a higher rate is better."""
    scheduler = scheduler_of(study, trials)
    assert scheduler is not None
    scheduler.set_search_properties(study.metric, study.mode)
    taken = 0
    for trial in trials:
        one, value = TuneTrial(trial), trial.experiment.schedule.learning_rate
        scheduler.on_trial_add(None, one)  # type: ignore[arg-type] # asks for no controller
        for epoch in range(1, EPOCHS + 1):
            taken += 1
            result = {EPOCH: epoch, study.metric: value}
            decision = scheduler.on_trial_result(None, one, result)  # type: ignore[arg-type] # asks for no controller
            if decision == TrialScheduler.STOP:
                break
    return taken


def test_the_drawn_order_is_of_all_trials_and_the_same_after_a_restart() -> None:
    trials = trials_of(study())
    drawn = in_drawn_order(study(), trials)
    assert sorted(t.name for t in drawn) == sorted(t.name for t in trials)
    assert drawn == in_drawn_order(study(), trials_of(study()))
    assert drawn != trials
    assert drawn != in_drawn_order(study(seed=1), trials)


def test_halving_saves_nothing_on_values_from_bad_to_good_and_half_in_a_drawn_order() -> None:
    trials = trials_of(study())
    all_epochs = EPOCHS * len(RATES)
    assert epochs_run(study(), trials) == all_epochs
    taken = [epochs_run(study(s), in_drawn_order(study(s), trials)) for s in range(50)]
    assert sum(taken) / len(taken) == pytest.approx(0.5 * all_epochs, rel=0.15)


def test_drawn_numbers_have_few_digits_within_their_range_and_listed_ones_stay() -> None:
    space = {
        "loss.temperature": {"loguniform": [0.12345678, 1.0]},
        "augment.strength": {"uniform": [0.0, 1.0]},
        "optimizer.weight_decay": {"choice": [0.046875, 0.1]},
    }
    searched = cfg.validate(
        Study,
        {
            "name": "s",
            "question": "?",
            "base": "cifar10_study_cpu",
            "space": space,
            "search": {"name": "random", "trials": 3},
            "metric": "eval/knn_top1",
        },
    )
    drawn = {
        "loss.temperature": 0.123456781,
        "augment.strength": 0.99999,
        "optimizer.weight_decay": 0.046875,
    }
    assert point_of(searched, drawn) == {
        "loss.temperature": 0.1235,
        "augment.strength": 1.0,
        "optimizer.weight_decay": 0.046875,
    }
    assert point_of(searched, {**drawn, "loss.temperature": 0.12342})["loss.temperature"] == (
        0.12345678
    )


def test_random_points_are_those_that_ray_tune_draws() -> None:
    space = {
        "schedule.learning_rate": {"loguniform": [0.01, 3.0]},
        "loss.temperature": {"uniform": [0.05, 0.5]},
        "batch_size": {"choice": [64, 128, 256]},
        "optimizer.name": {"choice": ["lars", "sgd"]},
    }
    search = {"name": "random", "trials": 40, "seed": 3}
    tree = cfg.to_tree(study()) | {"space": space, "search": search, "figure": {"x": "batch_size"}}
    drawn = cfg.validate(Study, tree | {"scheduler": {"name": "none"}})
    rng, domains = np.random.default_rng(3), searched_space(drawn)
    theirs = [
        point_of(drawn, {k: d.sample(random_state=rng) for k, d in domains.items()})
        for _ in range(40)
    ]
    assert random_points(drawn) == theirs
    assert len({p["batch_size"] for p in theirs}) == 3


def test_planned_trials_of_a_search_that_learns_stand_for_those_that_it_will_suggest() -> None:
    learning = Search(name="optuna", trials=6)
    assert learning.learns
    assert learning.runs_per_trial(4) == 1.5
    for search in (Search(), Search(name="random", trials=6)):
        assert not search.learns
        assert search.runs_per_trial(4) == 1.0
