"""Studies under Ray Tune: outcomes, MLflow, kills, and what a scheduler has ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from simclr_ray import config as cfg
from simclr_ray.cli.signals import STOPPED_BY_SYSTEM
from simclr_ray.errors import ClusterError, ConfigError, DataError, RunError
from simclr_ray.studies import step_timing
from simclr_ray.studies.driver import run_study
from simclr_ray.studies.files import load_study
from simclr_ray.studies.folder import StudyFolder
from simclr_ray.studies.plan import base_tree, study_folder
from simclr_ray.studies.report import publish_report
from simclr_ray.studies.step_timing import TRIAL_S, pace_of
from simclr_ray.studies.trials import plan
from tests.ray.images import write_splits
from tests.ray.test_pretrain import tree_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("study"), 130)


def study_file(folder: Path, storage: str, **changes: Any) -> Path:
    base = {**tree_of(folder, storage, 1, "float32"), "epochs": 2}
    base["evaluation"] = {"every_epochs": 1, "linear": {"epochs": 3}}
    base["scaling"] = {"threads_per_worker": 1}
    (folder / f"{storage}.base.yaml").write_text(cfg.dump_yaml(base))
    study = {
        "name": "s",
        "question": "?",
        "answers": "nothing",
        "base": str(folder / f"{storage}.base.yaml"),
        "space": {"loss.temperature": {"grid": [0.1, 0.5]}},
        "figure": {"x": "loss.temperature"},
        "comparisons": [
            {
                "claim": "0.1 beats 0.5",
                "better": {"loss.temperature": 0.1},
                "worse": {"loss.temperature": 0.5},
            }
        ],
        "paper": {"source": "-", "metric": "-", "columns": ["loss.temperature"], "rows": []},
        **changes,
    }
    path = folder / f"{storage}.yaml"
    path.write_text(cfg.dump_yaml(study))
    return path


def runs_of(folder: StudyFolder) -> dict[str, Any]:
    """Return name -> MLflow run: the study's, its children and theirs."""
    state = folder.state()
    client = MlflowClient(state["tracking_uri"])
    found = {"": client.get_run(state["mlflow_run_id"])}
    experiments = [found[""].info.experiment_id]
    for parent in (found[""], *client.search_runs(experiments, "tags.study = 's'")):
        wanted = f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
        found |= {run.info.run_name: run for run in client.search_runs(experiments, wanted)}
    return found


def facts(folder: StudyFolder) -> dict[str, Any]:
    """Return everything of a study that must repeat bit for bit."""
    publish_report(folder)
    results = json.loads((Path(folder.uri) / "report" / "results.json").read_text())
    keys = ("point", "mean", "deviation", "num_seeds", "extra_metrics", "paper", "images")
    return {
        "outcomes": {
            o.trial: (o.status, o.cells, o.seed, o.metrics, o.curve) for o in folder.outcomes()
        },
        "rows": [{k: row[k] for k in keys} for row in results["rows"]],
        "claims": results["claims"],
        "figure": (Path(folder.uri) / "report" / "figure.svg").read_text(),
    }


def test_a_study_ends_with_outcomes_and_one_family_of_mlflow_runs(
    folder: Path, ray_cluster: str
) -> None:
    cases = {
        "fine": {"loss.temperature": 0.2},
        "diverging": {"optimizer.name": "sgd", "schedule.learning_rate": 1e30},
    }
    space = {"setting": {"cases": cases}}
    study = load_study(
        str(study_file(folder, "first", space=space, figure={"x": "setting"}, comparisons=[]))
    )
    study_folder = run_study(study, command="the command")
    by_name = {o.trial: o for o in study_folder.outcomes()}
    fine, lost = by_name["setting-fine_seed-0"], by_name["setting-diverging_seed-0"]
    assert (fine.status, sorted(fine.curve)) == ("finished", [1, 2])
    assert {"final/linear_top1", "final/knn_top1", "downstream_top1"} <= set(fine.metrics)
    assert lost.status == "collapsed", lost.reason
    assert "not finite" in lost.reason
    publish_report(study_folder)
    runs = runs_of(study_folder)
    statuses = {name.split("_seed")[0]: run.info.status for name, run in runs.items()}
    assert statuses == {
        "": "FINISHED",
        "setting-fine": "FINISHED",
        "setting-diverging": "FAILED",
    } | {name: "FINISHED" for name in statuses if name.endswith("-evaluation")}
    (child,) = (r for r in runs.values() if r.info.run_id == fine.run["mlflow_run_id"])
    shown = {"seed", "rest", "loss.temperature", "optimizer.name", "schedule.learning_rate"}
    assert set(child.data.params) <= shown
    assert len(runs) == 4  # with the evaluation of the one that finished
    client = MlflowClient(study_folder.state()["tracking_uri"])
    files = {f.path for f in client.list_artifacts(runs[""].info.run_id, "report")}
    drawn = {
        f"{name}.{ending}" for name in ("figure", "curves") for ending in ("png", "svg", "pdf")
    }
    wanted = drawn | {"report.html", "results.md", "results.json", "results.csv"}
    assert {f"report/{name}" for name in wanted} == files

    logs = [Path(o.run["folder"], "metrics.jsonl") for o in by_name.values() if o.run]
    stamps = [log.stat().st_mtime_ns for log in logs]
    before = facts(study_folder)
    run_study(study)
    assert [log.stat().st_mtime_ns for log in logs] == stamps  # nothing is run again
    assert facts(study_folder) == before


