"""Delivery of a run's local logs to MLflow: from a stored position, each point once.

The logs are files of one JSON object a line, appended to by whoever trains and never waiting for
MLflow. What of them MLflow has stands in `delivered.json` beside them, with what else it is still
to be told: texts, files and the run's status. A `Sender` is the thread that delivers while a run
goes on; `simclr-ray run sync` delivers what is left.

A point is in MLflow once although requests are repeated: its time is that of its record, so that
SQL stores, whose primary key is the whole point, pass over a copy; and after a failure, a kill or a
restart, the steps that MLflow has are looked up before anything is sent. The position may therefore
be behind, never ahead.

Measured on MLflow 3.17: SQLite waits 20 s for a lock (`PRAGMA busy_timeout`) in every request, then
raises "database is locked", and logs about 70 lines; nobody there tries again.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import logging
import os
import threading
import time
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, NamedTuple

from simclr_ray.config.logging import warn_once
from simclr_ray.config.uris import without_passwords
from simclr_ray.config.wording import counted
from simclr_ray.errors import ConfigError, TrackingError
from simclr_ray.tracking import moved, store
from simclr_ray.tracking.runs import MetricPoint, MlflowStatus, TrackedRun

STATE: Final = "delivered.json"
TIME: Final = "time"  # of a record, in seconds since 1970; without a slash it is no metric

log = logging.getLogger(__name__)


@dataclass
class DeliveryState:
    """What MLflow has of a run, and what it is to be told.

    Attributes:
        mlflow_run_id: Whose state it is; of another run's nothing counts.
        positions: Log -> bytes of it that MLflow has.
        owed: Writes that MLflow has not taken, oldest first; each is told by its `kind`.
        status: That the run is to have; empty: as it is.
        has_status: MLflow was told the status.
    """

    mlflow_run_id: str
    positions: dict[str, int] = field(default_factory=dict)
    owed: list[dict[str, Any]] = field(default_factory=list)
    status: MlflowStatus | str = ""
    has_status: bool = True

    @classmethod
    def read(cls, path: Path, run_id: str) -> DeliveryState:
        """Return the state of a run; a new one where there is none, or none that can be read."""
        names = {f.name for f in fields(cls)}
        try:
            tree = json.loads(path.read_bytes())
            state = cls(**{key: value for key, value in tree.items() if key in names})
            state.positions = {str(k): int(v) for k, v in state.positions.items()}
            state.owed = [dict(write) for write in state.owed]
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.debug("%s cannot be read: %s", path, error)
            return cls(run_id)
        return state if state.mlflow_run_id == run_id else cls(run_id)

    def write(self, path: Path) -> None:
        """Write the state, whole or not at all: a lost one costs a look at MLflow's history."""
        new = path.with_name(f".{path.name}.{os.getpid()}")
        new.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        new.replace(path)


class DeliveryCounts(NamedTuple):
    """What MLflow lacks of a run, or was given of it."""

    points: int
    writes: int  # texts, files, parameters, tags, scores
    status: str  # empty: it has the right one

    @property
    def parts(self) -> list[str]:
        """Return what there is in words, such as `12 points` and `the status FINISHED`."""
        parts = [counted(self.points, "point")] if self.points else []
        parts += [counted(self.writes, "other write")] if self.writes else []
        parts += [f"the status {self.status}"] if self.status else []
        return parts

    def __str__(self) -> str:
        """Return the parts as the end of a sentence; empty for nothing."""
        *first, last = self.parts or [""]
        return f"{', '.join(first)} and {last}" if first else last


