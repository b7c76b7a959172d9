"""`study advise`: which settings it trains, what it makes of their results, and its budget."""

from __future__ import annotations

import io
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import ConfigError, RunError
from simclr_ray.studies.advice_space import (
    DEFAULT,
    factors_of,
    fit_effects,
    name_of,
    predicted_best,
    settings_of,
    tried_of,
    values_of,
)
from simclr_ray.studies.definition import Study
from simclr_ray.studies.folder import StudyFolder, TrialOutcome
from simclr_ray.studies.plan import base_tree, study_folder
from simclr_ray.studies.settings import digest_of_study
from simclr_ray.studies.step_timing import TRIAL_S, Pace
from simclr_ray.studies.time_forecast import TimeForecast
from simclr_ray.studies.tuning_advice import (
    AdviceTask,
    TrialLengths,
    advice_task,
    advise,
    ensure_classes,
    lengths_within,
    trials_of,
)
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


def task(storage: Path, *overrides: str) -> AdviceTask:
    return advice_task("a", "base.yaml", [f"storage={storage}", *overrides])


def given_by(point: dict[str, str]) -> float:
    return 0.4 + sum(GIVES[factor][level] for factor, level in point.items())


def test_24_settings_are_halved_with_each_pair_of_levels_as_often(tmp_path: Path) -> None:
    factors = task(tmp_path).factors
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
    factors = task(tmp_path).factors
    measured = {name_of(setting): given_by(setting) for setting in tried_of(factors)}
    fit = fit_effects(factors, measured)
    for setting in settings_of(factors):
        assert fit.predicted[name_of(setting)] == pytest.approx(given_by(setting))
    for effect in fit.effects:
        assert effect.effect == pytest.approx(GIVES[effect.factor][effect.level])
    assert fit.deviation == pytest.approx(0, abs=1e-9)
    assert fit.freedom == 12 - 6
    best = {f: max(levels, key=levels.__getitem__) for f, levels in GIVES.items()}
    assert predicted_best(fit, factors, 2)[0] == best