def test_a_name_that_is_taken_by_another_definition_is_refused(
    folder: Path, ray_cluster: str
) -> None:
    study = load_study(str(study_file(folder, "taken", budget={"hours": 1e-9})))
    taken = run_study(study)  # out of time at once
    assert not taken.outcomes()
    other = load_study(str(study_file(folder, "taken")), "", "study.seeds=[5]")
    with pytest.raises(ConfigError, match="another definition"):
        run_study(other)
    assert runs_of(taken)[""].info.status == "KILLED"


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_search_that_learns_suggests_its_points_and_goes_on_from_them(
    folder: Path, ray_cluster: str
) -> None:
    space = {
        "loss.temperature": {"loguniform": [0.05, 1.0]},
        "schedule.learning_rate": {"choice": [0.3, 3.0]},
    }
    settings: dict[str, Any] = {
        "space": space,
        "search": {"name": "optuna", "trials": 3, "seed": 1},
        "metric": "eval/knn_top1",
        "protocols": [],
        "set": {"epochs": 1},
        "figure": {"x": "loss.temperature"},
        "comparisons": [],
    }
    study = load_study(str(study_file(folder, "searched", **settings)))
    searched = run_study(study)
    outcomes = {o.trial: o for o in searched.outcomes()}
    assert len(outcomes) == 3
    for outcome in outcomes.values():
        assert outcome.status == "finished"
        point = outcome.cells[0]["point"]
        assert 0.05 <= point["loss.temperature"] <= 1.0
        assert point["schedule.learning_rate"] in ("0.3", "3.0", 0.3, 3.0)
        assert 0 <= outcome.curve[1]["eval/knn_top1"] <= 1
    publish_report(searched)

    stamps = {name: Path(o.run["folder"]).stat().st_mtime_ns for name, o in outcomes.items()}
    run_study(study)  # it suggests the same, is told the same, and trains nothing
    again = {o.trial: o for o in searched.outcomes()}
    assert again == outcomes
    assert {n: Path(o.run["folder"]).stat().st_mtime_ns for n, o in again.items()} == stamps


def test_a_dry_run_times_steps_and_leaves_nothing_behind(folder: Path, ray_cluster: str) -> None:
    cases = {
        "contrastive": {"loss.temperature": 0.5},
        "supervised": {"loss": {"name": "cross_entropy"}, "head": {"name": "classifier"}},
        "in groups": {"batch_norm.group_size": 16},
    }
    space = {"learning": {"cases": cases}}
    source = study_file(folder, "paced", space=space, figure={"x": "learning"}, comparisons=[])
    study = load_study(str(source), "", "study.seeds=[0,1]")
    trials = plan(study, base_tree(study))
    paces = [pace_of(trials, 2) for _ in range(3)]  # Ray once died of what had just ended
    pace = paces[-1]
    assert pace.seconds > 0
    one_after_the_other = pace.device_seconds + pace.evaluation + len(trials) * TRIAL_S
    two_at_a_time = pace.seconds - pace.start
    assert one_after_the_other / 2 <= two_at_a_time + 1e-9 < one_after_the_other
    assert not Path(*study_folder(study)).exists()  # nothing is left of it


