"""Every study file is whole: at each scale all trials are experiments that would start."""

from __future__ import annotations

from pathlib import Path

import pytest

from simclr_ray.studies.files import load_study, study_names, summaries
from simclr_ray.studies.findings import SCALES
from simclr_ray.studies.plan import base_tree, make_trials, points_of

ALL = [(study.name, scale) for study in summaries() for scale in study.scales]


def test_the_studies_of_the_paper_are_there() -> None:
    assert study_names() == [
        "batch_size", "cifar10_grid", "color_strength", "composition", "crop_scale",
        "encoder_size", "long_training", "losses", "optimizer", "projection_head",
        "temperature", "what_h_keeps",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "scale"), ALL)
def test_every_trial_of_a_study_is_a_valid_experiment(name: str, scale: str) -> None:
    study = load_study(name, scale)
    trials = make_trials(study, base_tree(study), points_of(study))
    assert len(trials) >= 2
    assert len({t.name for t in trials}) == len(trials)
    digests = {(t.experiment.digest(), t.experiment.batch_size) for t in trials}
    assert len(digests) == len(trials)


@pytest.mark.parametrize("name", study_names())
def test_a_study_has_a_scale_for_a_machine_without_gpu(name: str) -> None:
    study = load_study(name, "cpu")
    assert study.scale == "cpu"
    assert study.base == "cifar10_study_cpu"
    assert study.paper.rows


def test_the_searches_that_were_run_are_valid() -> None:
    folder = Path(__file__).parents[3] / "docs" / "studies"
    found = sorted(folder.rglob("*.yaml"))
    assert found
    for path in found:
        study = load_study(str(path))
        assert make_trials(study, base_tree(study), points_of(study)), path


def test_a_space_that_is_given_needs_no_matches_of_what_it_does_not_run() -> None:
    space = "study.space={batch_size: {grid: [16, 64]}, epochs: {grid: [1, 2]}}"
    study = load_study("batch_size", "cpu", space, "study.comparisons=[]")
    assert study.paper.matches == {"batch_size": {"64": 256}}


@pytest.mark.parametrize(("name", "scale"), [one for one in ALL if one[1] in SCALES])
def test_a_laptop_study_has_seeds_effects_and_trials_of_minutes(name: str, scale: str) -> None:
    study = load_study(name, scale)
    trials = make_trials(study, base_tree(study), points_of(study))
    assert len(study.seeds) >= 5
    assert study.comparisons
    assert all(claim.smallest_effect for claim in study.comparisons)
    for trial in trials:  # what the paper's setting has and the scale forgot would be inherited
        experiment = trial.experiment
        steps = experiment.total_steps(10_000)
        assert steps >= 100, trial.name
        assert experiment.data.limit == 10_000
        assert experiment.augment.size == 16
        images = steps * experiment.batch_size
        assert images <= 600_000  # six minutes of a core