def test_errors_of_effects_are_those_of_means_over_trials(tmp_path: Path) -> None:
    factors = task(tmp_path).factors
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
    """Stands for `run_study`: what each trial gives is known beforehand; None: it collapses."""

    def __init__(
        self, default: float | None, noise: float = 0.0, broken: str = "", status: str = "collapsed"
    ) -> None:
        self.default, self.noise, self.broken, self.status = default, noise, broken, status
        self.studies: list[Study] = []

    def __call__(self, study: Study) -> StudyFolder:
        self.studies.append(study)
        tree = base_tree(study)
        folder = StudyFolder(*study_folder(study))
        experiment = cfg.validate(Experiment, tree)
        folder.write_definition(study, experiment, digest_of_study(study, experiment))
        epochs = experiment.epochs
        for number, trial in enumerate(trials_of(study)):
            name = str(trial.cells[-1].point["setting"])
            value = self.default
            if name != DEFAULT:
                value = given_by(dict(part.rsplit(" ", 1) for part in name.split(", ")))
            if self.broken and self.broken in name:
                value = None
            shaken = (value or 0.0) + self.noise * (-1) ** number + 0.01 * epochs
            images = float(experiment.data.limit * epochs)
            status: Any = "finished" if value is not None else self.status
            folder.write_outcome(
                TrialOutcome(
                    trial.name,
                    status,
                    "" if value is not None else "it went wrong",
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
    advice = advise(task(tmp_path), TrialLengths(64, 3, 60.0), ran)
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
    assert advice.gain_of_longer == pytest.approx(0.01 * 3)  # three epochs more
    assert advice.cost_fraction == pytest.approx(64 * (12 * 3 + 6 * 6) / (24 * ROWS * 30))


def test_a_gain_has_the_error_of_paired_seeds_and_of_what_does_not_add_up(tmp_path: Path) -> None:
    advice = advise(task(tmp_path), TrialLengths(64, 3, 60.0), Ran(default=0.43, noise=0.02))
    best = advice.finalists[0]
    fit = advice.fit
    # trials take turns up and down: settings 1 and 3 of a seed are shaken alike, 2 the other way
    assert fit.deviation > 0
    assert 0 < best.error < 0.1
    assert next(end for end in advice.finalists if end.name == DEFAULT).error == 0


def test_where_nothing_is_better_it_is_left_as_it_is(tmp_path: Path) -> None:
    advice = advise(task(tmp_path), TrialLengths(64, 3, 60.0), Ran(default=0.6))
    assert advice.finalists[0].name == DEFAULT
    assert advice.values == {}
    with pytest.raises(RunError, match="the experiment as it is gave no result"):
        advise(task(tmp_path / "other"), TrialLengths(64, 3, 60.0), Ran(default=None))


def test_an_experiment_that_is_one_of_the_settings_is_compared_with_itself(tmp_path: Path) -> None:
    like = ["loss.temperature=0.5", "augment.min_area=0.08", "augment.strength=0.0"]
    same = task(tmp_path, *like, "augment.grayscale=0.0")
    advice = advise(same, TrialLengths(64, 3, 60.0), Ran(default=0.52))
    assert advice.finalists[0].name == DEFAULT  # a tie: it is what it is
    assert advice.finalists[0].gain == 0
    assert len(advice.finalists) == 3
    assert advice.values == {}
    # two seeds of the two others, and of itself once
    assert advice.cost_fraction == pytest.approx(64 * (12 * 3 + 4 * 6) / (24 * ROWS * 30))


def test_a_twin_of_the_experiment_says_nothing_of_chance(tmp_path: Path) -> None:
    like = ["loss.temperature=0.5", "augment.min_area=0.08", "augment.strength=0.0"]
    same = task(tmp_path, *like, "augment.grayscale=0.0")
    advice = advise(same, TrialLengths(64, 3, 60.0), Ran(default=0.52, noise=0.02))
    (other,) = (end for end in advice.finalists if end.gain)
    fit = advice.fit  # its own pairs differ alike, so that the fit alone says how far
    expected = math.sqrt(2 * fit.deviation**2 * fit.freedom / (fit.freedom + 1)) / math.sqrt(2)
    assert other.error == pytest.approx(expected)


def test_levels_whose_trials_collapse_are_as_bad_as_the_worst(tmp_path: Path) -> None:
    advice = advise(task(tmp_path), TrialLengths(64, 3, 60.0), Ran(0.43, broken="rate 0.6"))
    assert advice.fit.num_trials == 12
    assert "rate 0.2" in advice.finalists[0].name
    with pytest.raises(RunError, match=r"6 trials of .* failed, and the same command tries"):
        advise(
            task(tmp_path / "other"),
            TrialLengths(64, 3, 60.0),
            Ran(0.43, broken="rate 0.6", status="failed"),
        )


def test_a_gain_within_chance_is_not_clear(tmp_path: Path) -> None:
    sure = advise(task(tmp_path), TrialLengths(64, 3, 60.0), Ran(default=0.43))
    assert sure.finalists[0].is_clear
    shaken = advise(task(tmp_path / "b"), TrialLengths(64, 3, 60.0), Ran(default=0.5, noise=0.1))
    assert not shaken.finalists[0].is_clear


def test_without_labels_views_are_left_as_they_are(tmp_path: Path) -> None:
    unlabelled = task(tmp_path, "data.test=")
    assert unlabelled.metric == "eval/effective_rank"
    assert unlabelled.note == "there are no labelled test images (--test)"
    assert list(unlabelled.factors) == ["temperature", "rate"]
    settings = tried_of(unlabelled.factors)
    assert len(settings) == 4
    fit = fit_effects(unlabelled.factors, {name_of(s): len(name_of(s)) for s in settings})
    assert fit.freedom == 1


@pytest.mark.parametrize("at_a_time", [1, 2, 4, 64])
def test_minutes_are_filled_by_trials_that_run_so_many_at_a_time(
    at_a_time: int, tmp_path: Path
) -> None:
    wanted = task(tmp_path)
    # 12 trials of one epoch of 5 batches of 16 at 0.16 s, and 0.3 s of evaluation each
    pace = Pace(seconds=0.0, device_seconds=12 * 5 * 0.16, start=9.0, evaluation=12 * 0.3)
    timed = TimeForecast(at_a_time, pace, started_s=5.0, seconds_spent=12.0)
    lengths = lengths_within(wanted, 10.0, timed)
    steps = lengths.epochs * lengths.rows // 16
    waves = -(-12 // at_a_time), -(-6 // at_a_time)
    arithmetic = (waves[0] + 2 * waves[1]) * steps * 0.16
    expected = 12 + 2 * (9 - 5) + sum(waves) * (0.3 + TRIAL_S) + arithmetic
    assert lengths.seconds == pytest.approx(expected)
    assert 0.85 * 600 < lengths.seconds <= 600
    assert lengths.rows <= ROWS
    assert lengths.epochs >= 2


def test_too_few_minutes_are_refused_with_those_that_are_enough(tmp_path: Path) -> None:
    wanted = task(tmp_path)
    pace = Pace(seconds=0.0, device_seconds=12 * 5 * 0.16, start=9.0, evaluation=12 * 0.3)
    timed = TimeForecast(2, pace, started_s=5.0, seconds_spent=12.0)
    with pytest.raises(ConfigError, match=r"in 1 minutes a trial has \d+ steps? of 16") as refused:
        lengths_within(wanted, 1.0, timed)
    enough = float(str(refused.value).split()[-2])
    assert lengths_within(wanted, enough, timed).epochs >= 2
    with pytest.raises(ConfigError):
        lengths_within(wanted, enough - 1, timed)


def test_images_in_the_order_of_their_classes_are_refused_where_few_are_used(
    tmp_path: Path,
) -> None:
    table = pq.read_table("train.parquet")
    pq.write_table(table.sort_by("label"), tmp_path / "sorted.parquet")
    in_order = task(tmp_path, f"data.train={tmp_path / 'sorted.parquet'}")
    ensure_classes(in_order, ROWS)
    with pytest.raises(ConfigError, match=r"the first 40 of 80 images hold 5 of 10 classes"):
        ensure_classes(in_order, 40)
    ensure_classes(task(tmp_path), 40)  # mixed


def test_a_batch_above_the_usual_rows_is_timed_on_some_of_its_own(tmp_path: Path) -> None:
    wanted = task(tmp_path)
    large = wanted.experiment.model_copy(update={"batch_size": 16_384})
    wanted = wanted._replace(experiment=large, num_rows=100_000)
    pace = Pace(seconds=0.0, device_seconds=12 * 4 * 0.16, start=9.0, evaluation=0.0)
    lengths = lengths_within(wanted, 10.0, TimeForecast(2, pace, 5.0, 12.0))
    assert lengths.rows % 16_384 == 0
    assert 0.85 * 600 < lengths.seconds <= 600


def test_workers_on_gpus_share_a_step_and_each_trial_starts_its_own(tmp_path: Path) -> None:
    wanted = task(tmp_path)
    scaling = wanted.experiment.scaling
    pace = Pace(seconds=0.0, device_seconds=12 * 5 * 0.16, start=25.0, evaluation=0.0)

    def seconds(workers: int, gpus: float) -> float:
        changed = {"num_workers": workers, "gpus_per_worker": gpus}
        on = wanted.experiment.model_copy(update={"scaling": scaling.model_copy(update=changed)})
        lengths = lengths_within(
            wanted._replace(experiment=on), 60.0, TimeForecast(1, pace, 5.0, 12.0)
        )
        starts = 18 if gpus else 2  # of 20 s each: of trials, or of the two studies
        rest = lengths.seconds - 12 - starts * 20 - 18 * TRIAL_S
        return rest / (lengths.epochs * lengths.rows)

    steps = 24 / 16  # for an image: 12 short trials and 6 of twice the length
    assert seconds(1, 0.0) == pytest.approx(steps * 0.16)
    assert seconds(1, 1.0) == pytest.approx(steps * 0.16)
    assert seconds(4, 1.0) == pytest.approx(steps * 0.16 / 4)


def test_a_test_set_alone_cannot_tell_and_the_remedy_is_named(tmp_path: Path) -> None:
    train = pq.read_table("train.parquet").drop_columns(["label"])
    pq.write_table(train, tmp_path / "unlabelled.parquet")
    note = task(tmp_path, f"data.train={tmp_path}/unlabelled.parquet").note
    assert note.endswith("has no labels; data.eval_train names labelled images")
    labelled = f"data.eval_train={Path('train.parquet').absolute()}"
    assert task(tmp_path, f"data.train={tmp_path}/unlabelled.parquet", labelled).note == ""


def test_a_small_preset_is_chosen_for_small_images(tmp_path: Path) -> None:
    words = [f"data.train={Path('train.parquet').absolute()}", "data.test=", "batch_size=16"]
    assert advice_task("a", "", [*words, f"storage={tmp_path}"]).base == "cifar10_laptop"
    buffer = io.BytesIO()
    Image.new("RGB", (200, 100), (9, 9, 9)).save(buffer, "JPEG")
    pq.write_table(pa.table({"image": [buffer.getvalue()] * 80}), tmp_path / "large.parquet")
    words[0] = f"data.train={tmp_path / 'large.parquet'}"
    assert advice_task("a", "", [*words, f"storage={tmp_path}"]).base == "photos_cpu"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.parquet", "batch_size=32"], "80 images are too few to tell settings apart"),
        (["train.parquet", "loss.name=triplet"], "must have a temperature that is not learned"),
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
