"""A real SQLite store of MLflow whose project was moved, copied, linked, moved twice and back."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from simclr_ray import config as cfg
from simclr_ray.config.experiment import ResNetConfig, TrackingConfig
from simclr_ray.errors import TrackingError
from simclr_ray.inference import registry
from simclr_ray.inference.embed import load_encoder
from simclr_ray.inference.encoder import Encoder
from simclr_ray.inference.encoder_files import write_encoder
from simclr_ray.nn.build import build_encoder
from simclr_ray.tracking import moved, store
from simclr_ray.tracking.runs import TrackedRun, Tracker

CONFIG = ResNetConfig(depth=10, width=0.125, stem="cifar")
OLD = "old é x"  # % and ? in the path of a database MLflow itself does not take
ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("trace_tags", "value"),
    ("datasets", "dataset_source"),
    ("tags", "value"),
)
Rows = dict[str, list[str]]


def png() -> bytes:
    pixels = np.random.default_rng(5).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(autouse=True)
def _no_uri_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(store.URI_VARIABLE, raising=False)


class Project:
    """A project folder with its store in `runs`."""

    def __init__(self, root: Path, run_id: str = "") -> None:
        self.root, self.run_id = root, run_id
        self.database = root / "runs" / store.DATABASE
        self.uri = f"sqlite:///{self.database}"

    def rows(self) -> Rows:
        """Return the texts of each column that can hold an address."""
        return rows_of(self.database)

    def hash(self) -> str:
        return hashlib.sha256(self.database.read_bytes()).hexdigest()

    def backups(self) -> list[Path]:
        return sorted(self.database.parent.glob(f"{store.DATABASE}.before-move-*"))

    def moved_to(self, root: Path) -> Project:
        root.parent.mkdir(parents=True, exist_ok=True)
        self.root.rename(root)
        return Project(root, self.run_id)

    def copied_to(self, root: Path) -> Project:
        shutil.copytree(self.root, root)
        return Project(root, self.run_id)


def rows_of(database: Path) -> Rows:
    with closing(sqlite3.connect(database)) as db:
        return {
            f"{table}.{column}": [
                str(row[0]) for row in db.execute(f"SELECT {column} FROM {table} ORDER BY rowid")
            ]
            for table, column in ADDRESSES
        }


def naming(rows: Rows, place: Path) -> list[str]:
    """Return the columns with an address below a folder: as a path, as a URI, and in JSON."""
    ours = (f"{place}/", f"{place.as_uri()}/", json.dumps(f"{place}/")[1:-1])
    return [key for key, texts in rows.items() for text in texts if any(o in text for o in ours)]


def make(root: Path, elsewhere: Path) -> Project:
    (root / "data").mkdir(parents=True)
    (root / "data" / "train.parquet").write_text("rows")
    tracker = Tracker.open(TrackingConfig(), str(root / "runs"))
    run = tracker.start_run(
        "r",
        params={"data.train": str(root / "data" / "train.parquet")},
        tags={"storage": str(root / "runs" / "r-12345678")},
    )
    (root / "runs" / "r-12345678").mkdir()
    run.log_text("hello", "notes/a.txt")
    run.log_dataset("train", str(root / "data" / "train.parquet"), "f" * 16, 3, "pretraining")
    run.log_dataset("gone", str(root / "data" / "gone.parquet"), "0" * 16, 3, "pretraining")
    torch.manual_seed(0)
    folder = elsewhere / "encoder"
    write_encoder(
        folder,
        Encoder(build_encoder(CONFIG), config=cfg.to_tree(CONFIG), size=32, feature_dim=64),
    )
    registry.register_encoder(folder, run, name="m", alias="newest", example=png(), tags={})
    project = Project(root, run.run_id)
    client = MlflowClient(tracking_uri=project.uri)
    places = {
        "on another disk": (elsewhere / "disk" / store.ARTIFACTS).as_uri(),
        "same name at the start": Path(f"{root}2/arts").as_uri(),
        "bucket": "s3://bucket/runs/mlartifacts",
    }
    for name, place in places.items():
        experiment = client.create_experiment(name, artifact_location=place)
        other = client.create_run(experiment)
        if place.startswith("file:"):
            client.log_text(other.info.run_id, "elsewhere", "b.txt")
    with closing(sqlite3.connect(project.database)) as db:
        db.execute(
            "INSERT INTO trace_info (request_id, experiment_id, timestamp_ms, status) "
            "VALUES ('t', ?, 0, 'OK')",
            (tracker.experiment_id,),
        )
        trace = f"{(root / 'runs' / store.ARTIFACTS).as_uri()}/traces/t/artifacts/"
        db.execute("INSERT INTO trace_tags VALUES ('mlflow.artifactLocation', ?, 't')", (trace,))
        db.commit()
    return project


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Path]:
    """Return a project kept aside, and the root that its store says it has, where nothing is."""
    base = tmp_path_factory.mktemp("moved")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)
        (base / OLD).mkdir()
        patch.chdir(base / OLD)
        project = make(base / OLD, base)
    return project.moved_to(base / "kept"), base / OLD


@pytest.fixture
def old(first: tuple[Project, Path]) -> Iterator[Path]:
    yield first[1]
    shutil.rmtree(first[1], ignore_errors=True)


@pytest.fixture
def here(first: tuple[Project, Path], old: Path, tmp_path: Path) -> Project:
    """Return the project after it was moved to a folder of another name."""
    return first[0].copied_to(tmp_path / "new # é")


def test_reading_translates_at_once_and_writes_nothing(here: Project, old: Path) -> None:
    before, listed = here.hash(), sorted(here.database.parent.iterdir())
    encoder = load_encoder("models:/m@newest", tracking_uri=here.uri)
    assert encoder(torch.rand(2, 3, 32, 32)).shape == (2, 64)
    assert here.hash() == before
    assert sorted(here.database.parent.iterdir()) == listed
    assert not old.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every file")
def test_reading_works_where_nothing_can_be_written(here: Project) -> None:
    here.database.chmod(0o444)
    here.database.parent.chmod(0o555)
    try:
        load_encoder("models:/m@newest", tracking_uri=here.uri)
        with pytest.raises(TrackingError, match="was moved, and its addresses cannot be rewritten"):
            TrackedRun.attach(here.uri, here.run_id)
    finally:
        here.database.parent.chmod(0o755)


def test_writing_rewrites_first_with_a_backup_and_says_so(
    here: Project, old: Path, first: tuple[Project, Path], caplog: pytest.LogCaptureFixture
) -> None:
    before = here.rows()
    with caplog.at_level(logging.WARNING, logger="simclr_ray"):
        run = TrackedRun.attach(here.uri, here.run_id)
    (line,) = [r.getMessage() for r in caplog.records if "was moved" in r.getMessage()]
    (backup,) = here.backups()
    assert f"from {old} to {here.root}" in line
    assert str(backup) in line
    assert rows_of(backup) == before
    after = here.rows()
    # what was read and is not here is not claimed to be
    gone = [text for text in after["datasets.dataset_source"] if "gone" in text]
    assert gone == [text for text in before["datasets.dataset_source"] if "gone" in text]
    assert naming(after, old) == ["datasets.dataset_source"]
    changed = {key for key in after if after[key] != before[key]}
    assert changed == {f"{table}.{column}" for table, column in ADDRESSES}
    run.log_text("again", "notes/b.txt")
    client = MlflowClient(tracking_uri=here.uri)
    assert [f.path for f in client.list_artifacts(run.run_id, "notes")] == [
        "notes/a.txt",
        "notes/b.txt",
    ]
    kept = here.root / "runs" / store.ARTIFACTS / run.run_id / "artifacts" / "notes"
    assert (kept / "b.txt").read_text() == "again"
    assert not old.exists()
    # parameters say what the run was given then
    given = client.get_run(run.run_id).data.params["data.train"]
    assert given == str(old / "data" / "train.parquet")
    assert load_encoder("models:/m@newest", tracking_uri=here.uri) is not None
    TrackedRun.attach(here.uri, here.run_id)
    assert here.backups() == [backup]


def test_what_is_elsewhere_stays_there(here: Project, old: Path) -> None:
    def elsewhere(rows: Rows) -> list[str]:
        locations = rows["experiments.artifact_location"] + rows["runs.artifact_uri"]
        marks = ("/disk/", "%20x2/arts", "s3://")
        assert all(any(mark in text for text in locations) for mark in marks)
        return [text for text in locations if any(mark in text for mark in marks)]

    before = elsewhere(here.rows())
    Tracker.open(TrackingConfig(), str(here.root / "runs"))
    assert here.backups()
    assert elsewhere(here.rows()) == before
    assert len(before) == 6


def test_of_two_that_write_at_once_one_rewrites(here: Project) -> None:
    at_once = threading.Barrier(2)

    def work() -> None:
        at_once.wait()
        moved.rewrite_moved_store(here.uri)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(here.backups()) == 1
    assert not moved._has_moved(here.database)


def test_a_copy_neither_writes_to_the_original_nor_changes_it(
    first: tuple[Project, Path], old: Path, tmp_path: Path
) -> None:
    original = first[0].copied_to(old)
    copy = original.copied_to(tmp_path / "copy")
    moved.rewrite_moved_store(original.uri)
    assert original.backups() == []  # it lies where it says
    before, listed = original.hash(), sorted(old.rglob("*"))
    run = TrackedRun.attach(copy.uri, copy.run_id)
    run.log_text("of the copy", "c.txt")
    load_encoder("models:/m@newest", tracking_uri=copy.uri)
    assert (original.hash(), sorted(old.rglob("*"))) == (before, listed)
    assert (copy.root / "runs" / store.ARTIFACTS / run.run_id / "artifacts" / "c.txt").is_file()
    assert naming(copy.rows(), old) == ["datasets.dataset_source"]


def test_a_copy_without_artifacts_is_known_by_the_database_of_the_original(
    first: tuple[Project, Path], old: Path, tmp_path: Path
) -> None:
    original = first[0].copied_to(old)
    copy = original.copied_to(tmp_path / "copy")
    shutil.rmtree(copy.root / "runs" / store.ARTIFACTS)  # as if the original alone had gone on
    run = TrackedRun.attach(copy.uri, copy.run_id)
    run.log_text("of the copy", "c.txt")
    assert not list(old.rglob("c.txt"))


def test_a_store_without_artifacts_is_known_by_nothing_being_there(
    here: Project, old: Path
) -> None:
    shutil.rmtree(here.root / "runs" / store.ARTIFACTS)  # a run that was stopped in its first epoch
    run = TrackedRun.attach(here.uri, here.run_id)
    run.log_text("late", "c.txt")
    assert not old.exists()
    assert list((here.root / "runs" / store.ARTIFACTS).rglob("c.txt"))


def test_a_database_that_was_moved_alone_leaves_its_artifacts_where_they_are(
    first: tuple[Project, Path], old: Path, tmp_path: Path
) -> None:
    original = first[0].copied_to(old)
    alone = tmp_path / store.DATABASE
    original.database.rename(alone)
    before = hashlib.sha256(alone.read_bytes()).hexdigest()
    Tracker.open(TrackingConfig(uri=f"sqlite:///{alone}"), str(old / "runs"))
    assert list(tmp_path.glob("*.before-move-*")) == []
    assert load_encoder("models:/m@newest", tracking_uri=f"sqlite:///{alone}") is not None
    assert hashlib.sha256(alone.read_bytes()).hexdigest() == before


def test_artifacts_of_a_location_of_the_users_own_move_with_the_project(
    here: Project, old: Path
) -> None:
    """As of an experiment that was made by `mlflow experiments create`, beside the storage."""
    arts = here.root / "arts"
    (here.root / "runs" / store.ARTIFACTS).rename(arts)
    with closing(sqlite3.connect(here.database)) as db:
        for table, column, _ in moved.LOCATIONS[:5]:
            new = f"replace({column}, 'runs/mlartifacts', 'arts')"
            db.execute(f"UPDATE {table} SET {column} = {new}")
        db.commit()
    load_encoder("models:/m@newest", tracking_uri=here.uri)
    TrackedRun.attach(here.uri, here.run_id).log_text("late", "c.txt")
    assert list(arts.rglob("c.txt"))
    assert not old.exists()


def test_moved_twice_with_reading_alone_between(here: Project, tmp_path: Path) -> None:
    load_encoder("models:/m@newest", tracking_uri=here.uri)
    there = here.moved_to(tmp_path / "deeper" / "third")
    load_encoder("models:/m@newest", tracking_uri=there.uri)
    moved.rewrite_moved_store(there.uri)
    assert len(there.backups()) == 1
    load_encoder("models:/m@newest", tracking_uri=there.uri)


def test_moved_there_and_back(here: Project, old: Path) -> None:
    original = here.rows()
    moved.rewrite_moved_store(here.uri)
    back = here.moved_to(old)
    moved.rewrite_moved_store(back.uri)
    assert back.rows() == original
    assert len(back.backups()) == 2  # even within the same second
    again = back.moved_to(here.root).moved_to(old)  # nobody wrote there
    moved.rewrite_moved_store(again.uri)
    assert len(again.backups()) == 2


def test_a_folder_by_another_name_has_not_moved(here: Project, old: Path, tmp_path: Path) -> None:
    old.symlink_to(here.root)  # moved to a larger disk, the old name kept
    try:
        before = here.hash()
        moved.rewrite_moved_store(here.uri)
        load_encoder("models:/m@newest", tracking_uri=here.uri)
        assert (here.hash(), here.backups()) == (before, [])
    finally:
        old.unlink()
    link = tmp_path / "link"
    link.symlink_to(here.root)
    by_link = store.store_uri("", str(link / "runs"))
    moved.rewrite_moved_store(by_link)
    assert naming(here.rows(), link) == []
    assert naming(here.rows(), here.root)


def test_the_backup_has_what_is_still_in_the_write_ahead_log(here: Project) -> None:
    with closing(sqlite3.connect(here.database)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("INSERT INTO tags VALUES ('late', 'in the log', ?)", (here.run_id,))
        db.commit()
        assert Path(f"{here.database}-wal").stat().st_size
        moved.rewrite_moved_store(here.uri)
    (backup,) = here.backups()
    assert "in the log" in rows_of(backup)["tags.value"]


def test_what_goes_wrong_leaves_the_store_as_it_was(
    here: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(database: Path) -> Path:
        raise OSError(28, "No space left on device")

    before = here.rows()
    monkeypatch.setattr(moved, "_back_up", full)
    with pytest.raises(TrackingError, match=r"cannot be rewritten.*No space left"):
        moved.rewrite_moved_store(here.uri)
    assert here.rows() == before


def test_a_store_is_asked_for_a_run_without_mlflow(here: Project, tmp_path: Path) -> None:
    assert moved.has_run(here.uri, here.run_id)
    assert not moved.has_run(here.uri, "0" * 32)
    assert not moved.has_run(f"sqlite:///{tmp_path}/no.db", here.run_id)
    assert moved.has_run("http://host:5000", here.run_id)
    tracker = Tracker.open(TrackingConfig(), str(here.root / "runs"))
    assert tracker.has_run(here.run_id)
    assert not tracker.has_run("0" * 32)


@pytest.mark.parametrize("uri", ["http://host:5000", "postgresql://h/db", "file:///x/mlruns"])
def test_other_stores_are_left_alone(uri: str) -> None:
    moved.rewrite_moved_store(uri)
    assert moved.translated(uri, "file:///a/b") == "file:///a/b"


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/no/mlflow.db"
    moved.rewrite_moved_store(uri)
    with pytest.raises(TrackingError, match="no MLflow store"):
        TrackedRun.attach(uri, "1" * 32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:///a/b%20c/", "/a/b c"),
        ("/a/b%20c", "/a/b%20c"),
        ("file:/a", "/a"),
        ("file://localhost/a", "/a"),
        ("file://host/a", ""),
        ("s3://a/b", ""),
        ("mlflow-artifacts:/a", ""),
        ("models:/m-1", ""),
        ("runs", ""),
    ],
)
def test_local_paths_are_told_from_other_addresses(uri: str, path: str) -> None:
    assert moved.path_of(uri) == path
