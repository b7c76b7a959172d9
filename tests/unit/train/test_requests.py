"""Ranks that move: they save their step, say so once, and end to be started again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simclr_ray.config.sections.running import ScalingConfig
from simclr_ray.storage import checkpoint
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.train import requests, stop
from simclr_ray.train.context import SingleRankContext
from simclr_ray.train.heartbeat import RankFinished, RanksMove
from simclr_ray.train.requests import RanksMoved, Requests
from simclr_ray.train.resolve import resolve
from simclr_ray.train.stop import RESIZE, STOP
from simclr_ray.train.worker import WorkerInput, train_rank
from tests.ray.images import write_splits
from tests.unit.train.test_in_process import experiment

ELASTIC = {"num_workers": [1, 2], "threads_per_worker": 1}
NEVER_TAKEN = 10**9


class Inbox:
    """Keeps what a rank sends."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def put(self, item: Any) -> None:
        self.items.append(item)


class Context(SingleRankContext):
    """A rank whose node is taken away, and whose driver is not this process."""

    def __init__(self, folder: RunFolder, taken_after: int = NEVER_TAKEN) -> None:
        super().__init__(folder, keep=None)
        self.looks, self.taken_after = 0, taken_after

    def nodes_taken(self) -> list[str] | None:
        """Return a node after so many looks."""
        self.looks += 1
        return ["node-3"] if self.looks > self.taken_after else None


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "LOOK_S", 0.001)
    monkeypatch.setattr(requests, "LOOK_S", -1.0)  # after each step
    monkeypatch.setenv(requests.WATCHER, "1")


@pytest.mark.parametrize(
    ("file", "taken_after", "scaling", "moves_for"),
    [
        (RESIZE, NEVER_TAKEN, ELASTIC, []),
        ("", 2, {"threads_per_worker": 1}, ["node-3"]),
        (STOP, NEVER_TAKEN, ELASTIC, None),
    ],
)
def test_ranks_save_and_say_at_which_step_before_they_start_again_elsewhere(
    file: str,
    taken_after: int,
    scaling: dict[str, Any],
    moves_for: list[str] | None,
    tmp_path: Path,
) -> None:
    data = write_splits(tmp_path, 40)
    run = resolve(experiment(data, tmp_path / "runs", epochs=400, scaling=scaling))
    inbox, context = Inbox(), Context(run.folder, taken_after)
    if file:
        run.folder.write_text(file, "")
    ended = None
    try:
        train_rank(WorkerInput(run, inbox), context)
    except RanksMoved as error:
        ended = str(error)
    step = checkpoint.step_of(run.folder.checkpoints()[0])
    assert 0 < step < run.total_steps
    moves = [item for item in inbox.items if isinstance(item, RanksMove)]
    if moves_for is None:
        assert (moves, ended) == ([], None)
        assert RankFinished(0) in inbox.items
    else:
        assert moves == [RanksMove(step, 1, moves_for)]
        assert ended == f"after step {step}"
        assert RankFinished(0) not in inbox.items  # that would be the end of the run
    if not file:
        assert context.looks == taken_after + 1


def test_a_stop_counts_more_than_a_move_that_is_asked_with_it(tmp_path: Path) -> None:
    folder = RunFolder.of(str(tmp_path), "r-1")
    with Requests(folder, Context(folder, 0), ScalingConfig(num_workers=[1, 2])) as heard:
        assert heard._files is not None
        heard._files.close()
        heard._files.seen = frozenset({STOP, RESIZE})
        assert heard.ask() == "stop"
        assert heard.reason == "stop"  # nobody starts them again


def test_a_fixed_number_of_workers_is_not_asked_to_change(tmp_path: Path) -> None:
    folder = RunFolder.of(str(tmp_path), "r-1")
    folder.write_text(RESIZE, "")
    with Requests(folder, Context(folder), ScalingConfig(num_workers=1)) as heard:
        assert heard._files is not None
        heard._files.close()
        assert heard._files._names == (STOP,)
