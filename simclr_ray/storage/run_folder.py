"""The folder of a run, on a local disk or any `pyarrow.fs` URI.

<storage>/<run name>/
    experiment.yaml  run.json           what is run, and where it is tracked
    metrics.jsonl  bad_rows.jsonl       what training said
    other_metrics.jsonl                 of the machine, and of the evaluation at the end
    metrics.jsonl.pieces/               in a bucket, what is not in the file (`log_pieces`)
    rollbacks.json                      how often it went back by itself, and why
    delivered.json                      how much of that MLflow has, and what it is owed
    scores.json  views.png  curves.png  of the evaluation at the end
    ranks.json  error.json              where ranks stand, while they train; what it last ended by
    outcome.json                        written last: the run is finished and evaluated
    classification.json                 of a fine-tuning or a distillation: its test
    encoder/                            of the checkpoint that was registered last
    report.html                         its page, where somebody has asked for one
    lock  lock.holder                   held by the driver; in a bucket lock/ with its claim
    step-00001200-<attempt>/            checkpoints, owned by Ray's manager
    checkpoint_manager_snapshot.json    Ray's
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import fs

from simclr_ray.config import moves
from simclr_ray.config.logging import warn_once
from simclr_ray.errors import CheckpointError, ConfigError, RunError
from simclr_ray.storage import checkpoint, lease, run_lock
from simclr_ray.storage.checkpoint import ANY, Identity
from simclr_ray.storage.filesystem import (
    address_below,
    cache_folder,
    entries_in,
    filesystem,
    is_local,
    move_in_bucket,
    open_large,
    open_whole,
    read_file,
    remove_file,
    remove_half_written,
    split_address,
    write_text_whole,
)
from simclr_ray.storage.log_pieces import BucketLog
from simclr_ray.storage.scratch import scratch_folder
from simclr_ray.storage.space import bytes_in, writing

JsonT = TypeVar("JsonT", dict[str, Any], list[Any])
COPY_BYTES = 2**22
HELD_S = 30.0  # waited for a lock: a trial's driver, a task of Ray's, outlives a study's by seconds
SNAPSHOT = "checkpoint_manager_snapshot.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """Where one run lies.

    Args:
        storage: Folder or URI that holds the runs.
        name: The run's name.
    """

    storage: str
    name: str

    @classmethod
    def of(cls, storage: str, name: str) -> RunFolder:
        """Return the folder of run `name`; a local storage path is made absolute.

        Raises:
            ConfigError: There is a file where the storage, or a folder above it, would be.
        """
        if "://" in storage:
            return cls(storage, name)
        place = Path(storage).resolve()
        file = next((p for p in (place, *place.parents) if p.is_file()), None)
        if file is not None:
            raise ConfigError.of("storage", f"{file} is a file; runs need a folder")
        return cls(str(place), name)

    @classmethod
    def at(cls, run: str) -> RunFolder:
        """Return the run folder at a path or URI; raise `ConfigError` where a file lies there."""
        if "://" not in run:
            if Path(run).is_file():
                raise ConfigError.of(run, "is a file; a run is a folder")
            run = str(Path(run).expanduser().resolve())
        return cls(*split_address(run))

    @property
    def uri(self) -> str:
        """The folder's path or URI."""
        return address_below(self.storage, self.name)

    def below(self, name: str) -> str:
        """Return the path or URI of what lies in the folder."""
        return address_below(self.uri, name)

    @property
    def local(self) -> Path | None:
        """The folder as a path, or None where it is remote."""
        return None if "://" in self.storage else Path(self.uri)

    def read_text(self, name: str, last: int = 0) -> str | None:
        """Return the text of a file, of its last bytes if so asked, or None where there is none.

        Bytes that are no UTF-8, as a fault of the disk leaves them, come back as U+FFFD.
        """
        data = self.read_bytes(name, last)
        return None if data is None else data.decode(errors="replace")

    def read_bytes(self, name: str, last: int = 0) -> bytes | None:
        """Return the content of a file, its `last` bytes unless 0, or None where there is none."""
        if name in LOGS and self.local is None:
            return BucketLog.at(self.below(name)).read(last)
        files, root = self._open()
        return read_file(files, f"{root}/{name}", last=last)

    def read_json(self, name: str, kind: type[JsonT]) -> JsonT | None:
        """Return what a JSON file holds, or None where there is none.

        One that cannot be read, as a power cut leaves it, counts as absent, and that is said.
        """
        text = self.read_text(name)
        if text is None:
            return None
        try:
            tree: Any = json.loads(text)
        except (ValueError, RecursionError):
            tree = None
        if not isinstance(tree, kind):
            warn_once(log, f"{self.below(name)} cannot be read and counts as absent")
            return None
        return tree

    def write_text(self, name: str, text: str) -> None:
        """Write a file, whole or not at all; raise `StorageError` where the disk takes no more."""
        files, root = self._open()
        with writing(self.uri, len(text)):
            files.create_dir(root, recursive=True)
            write_text_whole(files, f"{root}/{name}", text)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        files, root = self._open()
        if files.get_file_info(f"{root}/{name}").type == fs.FileType.File:
            remove_file(files, f"{root}/{name}")

    def names(self, folder: str) -> list[str]:
        """Return the names of the files of a folder in here, hidden ones aside, in order."""
        entries = self._entries(folder)
        return sorted(f.base_name for f in entries if f.is_file and not f.base_name.startswith("."))

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders in a folder in here, in order."""
        entries = self._entries(folder)
        return sorted(f.base_name for f in entries if f.type == fs.FileType.Directory)

    def put_folder(self, local: Path, name: str) -> None:
        """Copy a local folder or file to `name`; raise as `write_text` does."""
        files, root = self._open()
        with writing(self.uri, bytes_in(local) if local.is_dir() else local.stat().st_size):
            files.create_dir(f"{root}/{name}" if local.is_dir() else root, recursive=True)
            fs.copy_files(str(local), f"{root}/{name}", fs.LocalFileSystem(), files)

    def put_checkpoint(self, local: Path, name: str) -> None:
        """Copy a checkpoint to `name`, each file whole, and the record when all else is there.

        Raises:
            StorageError: The disk takes no more; nothing stays of the checkpoint.
        """
        files, root = self._open()
        target, last = f"{root}/{name}", local / checkpoint.RECORD
        try:
            with writing(self.uri, bytes_in(local)):
                files.create_dir(target, recursive=True)
                for file in (*sorted(f for f in local.iterdir() if f != last), last):
                    open_file = open_whole if file == last else open_large
                    with file.open("rb") as source, open_file(files, f"{target}/{file.name}") as o:
                        shutil.copyfileobj(source, o, COPY_BYTES)
        except Exception:
            with suppress(OSError):  # the next start does it
                files.delete_dir(target)
            raise

    def checkpoints(self) -> list[str]:
        """Return the names of the checkpoint directories, newest first."""
        names = [f.base_name for f in self._entries() if checkpoint.step_of(f.base_name) >= 0]
        return sorted(names, key=lambda n: (checkpoint.step_of(n), n), reverse=True)

    def finished_checkpoints(self) -> Iterator[str]:
        """Yield those that a kill has not left half copied; of a bucket each costs a request."""
        return (name for name in self.checkpoints() if checkpoint.RECORD in self.names(name))

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """Give a local path of a folder in here; of a remote one a copy that goes with the block.

        Raises:
            FileNotFoundError: A remote folder holds no `name`.
        """
        if self.local is not None:
            yield self.local / name
            return
        with scratch_folder() as scratch:
            yield self._copy(name, scratch / name)

    @contextmanager
    def newest_checkpoint(self, identity: Identity = ANY) -> Iterator[Path | None]:
        """Give a local path of the newest checkpoint that verifies, or None.

        A remote one is a copy that goes with the block. What does not verify is named in the log
        and passed over.

        Args:
            identity: Of the run that it must be of, as `checkpoint.read_record` takes it.
        """
        for name in self.checkpoints():
            with self.fetched(name) as folder:
                reason = checkpoint.flaw(folder, identity)
                if not reason:
                    yield folder
                    return
                log.warning("passing over checkpoint %s: %s", name, reason)
        yield None

    def check_resumable(self, identity: Identity) -> None:
        """Raise `CheckpointError` where checkpoints were finished and none can be gone on from."""
        flaws = []
        for name in self.finished_checkpoints():
            with self.fetched(name) as folder:
                reason = checkpoint.flaw(folder, identity)
                if not reason:
                    return
                flaws.append(f"{name}: {reason}")
        if flaws:
            raise CheckpointError(
                f"{self.uri}: no checkpoint can be gone on from ({'; '.join(flaws)}); --restart "
                "sets them aside and begins anew"
            )

    def prune_checkpoints(self, keep: int, newest: str) -> None:
        """Remove what starts that were killed have left: all older than the `keep` newest.

        Those are counted from `newest`, the newest that verifies. What is newer is left where it
        is: a disk that answers wrongly for a moment costs no checkpoint. On a local disk what was
        never finished goes nevertheless: it may be what has filled the disk.
        """
        names = self.checkpoints()
        older = names[names.index(newest) :] if newest in names else []
        finished = [name for name in older if checkpoint.RECORD in self.names(name)]
        for name in names:
            half = self.local is not None and not (self.local / name / checkpoint.RECORD).exists()
            if half or (name in older and name not in finished[:keep]):
                self.remove_checkpoint(name)
        if self.local is not None:
            remove_half_written(self.local)

    def remove_checkpoint(self, name: str) -> None:
        """Remove a checkpoint."""
        files, root = self._open()
        files.delete_dir(f"{root}/{name}")

    def remove_all(self) -> None:
        """Delete the folder with all that is in it; `removal` does so where a driver may run."""
        files, root = self._open()
        files.delete_dir(root)

    def set_aside(self) -> RunFolder:
        """Move all but the lock to `<name>~N` beside this one, what says that it is a run last."""
        files, root = self._open()
        taken = {entry.base_name for entry in entries_in(files, root.rpartition("/")[0])}
        number = next(n for n in itertools.count(1) if f"{self.name}~{n}" not in taken)
        other = RunFolder(self.storage, f"{self.name}~{number}")
        target = filesystem(other.uri)[1]
        files.create_dir(target, recursive=True)
        for entry in sorted(self._entries(), key=lambda e: e.base_name == CONFIG_FILE):
            if entry.base_name in (run_lock.LOCK, run_lock.HOLDER):
                continue
            move = files.move if is_local(files) else functools.partial(move_in_bucket, files)
            move(entry.path, f"{target}/{entry.base_name}")
        return other

    def cached_checkpoint(self, name: str) -> Path:
        """Return a local path of a checkpoint that stays: of a remote one a copy in the cache.

        The copy lies in `~/.cache/simclr_ray/checkpoints` (or below `$XDG_CACHE_HOME`), one a run:
        an older checkpoint of the same run goes when a newer one comes.
        """
        if self.local is not None:
            return self.local / name
        digest = hashlib.sha256(self.uri.encode()).hexdigest()[:16]
        place = cache_folder("checkpoints") / f"{self.name}-{digest}"
        if not (place / name / checkpoint.RECORD).is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
                new = self._copy(name, Path(scratch) / name)
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
                new.rename(place / name)
        return place / name

    def _copy(self, name: str, target: Path) -> Path:
        files, root = self._open()
        target.mkdir(parents=True)
        fs.copy_files(f"{root}/{name}", str(target), files, fs.LocalFileSystem())
        return target

    def holder(self) -> str:
        """Return the driver that holds the folder, or nothing."""
        local = self.local
        return lease.holder_of(self.uri) if local is None else run_lock.holder_of(local)

    def ensure_unlocked(self) -> None:
        """Raise `RunError` where another driver is known to hold the folder.

        Of a remote one `lock` tells: a claim that is left there has to be waited for.
        """
        holder = run_lock.holder_of(self.local) if self.local is not None else ""
        if holder:
            raise self._taken(holder)

    @contextmanager
    def lock(self, wait_s: float = 0.0) -> Iterator[None]:
        """Hold the folder, so that no second driver writes to it; a remote one by a lease.

        Args:
            wait_s: For another to let go of it.

        Raises:
            RunError: Another driver holds it, or has taken it while the block ran.
        """
        with ExitStack() as stack:
            try:
                if self.local is None:
                    stack.enter_context(lease.hold(self.uri, wait_s))
                else:
                    stack.enter_context(run_lock.hold(self.local, wait_s))
            except run_lock.LockedError as error:
                raise self._taken(str(error)) from None
            yield

    def repair_snapshot(self) -> list[str]:
        """Set Ray's snapshot aside if it names checkpoints that are gone; return their names.

        Ray Train refuses to start a run whose snapshot names a missing directory. Without a
        snapshot it starts afresh, and ours finds the newest checkpoint by itself.
        """
        if self.read_text(SNAPSHOT) is None:
            return []
        try:
            results = (self.read_json(SNAPSHOT, dict) or {})["checkpoint_results"]
            named = {str(result["checkpoint_dir_name"]) for result in results}
        except (ValueError, KeyError, TypeError):
            named = {"(an unreadable snapshot)"}
        gone = sorted(named - set(self.checkpoints()))
        if gone:
            files, root = self._open()
            files.move(f"{root}/{SNAPSHOT}", f"{root}/{SNAPSHOT}.set-aside")
        return gone

    def written_at(self, folder: str = "") -> datetime | None:
        """Return when something was last written into the folder, or one in it, by its files."""
        lock = run_lock.LOCK  # left out: in a bucket, commands that only read write a clock there
        times = [e.mtime for e in self._entries(folder) if e.mtime and e.base_name != lock]
        return max(times).astimezone(UTC) if times else None

    def _entries(self, folder: str = "") -> list[fs.FileInfo]:
        files, root = self._open()
        return entries_in(files, f"{root}/{folder}".rstrip("/"))

    def _taken(self, holder: str) -> RunError:
        return RunError(f"{self.uri} is being run by {holder}")

    def _open(self) -> tuple[fs.FileSystem, str]:
        return filesystem(self.uri)


METRICS, OTHER_METRICS, BAD_ROWS = "metrics.jsonl", "other_metrics.jsonl", "bad_rows.jsonl"
LOGS = (METRICS, OTHER_METRICS, BAD_ROWS)
RUN_FILE, CONFIG_FILE = "run.json", moves.CONFIG_FILE
