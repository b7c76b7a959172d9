"""Paths of a project that was moved: which are translated, and which stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.moves import CONFIG_FILE, Move, relocated, relocated_run


@pytest.mark.parametrize(
    ("old", "new", "roots"),
    [
        ("/a/runs", "/b/runs", ("/a", "/b")),
        ("/a/runs", "/a/runs", None),
        ("/a/p/runs", "/c/d/p/runs", ("/a", "/c/d")),
        ("/a/runs", "/b/other", ("/a/runs", "/b/other")),
        ("/p/runs", "/z/p/runs", ("/", "/z")),
    ],
)
def test_the_root_that_moved_is_what_the_paths_do_not_end_in_alike(
    old: str, new: str, roots: tuple[str, str] | None
) -> None:
    move = Move.between(old, new)
    assert (move and (str(move.old), str(move.new))) == roots


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/a/proj/data/x y", "/b/data/x y"),
        ("/a/proj", "/b"),
        ("/a/proj2/data", ""),
        ("/a/pro", ""),
        ("/elsewhere", ""),
    ],
)
def test_roots_are_compared_part_by_part(path: str, target: str) -> None:
    move = Move.between("/a/proj", "/b")
    assert move is not None
    assert move.target(path) == target


def test_a_project_that_moved_into_a_folder_beside_it_is_not_moved_twice() -> None:
    move = Move.between("/a/runs", "/a/new/runs")
    assert move is not None
    assert move.target("/a/data") == "/a/new/data"
    assert move.target("/a/new/data") == ""


def test_paths_that_exist_here_are_translated_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "mlflow.db").touch()
    move = Move.between("/nowhere/old/runs", f"{tmp_path}/runs")
    assert move is not None
    tree = {
        "data": {"train": "/nowhere/old/data", "test": "/nowhere/old/gone", "limit": 3},
        "tracking": {"uri": "sqlite:////nowhere/old/mlflow.db"},
        "list": ["/nowhere/old/data", "s3://nowhere/old/data", "old/data"],
    }
    assert relocated(tree, move) == {
        "data": {"train": f"{tmp_path}/data", "test": "/nowhere/old/gone", "limit": 3},
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
        "list": [f"{tmp_path}/data", "s3://nowhere/old/data", "old/data"],
    }


def run_in(folder: Path) -> Path:
    """Write the config of a run as a run folder has it; return its path."""
    (folder / "data").mkdir(parents=True)
    settings = {"name": "t", "data": {"train": str(folder / "data")}}
    tree = cfg.to_tree(cfg.validate(Experiment, settings | {"storage": str(folder / "runs")}))
    run = folder / "runs" / "t-0123abcd"
    run.mkdir(parents=True)
    (run / CONFIG_FILE).write_text(cfg.dump_yaml(tree), encoding="utf-8")
    return run / CONFIG_FILE


def test_the_config_in_a_run_folder_is_read_where_the_folder_lies(tmp_path: Path) -> None:
    path = run_in(tmp_path / "a")
    before = Experiment.load(str(path))
    (tmp_path / "a").rename(tmp_path / "b")
    after = Experiment.load(str(tmp_path / "b" / path.relative_to(tmp_path / "a")))
    assert before.storage == str(tmp_path / "a" / "runs")
    assert after.storage == str(tmp_path / "b" / "runs")
    assert after.data.train == str(tmp_path / "b" / "data")
    assert after.digest() == before.digest()


def test_the_tree_of_a_checkpoint_outside_of_a_run_folder_stays(tmp_path: Path) -> None:
    tree = {"name": "t", "storage": "/nowhere/old/runs"}
    assert relocated_run(tree, tmp_path) == tree  # such as a copy of a remote checkpoint
