"""`study advise`: which settings it trains, what it makes of their results, and its budget."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import ConfigError
from simclr_ray.studies import advise as advising
from simclr_ray.studies.advice_space import (
    DEFAULT,
    factors_of,
    finalists,
    fit_effects,
    name_of,
    settings_of,
    tried_of,
    values_of,
)
from simclr_ray.studies.advise import Budget, Question, advise, budget_of, question_of
from simclr_ray.studies.definition import Study
from simclr_ray.studies.folder import StudyFolder, TrialOutcome
from simclr_ray.studies.plan import base_tree, digest_of_study, study_folder
from simclr_ray.studies.step_timing import TRIAL_S, Pace
from tests.ray.images import write_shapes
from tests.unit.cli.in_process import enter, run

BASE = """\
name: base
data: {train: train.parquet, test: test.parquet}
batch_size: 16
epochs: 30
augment: {name: simclr, size: 16}
encoder: {name: resnet, depth: 10, width: 0.125, stem: strided}
schedule: {learning_rate: 0.6}
"""
ROWS = 80
GIVES = {  # of each level; they add up
    "color": {"none": 0.06, "0.5": 0.01, "1": -0.07},
    "temperature": {"0.1": -0.02, "0.5": 0.02},
    "smallest crop": {"0.08": 0.01, "0.3": -0.01},
    "rate": {"0.6": 0.03, "0.2": -0.03},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("advise")
    (folder / "base.yaml").write_text(BASE)
    write_shapes(folder / "train.parquet", ROWS)
    write_shapes(folder / "test.parquet", 20)
    return folder


@pytest.fixture(autouse=True)
def _there(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(files, monkeypatch)


def question(storage: Path, *overrides: str) -> Question:
    return question_of("a", "base.yaml", [f"storage={storage}", *overrides])


def given_by(point: dict[str, str]) -> float:
    return 0.4 + sum(GIVES[factor][level] for factor, level in point.items())


def test_24_settings_are_halved_with_each_pair_of_levels_as_often(tmp_path: Path) -> None:
    factors = question(tmp_path).factors
    assert list(factors) == list(GIVES)
    assert {name: list(levels) for name, levels in factors.items()} == {
        name: list(levels) for name, levels in GIVES.items()
    }
    assert len(settings_of(factors)) == 24
    half = tried_of(factors)
    assert len(half) == 12
    for one, other in itertools.combinations(factors, 2):
        pairs = Counter((setting[one], setting[other]) for setting in half)
        assert len(pairs) == len(factors[one]) * len(factors[other])
        assert len(set(pairs.values())) == 1
    assert values_of(half[0], factors) == {
        "augment.strength": 0.0,
        "augment.grayscale": 0.0,
        "loss.temperature": 0.1,
        "augment.min_area": 0.08,
        "schedule.learning_rate": 0.6,
    }


def test_what_adds_up_is_read_off_tried_of_the_settings_and_predicts_the_others(
    tmp_path: Path,
) -> None:
    factors = question(tmp_path).factors
    measured = {name_of(setting): given_by(setting) for setting in tried_of(factors)}
    fit = fit_effects(factors, measured)
    for setting in settings_of(factors):
        assert fit.predicted[name_of(setting)] == pytest.approx(given_by(setting))
    for effect in fit.effects:
        assert effect.effect == pytest.approx(GIVES[effect.factor][effect.level])
    assert fit.deviation == pytest.approx(0, abs=1e-9)
    assert fit.freedom == 12 - 6
    best = {f: max(levels, key=levels.__getitem__) for f, levels in GIVES.items()}
    assert finalists(fit, factors, 2)[0] == best


def test_errors_of_effects_are_those_of_means_over_trials(tmp_path: Path) -> None:
    factors = question(tmp_path).factors
    half = tried_of(factors)
    # +1 and -1 by turns, orthogonal to nothing in particular: a deviation of the residuals
    measured = {name_of(s): given_by(s) + 0.01 * (-1) ** n for n, s in enumerate(half)}
    fit = fit_effects(factors, measured)
    of = {(e.factor, e.level): e.error for e in fit.effects}
    assert of["rate", "0.6"] == pytest.approx(fit.deviation / math.sqrt(12))
    assert of["color", "none"] == pytest.approx(fit.deviation * math.sqrt(2 / 12))
    few = dict(list(measured.items())[:4])
    with pytest.raises(ConfigError, match="4 trials gave a result: too few to say what each level"):
        fit_effects(factors, few)


class Ran:
    """Stands for `run_study`: what each trial gives is known beforehand."""

    def __init__(self, default: float | None, noise: float = 0.0) -> None:
        self.default, self.noise = default, noise
        self.studies: list[Study] = []

    def __call__(self, study: Study) -> StudyFolder:
        self.studies.append(study)
        tree = base_tree(study)
        folder = StudyFolder(*study_folder(study))
        experiment = cfg.validate(Experiment, tree)
        folder.write_definition(study, experiment, digest_of_study(study, experiment))
        epochs = experiment.epochs
        for number, trial in enumerate(advising.trials_of(study)):
            name = str(trial.point["setting"])
            if name == DEFAULT:
                value = self.default
            else:
                value = given_by(dict(part.rsplit(" ", 1) for part in name.split(", ")))
            finished = value is not None
            shaken = (value or 0.0) + self.noise * (-1) ** number + 0.01 * epochs
            images = float(experiment.data.limit * epochs)
            folder.write_outcome(
                TrialOutcome(
                    trial.name,
                    "finished" if finished else "collapsed",
                    "" if finished else "collapsed",
                    [cell._asdict() for cell in trial.cells],
                    trial.seed,
                    {},
                    {epochs: {"eval/knn_top1": shaken, "eval/effective_rank": 9.0}},
                    {"images": images, "seconds": 2.0, "device_seconds": 2.0},
                    {"folder": f"{folder.uri}/runs/{trial.name}-00000000"},
                )
            )
        return folder


def test_the_best_setting_is_advised_with_its_gain_over_the_experiment_as_it_is(
    tmp_path: Path,
) -> None:
    ran = Ran(default=0.43)
    advice = advise(question(tmp_path), Budget(64, 3, 60.0), ran)
    short, long = ran.studies
    assert (short.name, long.name) == ("a-short", "a-long")
    assert (short.seeds, long.seeds) == ([0], [1, 2])
    assert (short.set["epochs"], long.set["epochs"]) == (3, 6)
    best, *others = advice.finalists
    assert best.name == "color none, temperature 0.5, smallest crop 0.08, rate 0.6"
    assert best.gain == pytest.approx(0.52 - 0.43)
    assert {end.name for end in others} == {
        DEFAULT,
        "color none, temperature 0.5, smallest crop 0.3, rate 0.6",
    }
    assert best.images == 2 * 6 * 64
    assert advice.values == {
        "augment.strength": 0.0,
        "augment.grayscale": 0.0,
        "loss.temperature": 0.5,
        "augment.min_area": 0.08,
        "schedule.learning_rate": 0.6,
    }
    assert advice.longer == pytest.approx(0.01 * 3)  # three epochs more
    assert advice.cost_fraction == pytest.approx(64 * (12 * 3 + 6 * 6) / (24 * ROWS * 30))


def test_a_gain_has_the_error_of_paired_seeds_and_of_what_does_not_add_up(tmp_path: Path) -> None:
    advice = advise(question(tmp_path), Budget(64, 3, 60.0), Ran(default=0.43, noise=0.02))
    best = advice.finalists[0]
    fit = advice.fit
    # trials take turns up and down: settings 1 and 3 of a seed are shaken alike, 2 the other way
    assert fit.deviation > 0
    assert 0 < best.error < 0.1
    assert next(end for end in advice.finalists if end.name == DEFAULT).error == 0


def test_where_nothing_is_better_it_is_left_as_it_is(tmp_path: Path) -> None:
    advice = advise(question(tmp_path), Budget(64, 3, 60.0), Ran(default=0.6))
    assert advice.finalists[0].name == DEFAULT
    assert advice.values == {}
    with pytest.raises(ConfigError, match="the experiment as it is gave no result"):
        advise(question(tmp_path / "other"), Budget(64, 3, 60.0), Ran(default=None))


def test_without_labels_views_are_left_as_they_are(tmp_path: Path) -> None:
    unlabelled = question(tmp_path, "data.test=")
    assert unlabelled.metric == "eval/effective_rank"
    assert list(unlabelled.factors) == ["temperature", "rate"]
    settings = tried_of(unlabelled.factors)
    assert len(settings) == 4
    fit = fit_effects(unlabelled.factors, {name_of(s): len(name_of(s)) for s in settings})
    assert fit.freedom == 1


def test_a_budget_is_filled_by_its_trials(tmp_path: Path) -> None:
    wanted = question(tmp_path)
    # 12 trials of one epoch of 80 images at 0.01 s, and 0.3 s of evaluation each
    pace = Pace(seconds=9.0, device_seconds=12 * 80 * 0.01, start=5.0, evaluation=12 * 0.3)
    budget = budget_of(wanted, 10.0, 2, pace)
    assert budget.rows == ROWS
    trials = 12 + 6
    images = (12 + 2 * 6) * budget.epochs * budget.rows
    expected = 2 * 5 + (images * 0.01 + trials * (0.3 + TRIAL_S)) / 2
    assert budget.seconds == pytest.approx(expected)
    assert 600 * 0.9 < budget.seconds <= 600
    few = budget_of(wanted, 1.8, 2, pace)  # fewer images, two epochs of them at least
    assert few.rows < ROWS or few.epochs >= 2
    assert few.seconds <= 1.8 * 60
    with pytest.raises(ConfigError, match=r"in 1 minutes a trial has \d+ steps of 16 images; 40"):
        budget_of(wanted, 1.0, 2, pace)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.parquet", "batch_size=32"], "80 images are too few to tell settings apart"),
        (["train.parquet", "loss.name=triplet"], "must be one with a temperature"),
        (["train.parquet", "--minutes", "0"], "--minutes: must be above 0"),
        (["train.parquet", "--json", "a.txt"], "does not end in .json"),
        (["nowhere.parquet"], "nowhere.parquet"),
    ],
)
def test_what_cannot_be_advised_on_is_refused_in_a_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = run(["study", "advise", *words, "--base", "base.yaml"], capsys)
    assert ended.code == 2
    (problem,) = ended.problems
    assert message in problem


def test_views_that_are_a_pipeline_have_no_such_settings(tmp_path: Path) -> None:
    tree: dict[str, Any] = {"name": "pipeline", "size": 16, "a": [{"name": "crop"}]}
    experiment = cfg.validate(Experiment, {**cfg.parse_yaml(BASE), "augment": tree})
    with pytest.raises(ConfigError, match=r"augment.name: must be simclr"):
        factors_of(experiment)
