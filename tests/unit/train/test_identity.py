"""Which run a command is: one that goes on, one that begins, or one that begins anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import ConfigError
from simclr_ray.storage.run_folder import CONFIG_FILE
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.train.identity import begin_anew, check_is_there, runs_of_this_name
from simclr_ray.train.resolve import ResolvedExperiment, resolve
from tests.ray.images import write_shapes
from tests.unit.cli.test_app import errors, run


@pytest.fixture(params=["path", "uri"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    place = tmp_path / "runs"
    return str(place) if request.param == "path" else place.as_uri()


def resolved(storage: str, tmp_path: Path, *overrides: str, images: int = 40) -> ResolvedExperiment:
    train = tmp_path / f"train{images}.parquet"
    if not train.exists():
        write_shapes(train, images)
    given = [f"data.train={train}", "data.test=''", f"storage={storage}", "batch_size=16"]
    return resolve(Experiment.load("cifar10_study_cpu", *given, "epochs=1", *overrides))


def begun(run: ResolvedExperiment) -> ResolvedExperiment:
    """Leave in the folder what a run that has begun leaves."""
    run.folder.write_text(CONFIG_FILE, cfg.dump_yaml(cfg.to_tree(run.config)))
    RunRecord("m", "sqlite:///m.db", run.source.fingerprint, run.digest).write(run.folder)
    return run


def test_a_new_run_is_told_of_those_of_its_name_and_of_what_differs(
    storage: str, tmp_path: Path
) -> None:
    first = begun(resolved(storage, tmp_path))
    assert runs_of_this_name(first) == []
    begun(resolved(storage, tmp_path, "name=of_another_name"))
    begun(resolved(storage, tmp_path, "scaling.num_workers=2"))  # the same run, placed otherwise
    (other,) = runs_of_this_name(resolved(storage, tmp_path, "schedule.learning_rate=0.123"))
    assert other.folder == first.folder
    (difference,) = other.differences
    assert difference.startswith("schedule.learning_rate: ")
    assert difference.endswith(" -> 0.123")
    assert f"{first.folder.uri} (at step 0) is another; it differs in schedule.lea" in str(other)
    (other,) = runs_of_this_name(resolved(storage, tmp_path, images=50))
    assert [d.partition(":")[0] for d in other.differences] == ["the images"]


def test_what_is_no_run_of_this_release_is_passed_over(storage: str, tmp_path: Path) -> None:
    first = begun(resolved(storage, tmp_path))
    first.folder.write_text(CONFIG_FILE, "start: {}")
    assert runs_of_this_name(resolved(storage, tmp_path, "seed=5")) == []


def test_to_go_on_there_must_be_a_run(storage: str, tmp_path: Path) -> None:
    first = resolved(storage, tmp_path)
    with pytest.raises(ConfigError, match="--resume: no run of this experiment is in "):
        check_is_there(first)
    check_is_there(begun(first))
    with pytest.raises(ConfigError, match=r"is another; it differs in seed: 0 -> 5"):
        check_is_there(resolved(storage, tmp_path, "seed=5"))


def test_what_there_was_is_set_aside_when_a_run_begins_anew(storage: str, tmp_path: Path) -> None:
    run = resolved(storage, tmp_path)
    begin_anew(run)  # nothing there: nothing is made
    assert not (tmp_path / "runs").exists()
    for number in (1, 2):
        begun(run)
        kept = tmp_path / "runs" / run.run_name / "step-00000003-0000000a"
        kept.mkdir()
        (kept / "record.json").write_text(f"{number}")
        with run.folder.lock():
            begin_anew(run)
        aside = tmp_path / "runs" / f"{run.run_name}~{number}"
        assert (aside / "step-00000003-0000000a" / "record.json").read_text() == f"{number}"
        assert (aside / CONFIG_FILE).is_file()
        assert run.folder.read_text(CONFIG_FILE) is None
        assert run.folder.checkpoints() == []
    assert runs_of_this_name(run) == []


def test_what_a_restart_that_was_killed_has_left_is_set_aside_too(
    storage: str, tmp_path: Path
) -> None:
    run = begun(resolved(storage, tmp_path))
    folder = tmp_path / "runs" / run.run_name
    (folder / "step-00000003-0000000a").mkdir()
    (folder / CONFIG_FILE).unlink()  # moved, and the checkpoint not yet
    begin_anew(run)
    assert run.folder.checkpoints() == []
    assert (tmp_path / "runs" / f"{run.run_name}~1" / "step-00000003-0000000a").is_dir()


def test_the_lock_may_be_nested_by_the_driver_that_holds_it(storage: str, tmp_path: Path) -> None:
    folder = resolved(storage, tmp_path).folder
    with folder.lock():
        with folder.lock():
            pass
        assert folder.holder()
    assert not folder.holder()


def test_the_verb_refuses_what_cannot_be(tmp_path: Path) -> None:
    write_shapes(tmp_path / "train.parquet", 40)
    given = ["data.train=train.parquet", "data.test=''", "batch_size=16", "epochs=1"]
    done = run("pretrain", "cifar10_study_cpu", *given, "--resume", "--restart", cwd=tmp_path)
    assert (done.returncode, errors(done)) == (
        2,
        ["error: --resume: and --restart exclude each other"],
    )
    done = run("pretrain", "cifar10_study_cpu", *given, "--resume", "--name", "x", cwd=tmp_path)
    assert done.returncode == 2
    problem = f"no run of this experiment is in {tmp_path}/runs; without --resume it is begun"
    assert errors(done) == [f"error: --resume: {problem}"]
    assert not (tmp_path / "runs").exists()