class Delivery:
    """The logs of one run on their way to MLflow.

    One thread sends; another may say what is owed meanwhile.

    Args:
        run: Where to.
        folder: Local, with the logs; `delivered.json` is kept there.
        logs: Names of the logs; they need not exist.
    """

    def __init__(self, run: TrackedRun, folder: Path, logs: tuple[str, ...]) -> None:
        self.run, self.folder, self.logs = run, folder, logs
        is_new = not run.is_resumed and not (folder / STATE).is_file()
        self.state = DeliveryState.read(folder / STATE, run.run_id)
        for name in logs:
            if self.state.positions.get(name, 0) > _size(folder / name):  # of a log that is gone
                self.state.positions[name] = 0
        self._lock = threading.RLock()
        self._stored = _StoredSteps(run, is_new=is_new)
        self.is_abandoned = False
        self.is_rewritten = False  # what was moved is rewritten; opening a run does that, too

    def enqueue(self, kind: str, **what: Any) -> None:
        """Have MLflow told something when it can be; it is stored before this returns.

        Args:
            kind: `text` (text, file), `file` (name in the folder), `params` or `tags` (values),
                `record` (of a log: its points, also where MLflow has others of that step).
            what: As the kind needs it, in JSON.
        """
        with self._lock:
            self.state.owed.append({"kind": kind, **without_passwords(what)})
            self._save()

    def set_status(self, status: MlflowStatus, *, has_it: bool = False) -> None:
        """Have MLflow show a status after all that is owed; `has_it`: it does already."""
        with self._lock:
            self.state.status, self.state.has_status = status, has_it
            self._save()

    def send(self) -> int | None:
        """Make one request; return the number of points that were new, or None: all is delivered.

        Raises:
            TrackingError: MLflow refuses or does not answer. Nothing is lost: send again.
        """
        self._check_store()
        for name in self.logs:
            part = self._read(name)
            if part.end > self.state.positions.get(name, 0):
                return self._send_points(name, part)
        return self._send_write()

    def undelivered(self) -> DeliveryCounts:
        """Return what MLflow is not known to have, asking it nothing."""
        points = 0
        with self._lock:
            writes = len(self.state.owed)
            status = "" if self.state.has_status else str(self.state.status)
            positions = dict(self.state.positions)
        for name in self.logs:
            counted_at: dict[str, set[int]] = {}
            for record in _records_from(self.folder / name, positions.get(name, 0)):
                for point in _points_of(record.tree):
                    if not self._stored.has(point.key, point.step):
                        counted_at.setdefault(point.key, set()).add(point.step)
            points += sum(len(steps) for steps in counted_at.values())
        return DeliveryCounts(points, writes, status)

    def give_up(self) -> None:
        """Leave the state as it is from now on, whatever a request under way comes to."""
        with self._lock:
            self.is_abandoned = True

    def _check_store(self) -> None:
        """Refuse a store that is gone, which MLflow would make anew; rewrite one that was moved."""
        try:
            store.check_there(self.run.uri)
        except ConfigError as error:
            raise TrackingError(str(error)) from error
        if not self.is_rewritten:
            moved.rewrite_moved_store(self.run.uri)
            self.is_rewritten = True

    def _read(self, name: str) -> _Part:
        """Return the next records of a log, as many as go into a request; one at least."""
        part = _Part([], self.state.positions.get(name, 0))
        for record in _records_from(self.folder / name, part.end):
            points = _points_of(record.tree)
            if part.points and len(part.points) + len(points) > store.MAX_METRICS_PER_BATCH:
                break
            part = _Part([*part.points, *points], record.end)
        return part

    def _send_points(self, name: str, part: _Part) -> int:
        if self._stored.look_up({point.key for point in part.points}):
            return 0
        fresh: dict[tuple[str, int], MetricPoint] = {}  # a step that one part has twice counts once
        for point in part.points:
            if not self._stored.has(point.key, point.step):
                fresh.setdefault((point.key, point.step), point)
        if fresh:
            try:
                self.run.log_points(list(fresh.values()))
            except TrackingError:
                self._stored.forget()  # some may have arrived
                raise
        with self._lock:
            self._stored.add(fresh)
            self.state.positions[name] = part.end
            self._save()
        return len(fresh)

    def _send_write(self) -> int | None:
        with self._lock:
            first = self.state.owed[0] if self.state.owed else None
            status, has_status = self.state.status, self.state.has_status
        if first is not None:
            self._perform(first)
        elif status and not has_status:
            self.run.finish(status)  # type: ignore[arg-type] # read from JSON
        else:
            return None
        with self._lock:
            if first is not None:
                self.state.owed.remove(first)
            elif self.state.status == status:
                self.state.has_status = True
            self._save()
        return 0

    def _perform(self, write: Mapping[str, Any]) -> None:
        match write:
            case {"kind": "text", "text": str(text), "file": str(file)}:
                self.run.log_text(text, file)
            case {"kind": "file", "name": str(name)} if (self.folder / name).is_file():
                self.run.log_artifact(self.folder / name)
            case {"kind": "params", "values": dict(values)}:
                self.run.log_params(values)
            case {"kind": "tags", "values": dict(values)}:
                self.run.set_tags(values)
            case {"kind": "record", "record": dict(record)}:
                self.run.log_points(_points_of(record))
            case _:
                log.warning("left out of MLflow, since it cannot be made: %s", write)

    def _save(self) -> None:
        if self.is_abandoned:
            return
        try:
            self.state.write(self.folder / STATE)
        except OSError as error:  # what is sent twice is dropped; an error of the run is worth more
            warn_once(log, f"{self.folder / STATE} cannot be written: {error.strerror or error}")


