"""When a run takes the single worker, and what ends it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayError

from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import DivergedError, RestartsError, RunError, SimclrRayError
from simclr_ray.storage.metrics_log import append_record
from simclr_ray.storage.run_folder import BAD_ROWS, METRICS
from simclr_ray.train import single_fit
from simclr_ray.train.heartbeat import RanksFailed
from simclr_ray.train.single_worker import StoredInbox

FROZEN = (
    "init.weights=w.pt",
    "init.freeze=true",
    "head={name: classifier, num_classes: 10}",
    "loss={name: cross_entropy}",
)


def resolved(*overrides: str, local: Path | None = Path("runs")) -> Any:
    config = Experiment.load("cifar10_study_cpu", *overrides)
    return SimpleNamespace(config=config, folder=SimpleNamespace(local=local))


@pytest.mark.parametrize(
    ("overrides", "local", "is_local", "takes"),
    [
        ((), Path("runs"), True, True),
        ((), Path("runs"), False, False),  # a cluster of others
        ((), None, True, False),  # a bucket
        (("scaling.num_workers=2",), Path("runs"), True, False),
        (("scaling.data_actors_per_worker=2",), Path("runs"), True, False),
        (("scaling.gpus_per_worker=1",), Path("runs"), True, False),
        ((*FROZEN,), Path("runs"), True, False),
    ],
)
def test_only_one_cpu_worker_of_this_machine_alone_is_one(
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
    local: Path | None,
    *,
    is_local: bool,
    takes: bool,
) -> None:
    monkeypatch.setattr(single_fit, "is_local", lambda: is_local)
    assert single_fit.takes_single_worker(resolved(*overrides, local=local)) is takes


class Watcher:
    """A monitor that finds what it is told to."""

    fatal: SimclrRayError | None = None
    found: SimclrRayError | None = None
    has_said = False

    def __init__(self, *_: object) -> None:
        """Take what a monitor takes."""

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.fatal = self.found

    def say_bad_rows(self) -> None:
        Watcher.has_said = True


def fitted(monkeypatch: pytest.MonkeyPatch, ends: list[bool | Exception]) -> None:
    """Train by workers that end so, one after the other."""

    def train_once(*_: object) -> bool:
        end = ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end

    nothing: Any = None
    monkeypatch.setattr(single_fit, "driver_queue", lambda: None)
    monkeypatch.setattr(single_fit, "_Monitor", Watcher)
    monkeypatch.setattr(single_fit, "_train_once", train_once)
    single_fit.fit_by_single_worker(nothing, nothing, nothing, nothing, nothing)
    assert not ends


def test_a_worker_that_fails_is_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watcher, "has_said", False)
    fitted(monkeypatch, [False, False, True])
    assert Watcher.has_said


def test_an_error_that_the_watcher_has_explained_is_raised_as_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Watcher, "found", DivergedError("loss is not finite; the rate is high"))
    with pytest.raises(DivergedError, match="the rate is high"):
        fitted(monkeypatch, [DivergedError("loss is not finite")])


def test_failures_that_are_too_many_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watcher, "fatal", RestartsError("failed 4 times"))
    monkeypatch.setattr(Watcher, "found", RestartsError("failed 4 times"))
    with pytest.raises(RestartsError, match="4 times"):
        fitted(monkeypatch, [])


def test_a_worker_that_is_given_nothing_to_do_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(single_fit, "ray", SimpleNamespace(kill=ended.append))
    monkeypatch.setattr(single_fit, "_started_worker", lambda _: "worker")
    config = resolved().config
    with single_fit.no_worker_left():
        single_fit.start_single_worker(config)
        single_fit.start_single_worker(config)  # there is one
    assert ended == ["worker"]
    with single_fit.no_worker_left():
        """There is none."""
    assert ended == ["worker"]


def test_a_checkpoint_is_kept_once_the_driver_has_written_what_came_before(tmp_path: Path) -> None:
    put: list[Any] = []
    inbox = StoredInbox(SimpleNamespace(put=put.append))
    assert inbox.is_stored(tmp_path)  # nothing was said
    record, row = {"step": 7, "train/loss": 2.5}, {"step": 7, "id": 3, "reason": "truncated"}
    for item in (record, row, RanksFailed({})):
        inbox.put(item)
    assert put == [record, row, RanksFailed({})]
    assert not inbox.is_stored(tmp_path)
    append_record(tmp_path / METRICS, {"step": 7, "train/gradient": 1.0})
    assert not inbox.is_stored(tmp_path)
    append_record(tmp_path / METRICS, record)
    assert not inbox.is_stored(tmp_path)  # no row was bad before: there is no such file
    append_record(tmp_path / BAD_ROWS, row)
    assert inbox.is_stored(tmp_path)
    other = row | {"id": 4}
    inbox.put(other)
    assert not inbox.is_stored(tmp_path)
    append_record(tmp_path / BAD_ROWS, other)
    append_record(tmp_path / BAD_ROWS, row | {"id": 5})
    assert inbox.is_stored(tmp_path)


def test_where_ray_itself_is_gone_the_same_command_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RestartsError, match=r"Ray has ended the run: .*the same command goes on"):
        fitted(monkeypatch, [RayError("the queue has died")])


def test_without_restarts_its_error_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="training failed"):
        fitted(monkeypatch, [RunError("training failed: it died")])
