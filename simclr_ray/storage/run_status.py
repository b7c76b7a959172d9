"""How a run stands, by its folder alone: it may be running, here or elsewhere, or long finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple

from pyarrow import fs

from simclr_ray.errors import ConfigError
from simclr_ray.storage import checkpoint
from simclr_ray.storage.filesystem import entries_in, filesystem
from simclr_ray.storage.last_error import RESTART, LastError
from simclr_ray.storage.metrics_log import TIME, is_number, last_of, read_records, seconds_left
from simclr_ray.storage.rank_states import RankStates
from simclr_ray.storage.run_folder import CONFIG_FILE, METRICS, RunFolder
from simclr_ray.storage.run_record import RunRecord

SCORES = "scores.json"
CLASSIFIER_SCORES = "classification.json"
LOG_BYTES = 4 * 2**20  # of the end of a log: ten thousand records; a long run's has some 100 MB

State = Literal["running", "finished", "stopped", "failed"]


class RunStatus(NamedTuple):
    """One run."""

    folder: RunFolder
    record: RunRecord | None  # None before MLflow was reached
    state: State
    step: int  # of the last record of the log, or of the newest checkpoint
    total_steps: int  # 0: not known yet
    epoch: float
    metrics: dict[str, float]  # the last of each
    scores: list[dict[str, Any]]  # of the evaluation at the end
    checkpoints: list[str]  # that were finished, newest first
    written_at: datetime | None
    ranks: RankStates = RankStates()  # as the driver saw them last
    seconds_left: float | None = None  # of training, while it runs; None: not known
    error: LastError | None = None  # that it last ended by, or started its ranks again for

    @property
    def is_trained(self) -> bool:
        """Whether its newest checkpoint is of the last step."""
        newest = checkpoint.step_of(self.checkpoints[0]) if self.checkpoints else 0
        return 0 < self.total_steps <= newest


def newest_whole_step(folder: RunFolder) -> int:
    """Return the step of the newest checkpoint that is not half written; 0: there is none."""
    return max(0, checkpoint.step_of(next(folder.finished_checkpoints(), "")))


def status_of_run(folder: RunFolder) -> RunStatus:
    """Return how the run in a folder stands.

    Raises:
        ConfigError: There is no run.
    """
    if folder.read_text(CONFIG_FILE) is None:
        raise ConfigError.of(folder.uri, f"is no run folder: it has no {CONFIG_FILE}")
    records = read_records(folder.read_text(METRICS, LOG_BYTES) or "")
    metrics, ranks = last_of(records), RankStates.read(folder)
    total, logged, epoch = (_finite(metrics.pop(key, 0)) for key in ("total", "step", "epoch"))
    checkpoints = list(folder.finished_checkpoints())
    kept = checkpoint.step_of(checkpoints[0]) if checkpoints else 0
    error = LastError.read(folder)
    state: State = "stopped"
    if folder.holder():
        state = "running"
    # in a bucket the log comes a minute late, and without it nobody knows of how many steps a run
    # is; a frozen encoder's, with the one checkpoint that it makes, names none
    elif records and kept and kept >= total:
        state = "finished"
    elif error is not None and error.kind != RESTART and not _trained_since(error, records):
        state = "failed"
    return RunStatus(
        folder,
        RunRecord.find(folder),
        state,
        max(int(logged), kept),
        int(total),
        epoch,
        metrics,
        folder.read_json(SCORES, list) or [],
        checkpoints,
        folder.written_at(),
        ranks,
        seconds_left(records) if state == "running" else None,
        error,
    )


def _finite(value: float) -> float:
    return value if is_number(value) else 0.0


def _trained_since(error: LastError, records: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a later start has logged something: it was stopped, as its error was kept."""
    at = records[-1].get(TIME) if records else None
    return isinstance(at, float | int) and at > error.at


def runs_in(storage: str) -> list[RunFolder]:
    """Return the run folders directly in a storage, by name; also those that cannot be read."""
    files, root = filesystem(storage)
    entries = entries_in(files, root)
    names = sorted(info.base_name for info in entries if info.type == fs.FileType.Directory)
    return [folder for name in names if _may_be_run(folder := RunFolder.of(storage, name))]


def _may_be_run(folder: RunFolder) -> bool:
    try:
        return folder.read_text(CONFIG_FILE) is not None
    except OSError:  # of a folder of somebody else; `status_of_run` says it
        return True
