"""`study plan`: from stored studies to what a budget is expected to give."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.study_plan import HeldOut, held_out, verdict_of
from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import ConfigError
from simclr_ray.studies.accuracy_plan import plan_of
from simclr_ray.studies.analysis import as_json, results_of
from simclr_ray.studies.definition import Study
from simclr_ray.studies.expected_accuracy import fit_accuracy
from simclr_ray.studies.files import load_study
from simclr_ray.studies.folder import StudyFolder, TrialOutcome
from simclr_ray.studies.plan import base_tree, make_trials, points_of
from simclr_ray.studies.settings import digest_of_study
from simclr_ray.studies.stored_points import read_stored, studies_in
from tests.unit.cli.in_process import enter
from tests.unit.cli.in_process import run as run_here
from tests.unit.cli.test_app import ROOT, errors, run

KEPT = ROOT / "docs" / "studies"
IMAGES, SPEED = 1000, 250.0  # an epoch's, and of one device


def accuracy(temperature: float, epoch: int, seed: int) -> float:
    """Return a known law of three settings, with noise of the seed."""
    noise = 0.003 * np.random.default_rng([seed, epoch, round(100 * temperature)]).standard_normal()
    return 0.7 - 0.1 * temperature - 0.4 / math.sqrt(epoch) + float(noise)


def stored(
    storage: Path,
    decay: str = "cosine",
    lengths: tuple[int, ...] = (4, 8, 16),
    more: dict[str, Any] | None = None,
) -> str:
    """Store a finished study, and return its folder."""
    tree: dict[str, Any] = {
        "name": "lengths",
        "question": "?",
        "base": "cifar10_study_cpu",
        "set": {"storage": str(storage), "schedule.decay": decay, **(more or {})},
        "space": {"loss.temperature": {"grid": [0.1, 0.5]}, "epochs": {"grid": list(lengths)}},
        "metric": "eval/knn_top1",
        "protocols": [],
        "seeds": [0, 1],
    }
    study = cfg.validate(Study, tree)
    base = base_tree(study)
    experiment = cfg.validate(Experiment, base)
    folder = StudyFolder(str(storage / "studies"), study.name)
    folder.write_definition(study, experiment, digest_of_study(study, experiment))
    for trial in make_trials(study, base, points_of(study)):
        tau, last = float(trial.point["loss.temperature"]), int(trial.point["epochs"])
        curve = {
            e: {"eval/knn_top1": accuracy(tau, e, trial.seed)}
            for e in (range(1, last + 1) if decay == "constant" else [last])
        }
        images = float(IMAGES * last)
        cost = {"images": images, "seconds": images / SPEED, "device_seconds": images / SPEED}
        cells = [cell._asdict() for cell in trial.cells]
        where = {"folder": f"{folder.uri}/runs/{trial.name}-00000000"}
        folder.write_outcome(
            TrialOutcome(trial.name, "finished", "", cells, trial.seed, {}, curve, cost, where)
        )
    return folder.uri


def kept(folder: Path, seeds: int = 2) -> dict[str, Any]:
    """Store results as a report keeps them, of three settings at three lengths; return the tree."""
    rows = []
    for tau in (0.1, 0.3, 0.5):
        for epochs in (4, 8, 16):
            values = [accuracy(tau, epochs, seed) for seed in range(seeds)]
            row = {
                "point": {"loss.temperature": tau, "epochs": epochs},
                "mean": float(np.mean(values)),
                "deviation": float(np.std(values, ddof=1)),
                "num_seeds": seeds,
                "images": float(IMAGES * epochs),
                "device_hours": IMAGES * epochs / SPEED / 3600,
            }
            rows.append(row)
    epochs = seeds * 3 * (4 + 8 + 16)
    tree = {
        "study": "kept",
        "metric": "final/knn_top1",
        "rows": rows,
        "epochs": epochs,
        "images": IMAGES * epochs,
    }
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(tree))
    return tree


def test_a_folder_gives_every_run_with_its_length_and_speed(tmp_path: Path) -> None:
    study = read_stored(stored(tmp_path))
    assert len(study.points) == 2 * 3 * 2
    assert {p.images for p in study.points} == {4000.0, 8000.0, 16000.0}
    assert {p.setting for p in study.points} == {"loss.temperature=0.1", "loss.temperature=0.5"}
    assert len({p.run for p in study.points}) == 12  # each length is a run of its own
    assert study.images_per_epoch == IMAGES
    assert list(study.images_per_s.values()) == [pytest.approx(SPEED)] * 2
    for point in study.points:
        seed, tau = int(point.run[-1]), float(point.setting.partition("=")[2])
        assert point.value == accuracy(tau, round(point.images / IMAGES), seed)


def test_a_report_gives_the_points_of_its_folder_and_the_same_interval(tmp_path: Path) -> None:
    folder = StudyFolder.at(stored(tmp_path))
    study, _ = folder.definition()
    (tmp_path / "results.json").write_text(as_json(results_of(study, folder.outcomes())))
    ours, theirs = read_stored(folder.uri), read_stored(str(tmp_path))
    assert sorted(ours.points) == sorted(theirs.points)
    factors = [fit_accuracy(study.points).factor for study in (ours, theirs)]
    assert factors[0] == pytest.approx(factors[1])
    assert ours.images_per_epoch == theirs.images_per_epoch


def test_a_run_that_stands_for_several_points_has_measured_once(tmp_path: Path) -> None:
    """Without a head the width of its output is nothing: one run is all widths."""
    study = load_study("projection_head", "imagenet", "study.seeds=[0, 1]", f"storage={tmp_path}")
    base = base_tree(study)
    experiment = cfg.validate(Experiment, base)
    folder = StudyFolder(str(tmp_path), study.name)
    folder.write_definition(study, experiment, digest_of_study(study, experiment))
    for trial in make_trials(study, base, points_of(study)):
        value = {"none": 0.6, "linear": 0.4, "nonlinear": 0.5}[str(trial.point["head"])]
        metrics = {"final/linear_top1": value + 0.01 * trial.seed}
        cost = {"images": 1000.0, "seconds": 4.0, "device_seconds": 4.0, "epochs": 1.0}
        cells = [cell._asdict() for cell in trial.cells]
        where = {"folder": f"{folder.uri}/runs/{trial.name}-00000000"}
        folder.write_outcome(
            TrialOutcome(trial.name, "finished", "", cells, trial.seed, metrics, {}, cost, where)
        )
    (tmp_path / "results.json").write_text(as_json(results_of(study, folder.outcomes())))
    for place in (folder.uri, str(tmp_path)):
        stored_study = read_stored(place)
        none = [p for p in stored_study.points if p.setting.startswith("head=none")]
        assert [p.value for p in none] == pytest.approx([0.6, 0.61])
        assert len(stored_study.points) == 2 * (1 + 7 + 7)
        (row,) = plan_of(stored_study, [4.0 / 3600]).rows
        assert row.setting == none[0].setting == "head=none, head.dim=2048"


def test_of_a_constant_rate_every_epoch_of_a_curve_is_a_length(tmp_path: Path) -> None:
    study = read_stored(stored(tmp_path, "constant"))
    assert {p.images / IMAGES for p in study.points} == {16, 11, 7, 5, 3, 2, 1}
    assert len(study.points) == 7 * 4


def test_a_budget_gets_the_best_setting_its_images_and_what_to_expect(tmp_path: Path) -> None:
    study = read_stored(stored(tmp_path))
    hours = [12 * IMAGES / SPEED / 3600, 400 * IMAGES / SPEED / 3600]
    short, long = plan_of(study, hours).rows
    assert (short.setting, long.setting) == ("loss.temperature=0.1",) * 2
    assert short.epochs == pytest.approx(12)
    assert short.images == pytest.approx(12 * IMAGES)
    assert (short.expected.measured, long.expected.measured) == ("yes", "beyond")
    assert short.expected.value == pytest.approx(0.69 - 0.4 * 12**-0.5, abs=0.01)
    assert long.expected.low <= 0.69 - 0.4 * 400**-0.5 <= long.expected.high
    assert long.expected.high - long.expected.low > short.expected.high - short.expected.low
    (faster,) = plan_of(study, hours[:1], images_per_s=2 * SPEED).rows
    assert faster.epochs == pytest.approx(24)


def test_two_seeds_of_kept_results_are_the_two_readings(tmp_path: Path) -> None:
    tree = kept(tmp_path / "kept")
    study = read_stored(str(tmp_path / "kept" / "results.json"))
    assert study.images_per_epoch == IMAGES
    assert len(study.points) == 2 * len(tree["rows"])
    for number, row in enumerate(tree["rows"]):
        values = [p.value for p in study.points[2 * number : 2 * number + 2]]
        assert np.mean(values) == pytest.approx(row["mean"])
        assert np.std(values, ddof=1) == pytest.approx(row["deviation"])
    # of a run that passes through lengths the seeds cannot be told apart from length to length
    for row in tree["rows"]:
        row["runs"] = {"0": "runs/one", "1": "runs/two"}
    (tmp_path / "results.json").write_text(json.dumps(tree))
    points = read_stored(str(tmp_path)).points
    assert [(p.num_seeds, p.deviation) for p in points] == [
        (2, row["deviation"]) for row in tree["rows"]
    ]
    assert len({p.run for p in points}) == 3


def test_kept_results_that_have_their_seeds_are_read_as_a_folder_is(tmp_path: Path) -> None:
    tree = kept(tmp_path, seeds=4)
    for row in tree["rows"]:
        point = row["point"]
        row["value_by_seed"] = {
            str(seed): accuracy(point["loss.temperature"], point["epochs"], seed)
            for seed in range(4)
        }
    (tmp_path / "results.json").write_text(json.dumps(tree))
    study = read_stored(str(tmp_path))
    assert len(study.points) == len({p.run for p in study.points}) == 4 * 9
    assert {p.num_seeds for p in study.points} == {1}
    for point in study.points:
        tau, seed = float(point.setting.partition("=")[2]), int(point.run[-1])
        assert point.value == accuracy(tau, round(point.images / IMAGES), seed)
    for row in tree["rows"]:  # runs that go on through all lengths
        row["runs"] = {str(seed): f"runs/{seed}" for seed in range(4)}
    (tmp_path / "results.json").write_text(json.dumps(tree))
    points = read_stored(str(tmp_path)).points
    assert (len(points), len({p.run for p in points})) == (4 * 9, 4 * 3)


def test_a_mean_of_seeds_is_held_against_the_interval_of_such_a_mean(tmp_path: Path) -> None:
    kept(tmp_path, seeds=6)
    study = read_stored(str(tmp_path))
    assert {point.num_seeds for point in study.points} == {6}
    (first, *_) = held_out(study)
    rest = [p for p in study.points if p.run != study.points[0].run]
    fit = fit_accuracy(rest)
    setting, images = study.points[0].setting, study.points[0].images
    one, six = fit.expect(setting, images), fit.expect(setting, images, 6)
    assert (first.low, first.high) == (six.low, six.high)
    assert six.high - six.low < one.high - one.low


def test_a_setting_without_a_result_is_not_planned(tmp_path: Path) -> None:
    study = read_stored(stored(tmp_path))
    failed = {**study.images_per_s, "loss.temperature=9": 10 * SPEED}
    for lengths in (study.points, [p for p in study.points if p.images == study.points[0].images]):
        plan = plan_of(study._replace(images_per_s=failed, points=lengths), [1.0])
        assert {row.setting for row in plan.rows} == {"loss.temperature=0.1"}


def test_epochs_of_views_that_grow_are_no_lengths(tmp_path: Path) -> None:
    grows = {"augment.start_size": 16, "augment.size": 24}
    assert len(read_stored(stored(tmp_path, "constant", more=grows)).points) == 2 * 3 * 2


def test_a_study_of_one_length_says_that_it_cannot_be_extrapolated() -> None:
    tree = json.loads((KEPT / "temperature" / "results.json").read_text())
    best = max(tree["rows"], key=lambda row: row["mean"])
    plan = plan_of(read_stored(str(KEPT / "temperature")), [1.0, 10.0])
    (row,) = plan.rows
    assert row.expected.measured == "yes"
    assert row.setting == f"loss={best['point']['loss']}"
    assert "cannot be extrapolated" in plan.note


def test_what_is_no_study_and_what_is_no_accuracy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no study"):
        read_stored(str(tmp_path))
    (tmp_path / "results.json").write_text('{"rows": [{}]}')
    with pytest.raises(ConfigError, match="holds no results"):
        read_stored(str(tmp_path))
    tree = kept(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(tree | {"metric": "train/mean_loss"}))
    with pytest.raises(ConfigError, match="is no accuracy"):
        read_stored(str(tmp_path))


def test_the_verb_shows_a_table_and_writes_json(tmp_path: Path) -> None:
    folder = stored(tmp_path / "runs")
    assert studies_in(str(tmp_path / "runs")) == [folder]
    done = run("study", "plan", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "longer" in done.stdout
    record = tmp_path / "plan.json"
    kept = str(KEPT / "temperature")
    done = run("study", "plan", folder, kept, "--json", str(record), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(record.read_text())["studies"]
    assert [round(row["device_hours"]) for row in first["rows"]] == [1, 10, 100]
    assert [row["images"] for row in first["rows"]] == [
        pytest.approx(3600 * SPEED * hours) for hours in (1, 10, 100)
    ]
    for row in first["rows"]:
        expected = row["expected"]
        assert 0 <= expected["low"] <= expected["value"] <= expected["high"] <= 1
    assert "cannot be extrapolated" in second["note"]


def test_json_on_the_terminal_is_nothing_but_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(tmp_path, monkeypatch)
    stored(tmp_path / "runs")
    (tmp_path / "runs" / "studies" / "broken").mkdir()
    ended = run_here(["study", "plan", "--json", "-"], capsys)
    assert [study["study"] for study in json.loads(ended.stdout)["studies"]] == ["lengths"]
    (line,) = ended.problems
    assert line.startswith("left out  ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "holds no study"),
        (["--device-hours", "0"], "must be numbers above 0"),
        (["--images-per-s", "-1"], "must be above 0"),
        ([str(KEPT / "grid_9")], "no setting has two runs"),
    ],
    ids=["none stored", "no hours", "no speed", "no seeds"],
)
def test_what_cannot_be_planned_ends_in_2_with_a_line(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    done = run("study", "plan", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = errors(done)
    assert words in line


def test_the_check_holds_out_whole_runs_and_gives_no_verdict_on_few_points(tmp_path: Path) -> None:
    kept(tmp_path)
    results = list(held_out(read_stored(str(tmp_path))))
    ways = [result.way for result in results]
    assert (ways.count("run"), ways.count("point"), ways.count("longest")) == (18, 18, 6)
    assert verdict_of(results[:18]).startswith("too few points")
    inside = HeldOut("s", True, "run", 0.5, 0.5, 0.47, 0.53)
    outside, wide = inside._replace(value=0.6), inside._replace(low=0.4, high=0.6)
    assert verdict_of([inside] * 18 + [outside] * 2).startswith("met: 18 of 20")
    assert verdict_of([inside] * 17 + [outside] * 3).startswith("not met")
    assert verdict_of([wide] * 20).startswith("not met")
    assert math.isclose(inside.high - inside.low, 0.06)