@pytest.mark.usefixtures("ray_cluster")
def test_what_keeps_steps_from_being_timed_is_said_as_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(*overrides: str) -> None:
        study = load_study(str(source), "", "study.seeds=[0]", *overrides)
        pace_of(plan(study, base_tree(study)), 1)

    space = {"temperature": {"cases": {"low": {"loss.temperature": 0.5}}}}
    source = study_file(folder, "untimed", space=space, figure={"x": "temperature"}, comparisons=[])
    broken = folder / "broken.parquet"
    pq.write_table(pa.table({"image": [b"no image"] * 64, "label": [0, 1] * 32}), broken)
    with pytest.raises(DataError, match=r"broken.parquet: none of 64 .* can be used"):
        timed(f"data.train={broken}")
    monkeypatch.setattr(step_timing, "FREE_S", 3)
    with pytest.raises(ClusterError, match="no worker's share of the cluster came free within 3 s"):
        timed("scaling.cpus_per_worker=64")
    monkeypatch.setattr(step_timing, "FREE_S", 60)
    monkeypatch.setattr(step_timing, "_TimingWorker", DyingWorker)
    with pytest.raises(RunError, match=r"a step could not be timed: .*died") as died:
        timed()
    assert len(str(died.value)) < 300  # without what Ray says of deaths in general


class DyingWorker:
    """Begins, and dies of the first thing that it is asked."""

    def begun(self) -> None:
        """Say so."""

    def seconds_of(self, *_: object) -> None:
        """Die."""
        os._exit(3)


def program(source: Path) -> list[str]:
    return [sys.executable, "-m", "simclr_ray", "study", "run", str(source)]


def _ended(program: list[str]) -> None:
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_killed_study_goes_on_to_the_last_bit(folder: Path) -> None:
    settings: dict[str, Any] = {"seeds": [0, 1], "concurrency": 1}
    whole = study_file(folder, "whole", **settings)
    _ended([*program(whole), "--isolated"])  # which gives what shared processes do
    undisturbed = StudyFolder(str(folder / "whole" / "studies"), "s")

    source = study_file(folder, "killed", **settings)
    driver = subprocess.Popen(program(source), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    broken = StudyFolder(str(folder / "killed" / "studies"), "s")
    deadline = time.monotonic() + 300
    while not _within_second_trial(broken):  # one trial is whole, the next past its first epoch
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    finished = broken.outcomes()
    assert len(finished) == 1
    first = Path(finished[0].run["folder"]) / "metrics.jsonl"
    log_of_first, stamp = first.read_bytes(), first.stat().st_mtime_ns

    _ended([sys.executable, "-m", "simclr_ray", "study", "resume", broken.uri])
    assert (first.read_bytes(), first.stat().st_mtime_ns) == (log_of_first, stamp)
    assert facts(broken) == facts(undisturbed)
    statuses = {run.info.status for run in runs_of(broken).values()}
    assert statuses <= {"FINISHED", "KILLED"}
    assert "RUNNING" not in statuses


def _within_second_trial(folder: StudyFolder) -> bool:
    if len(folder.outcomes()) != 1 or len(folder.runs()) != 2:
        return False
    done = {outcome.trial for outcome in folder.outcomes()}
    (open_run,) = (run for trial, run in folder.runs().items() if trial not in done)
    return bool(open_run.checkpoints())


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_scheduler_ends_trials_and_decides_alike_after_a_stop(folder: Path) -> None:
    settings: dict[str, Any] = {
        # trials of a second, of which some are left when the study looks whether it is to stop
        "space": {"schedule.learning_rate": {"grid": [1.0, 0.01, 0.001, 0.5, 0.1, 0.05]}},
        "figure": {"x": "schedule.learning_rate"},
        "comparisons": [],
        "metric": "train/mean_loss",
        "mode": "min",
        "protocols": [],
        "scheduler": {"name": "asha", "reduction_factor": 2},
        "set": {"epochs": 8},
        "concurrency": 1,
    }
    whole = study_file(folder, "asha", **settings)
    _ended(program(whole))
    undisturbed = StudyFolder(str(folder / "asha" / "studies"), "s")
    statuses = [o.status for o in undisturbed.outcomes()]
    assert "stopped" in statuses
    assert "finished" in statuses
    for outcome in undisturbed.outcomes():
        if outcome.status == "stopped":
            assert max(outcome.curve) < 8
            assert "others were better" in outcome.reason

    source = study_file(folder, "asha_stopped", **settings)
    driver = subprocess.Popen(program(source), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    broken = StudyFolder(str(folder / "asha_stopped" / "studies"), "s")
    deadline = time.monotonic() + 300
    while not broken.outcomes():
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    broken.request_stop()
    assert driver.wait(timeout=120) == STOPPED_BY_SYSTEM
    assert len(broken.outcomes()) < 6
    _ended([sys.executable, "-m", "simclr_ray", "study", "resume", broken.uri])
    assert facts(broken) == facts(undisturbed)
