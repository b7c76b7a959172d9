"""What is wrong in study files: a line each that names the key and what to do, and exit code 2."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.laptop import is_done
from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import ConfigError, RunError
from simclr_ray.storage import lease
from simclr_ray.studies.driver import checked_images, run_study
from simclr_ray.studies.files import load_study
from simclr_ray.studies.folder import StudyFolder, TrialOutcome
from simclr_ray.studies.plan import base_tree, study_folder
from simclr_ray.studies.settings import digest_of_study
from simclr_ray.studies.trials import plan
from tests.ray.images import write_shapes
from tests.unit.cli.in_process import enter, run

BASE = """\
name: base
data: {train: train.parquet, test: test.parquet}
batch_size: 16
epochs: 2
encoder: {name: resnet, depth: 10, width: 0.125, stem: strided}
"""
TAU = "loss.temperature"
STUDY: dict[str, Any] = {
    "name": "mine",
    "question": "Which temperature?",
    "base": "base.yaml",
    "space": {TAU: {"grid": [0.1, 0.5]}},
    "metric": "eval/knn_top1",
    "protocols": [],
}
RANDOM = {"name": "random", "trials": 3}
PAPER = {"source": "Table 5", "metric": "top-1", "columns": [TAU], "rows": [[0.1, 64.4]]}


def test_images_that_one_arm_alone_has_are_those_of_the_start_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    for name in ("train", "other", "test"):
        write_shapes(tmp_path / f"{name}.parquet", 40)
    space = {"data.train": {"grid": ["train.parquet", "other.parquet"]}}
    (tmp_path / "s.yaml").write_text(json.dumps(STUDY | {"space": space}))
    study = load_study("s.yaml")
    trials, folder = plan(study, base_tree(study)), StudyFolder(*study_folder(study))
    experiments = [cfg.validate(Experiment, base_tree(study)), *(t.experiment for t in trials)]
    first = checked_images(folder, experiments)
    assert set(first) == {"train", "test", "train 1"}
    folder.update_state(fingerprints=first)
    assert checked_images(folder, experiments) == first
    write_shapes(tmp_path / "other.parquet", 41)
    with pytest.raises(ConfigError, match=r"data.train: .*other.parquet has changed since"):
        checked_images(folder, experiments)
    folder.update_state(fingerprints={"train": first["train"], "test": first["test"]})
    checked_images(folder, experiments)  # of a study that an earlier release began


def test_a_kept_study_is_done_only_by_its_own_definition_and_images_without_failed_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    for name in ("train", "other", "test"):
        write_shapes(tmp_path / f"{name}.parquet", 40 + (name == "other"))
    (tmp_path / "s.yaml").write_text(json.dumps(STUDY))
    study = load_study("s.yaml")
    folder, base = StudyFolder(*study_folder(study)), cfg.validate(Experiment, base_tree(study))
    folder.write_definition(study, base, digest_of_study(study, base))
    assert not is_done(study)  # its start ended early
    folder.update_state(fingerprints=checked_images(folder, [base]), is_complete=True)
    assert is_done(study)
    folder.write_outcome(TrialOutcome("t", "failed", "disk full", [], 0, {}, {}, {}, {}))
    assert not is_done(study)
    with pytest.raises(ConfigError, match="holds a study of this name with another definition"):
        is_done(load_study("s.yaml", "", "epochs=3"))
    with pytest.raises(ConfigError, match=r"data.train: .*other.parquet has changed since"):
        is_done(load_study("s.yaml", "", "data.train=other.parquet"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base and its images."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "base.yaml").write_text(BASE)
    write_shapes(folder / "train.parquet", 40)
    write_shapes(folder / "test.parquet", 20)
    return folder


@pytest.fixture(autouse=True)
def _there(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(files, monkeypatch)


def space(**dimension: Any) -> dict[str, Any]:
    return {"space": {TAU: dimension}}


def claim(better: Any, worse: Any) -> dict[str, Any]:
    return {"comparisons": [{"claim": "c", "better": better, "worse": worse}]}


def cases(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {"l": {"cases": {"one": one, "other": other}}}


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    # what is wrong in the file, by key, and words of the line
    ({"seed": [0]}, ["seed", "'seeds'"]),
    ({"base": "cifar10"}, ["cifar10", "'cifar10_cpu'"]),
    ({"base": "study.yaml"}, ["study.yaml", "no experiment", "question"]),
    ({"name": "a/b"}, ["name: got 'a/b'; it must match"]),
    ({"search": "random"}, ["search", "keys and values"]),
    ({"search": {"name": "bayes"}}, ["search.name", "grid, random, optuna"]),
    ({"search": {"name": "random"}}, ["search.trials"]),
    (space(uniform=[0.1, 0.5]), ["search.name=grid", TAU]),
    # space
    ({"space": {}}, ["space", "nothing varies"]),
    ({"space": {TAU: [0.1, 0.5]}}, [f"space.{TAU}", "{grid: [0.1, 0.5]}"]),
    (space(values=[0.1, 0.5]), [f"space.{TAU}.values", "grid, loguniform"]),
    (space(grid=[]), [f"space.{TAU}", "empty"]),
    (space(grid=[0.1, 0.1]), [f"space.{TAU}", "twice"]),
    (space(grid=["low", "high"]), [TAU, "'low'", "number"]),
    (space(grid=[0.1, -1]), [TAU, "got -1"]),
    (space(uniform=[-2.0, -1.0]) | {"search": RANDOM}, [TAU, "greater than"]),
    (space(uniform=[0.5, 0.1]) | {"search": RANDOM}, [f"space.{TAU}", "low below high"]),
    ({"space": {"loss.temp": {"grid": [0.1]}}}, ["loss.temp", "'temperature'"]),
    ({"space": {"epochs.max": {"grid": [1]}}}, ["epochs.max", "has no keys"]),
    ({"space": {"seed": {"grid": [0, 1]}}}, ["seed", "`seeds`"]),
    ({"space": cases({"augment.a+": 3}, {})}, ["augment.a+", "list"]),
    (
        {"space": cases({TAU: 0.2}, {TAU: 0.3}) | {TAU: {"grid": [0.1]}}},
        [f"space.{TAU}", "space.l", "never count"],
    ),
    ({"set": ["epochs=3"]}, ["set", "keys and values"]),
    ({"set": {"epocs": 3}}, ["epocs", "'epochs'"]),
    ({"set": {"health.on_divergence": "rollback"}}, ["health: rollback", "not in studies"]),
    ({"space": cases({"health.on_collapse": "rollback"}, {})}, ["health: rollback"]),
    # seeds, metric, protocols
    ({"seeds": 3}, ["seeds: got 3", "list"]),
    ({"seeds": []}, ["seeds", "at least 1 item"]),
    ({"seeds": [0, 0]}, ["seeds", "twice"]),
    ({"seeds": [-1]}, ["seeds.0: got -1"]),
    ({"metric": "eval/knn_top"}, ["'eval/knn_top'", "'eval/knn_top1'"]),
    ({"metric": "final/linear_top1"}, ["'final/linear_top1'", "'linear' in protocols"]),
    ({"extra_metrics": ["acc"]}, ["extra_metrics", "'acc'"]),
    ({"mode": None}, ["mode", "max, min"]),
    ({"set": {"data.test": ""}}, ["metric", "data.test is empty"]),
    ({"protocols": ["kn"]}, ["protocols.0", "'knn'"]),
    ({"protocols": ["knn", "knn"]}, ["protocols", "twice"]),
    # scheduler, budget, machine
    ({"scheduler": {"name": "hyperband"}}, ["scheduler.name", "none, asha, median"]),
    ({"scheduler": {"name": "asha", "grace_epochs": 9}}, ["scheduler.grace_epochs", "at most 2"]),
    ({"budget": {"trials": 1}}, ["budget.trials", "2 trials"]),
    ({"concurrency": 10_000}, ["10000 trials", "core"]),
    ({"set": {"scaling.gpus_per_worker": 99}}, ["scaling.gpus_per_worker=99"]),
    ({"set": {"tracking.uri": "foo://x"}}, ["tracking.uri", "foo://"]),
    ({"space": {"batch_size": {"grid": [8, 4096]}}}, ["batch_size-4096", "40 rows"]),
    # figure, claims, paper
    ({"figure": {"x": "tau"}}, ["'tau'", TAU]),
    ({"figure": {"x": TAU, "series": TAU}}, ["figure", "must differ"]),
    (claim({TAU: 0.2}, {TAU: 0.5}), ["'c'", f"{TAU}=0.2", "0.1, 0.5"]),
    (claim({TAU: "0.1"}, {TAU: 0.5}), ["'c'", f"{TAU}='0.1'", "0.1, 0.5"]),
    (claim({TAU: 0.1}, {TAU: 0.1}), ["'c'", "the same"]),
    (claim({"tau": 0.1}, {"tau": 0.5}), ["'tau'", TAU]),
    ({"paper": PAPER | {"matches": {"tau": {"1": 2}}}}, ["paper.matches", "'tau'"]),
    ({"paper": PAPER | {"matches": {TAU: {"0.3": 0.1}}}}, [f"paper.matches.{TAU}", "0.3"]),
    ({"paper": PAPER | {"rows": [[0.1, None]]}}, ["paper.rows.0.1", "None"]),
    ({"paper": PAPER | {"rows": [[0.1, "64 %"]]}}, ["paper", "a number"]),
    # scales
    ({"scales": {"cpu": {"seedz": [1]}}}, ["seedz", "'seeds'"]),
    ({"scales": {"cpu": {"set": None}}, "set": {"epochs": 1}}, ["set: got None"]),
    ({"scales": ["cpu"]}, ["scales", "mapping"]),
    ({"scales": {"cpu": {}, "gpu": {"seeds": []}}}, ["seeds", "at least 1 item"]),
]


@pytest.mark.parametrize(("changes", "told"), REFUSED, ids=lambda part: str(part)[:60])
def test_what_is_wrong_in_a_study_file_is_one_line_and_exit_code_2(
    changes: dict[str, Any], told: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("study.yaml").write_text(json.dumps(STUDY | changes))
    ended = run(["study", "run", "study.yaml"], capsys)
    assert ended.code == 2, ended
    assert len(ended.problems) == 1, ended
    assert ended.problems[0].startswith("error: ")
    for part in told:
        assert part in ended.problems[0]


def test_a_study_of_scales_needs_no_numbers_of_a_paper(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("study.yaml").write_text(
        json.dumps(STUDY | {"scales": {"cpu": {"budget": {"trials": 1}}}})
    )
    ended = run(["study", "run", "study.yaml"], capsys)
    assert ended.problems == [
        "error: budget.trials: 2 trials are wanted, budget.trials=1 allows fewer"
    ]


def test_a_file_of_another_tool_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("sweep.yaml").write_text(
        "program: train.py\nmethod: bayes\nparameters: {lr: {min: 0.1, max: 1}}\n"
    )
    ended = run(["study", "run", "sweep.yaml"], capsys)
    Path("sweep.yaml").unlink()
    (line,) = ended.problems
    assert line.startswith("error: sweep.yaml: holds no study: unknown keys program, method")


def test_a_driver_that_is_refused_does_not_withdraw_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.2)
    monkeypatch.setattr(lease, "POLL_S", 0.05)
    monkeypatch.setattr("simclr_ray.studies.driver.LOOKED_AT_S", 0.0)
    Path("study.yaml").write_text(json.dumps(STUDY))
    study = load_study("study.yaml", "", f"storage={tmp_path.as_uri()}")
    folder = StudyFolder(*study_folder(study))
    folder.request_stop()
    with (
        folder.files.lock(),
        ThreadPoolExecutor(1) as pool,  # a thread that holds a folder may hold it again
        pytest.raises(RunError, match="is being run by process"),
    ):
        pool.submit(run_study, study).result()
    assert folder.stop_requested()