class _Record(NamedTuple):
    """One line of a log, and where it ends, in bytes."""

    tree: dict[str, Any]
    end: int


class _Part(NamedTuple):
    """What goes into one request, and where the log goes on."""

    points: list[MetricPoint]
    end: int


class _StoredSteps:
    """Which points MLflow has, looked up once a key and then remembered.

    Steps of a log ascend but for those that a restart repeats, so that of what is sent from here
    the highest step of a key says enough; of what was there before, 8 bytes a point are kept.
    """

    def __init__(self, run: TrackedRun, *, is_new: bool) -> None:
        self.run = run
        self._before: dict[str, array[int]] = {}  # ascending
        self._highest: dict[str, int] = {}
        self._keys: set[str] | None = set() if is_new else None  # of which MLflow has points

    def look_up(self, keys: set[str]) -> bool:
        """Ask MLflow one thing that has to be known of `keys`; return whether there was one."""
        if self._keys is None:
            self._keys = self.run.stored_keys()
            return True
        unknown = sorted((keys & self._keys) - self._before.keys())
        for key in unknown[:1]:
            self._before[key] = array("q", sorted(set(self.run.stored_steps(key))))
        return bool(unknown)

    def has(self, key: str, step: int) -> bool:
        """Return whether MLflow is known to have the point."""
        if step <= self._highest.get(key, -(2**63)):
            return True
        before = self._before.get(key, ())
        at = bisect.bisect_left(before, step)
        return at < len(before) and before[at] == step

    def add(self, points: Mapping[tuple[str, int], MetricPoint]) -> None:
        """Remember what was sent."""
        for key, step in points:
            self._highest[key] = max(step, self._highest.get(key, step))

    def forget(self) -> None:
        """Look up everything anew: a request failed, and may have arrived."""
        self._keys = None
        self._before.clear()


def _records_from(path: Path, position: int) -> Iterator[_Record]:
    """Yield the whole lines of a log from a position on; what is no record comes empty.

    A line that is still being written, or that a kill has cut off, has no end and is left.
    """
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(position)
        for line in file:
            if not line.endswith(b"\n"):
                return
            position += len(line)
            try:
                tree = json.loads(line)
            except ValueError:
                tree = {}
            yield _Record(tree if isinstance(tree, dict) else {}, position)


def _points_of(record: Mapping[str, Any]) -> list[MetricPoint]:
    """Return the points of a record: names with a slash are metrics."""
    try:
        step, time_ms = int(record["step"]), int(1000 * float(record.get(TIME) or time.time()))
    except (KeyError, TypeError, ValueError):
        return []
    return [
        MetricPoint(store.key_of(key), float(value), step, time_ms)
        for key, value in record.items()
        if "/" in key and isinstance(value, int | float)
    ]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
