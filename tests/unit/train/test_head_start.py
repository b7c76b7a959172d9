"""What a run starts side by side before its workers, and what is left where that is refused."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from simclr_ray.errors import TrackingError
from simclr_ray.train import head_start

PATIENCE_S = 30.0


class Start:
    """A start whose parts are noted, and no cluster."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, is_up: bool = False, is_single: bool = False
    ) -> None:
        self.done: list[str] = []
        note = self.done.append
        for name in (
            "check_machine",
            "check_space",
            "connect",
            "open_tracker",
            "start_stats_actor",
            "start_single_worker",
        ):
            monkeypatch.setattr(head_start, name, lambda *_, name=name: note(name))
        monkeypatch.setattr(head_start, "is_local", lambda: True)
        monkeypatch.setattr(head_start, "takes_single_worker", lambda _: is_single)
        ray = SimpleNamespace(is_initialized=lambda: is_up, shutdown=lambda: note("shutdown"))
        monkeypatch.setattr(head_start, "ray", ray)

    def run(self) -> list[str]:
        resolved: Any = SimpleNamespace(config=None)
        head_start.start_cluster(resolved)
        return self.done


def test_the_store_is_opened_while_the_cluster_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    start = Start(monkeypatch)
    both = threading.Barrier(2)  # broken, where one waits for the other's end
    monkeypatch.setattr(head_start, "connect", lambda _: both.wait(PATIENCE_S))
    monkeypatch.setattr(head_start, "open_tracker", lambda _: both.wait(PATIENCE_S))
    assert start.run() == ["check_machine", "check_space", "start_stats_actor"]


def test_the_only_worker_starts_in_place_of_ray_datas_actor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Start(monkeypatch, is_single=True).run()[-1] == "start_single_worker"


def test_what_the_machine_refuses_starts_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise OSError("no room")

    start = Start(monkeypatch)
    monkeypatch.setattr(head_start, "check_space", refuse)
    with pytest.raises(OSError, match="no room"):
        start.run()
    assert start.done == ["check_machine"]


@pytest.mark.parametrize("is_up", [False, True])
def test_a_refused_store_stops_the_cluster_that_was_started_for_it(
    monkeypatch: pytest.MonkeyPatch,
    is_up: bool,
) -> None:
    def refuse(_: object) -> None:
        raise TrackingError("no")

    start = Start(monkeypatch, is_up=is_up)
    monkeypatch.setattr(head_start, "open_tracker", refuse)
    with pytest.raises(TrackingError):
        start.run()
    assert ("shutdown" in start.done) is not is_up
    assert "start_stats_actor" not in start.done


def test_what_is_done_meanwhile_comes_before_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    start = Start(monkeypatch)
    resolved: Any = SimpleNamespace(config=None)
    head_start.start_cluster(resolved, meanwhile=lambda: start.done.append("meanwhile"))
    assert start.done.index("meanwhile") < start.done.index("open_tracker")
    assert start.done[-1] == "start_stats_actor"


def test_an_interrupt_leaves_out_what_has_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    start, interrupted = Start(monkeypatch), threading.Event()

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(head_start, "connect", interrupt)
    monkeypatch.setattr(head_start, "PATIENCE_S", 0.5)

    def wait() -> None:
        interrupted.wait(PATIENCE_S)

    threads = set(threading.enumerate())
    resolved: Any = SimpleNamespace(config=None)
    with pytest.raises(KeyboardInterrupt):
        head_start.start_cluster(resolved, meanwhile=wait)
    interrupted.set()
    for thread in set(threading.enumerate()) - threads:
        thread.join(PATIENCE_S)
    assert start.done == ["check_machine", "check_space"]
