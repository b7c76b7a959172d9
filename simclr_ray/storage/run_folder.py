"""The folder of a run, on a local disk or any `pyarrow.fs` URI.

<storage>/<run name>/
    experiment.yaml  metrics.jsonl  bad_rows.jsonl  run.json  encoder/
    lock                                lock by the driver, on a local disk
    step-00001200-<attempt>/            checkpoints, owned by Ray's manager
    checkpoint_manager_snapshot.json    Ray's
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pyarrow import fs

from simclr_ray.errors import (
    CheckpointError,
    ConfigError,
    ConfigIssue,
    RunError,
)
from simclr_ray.storage import checkpoint

LOCK = "lock"
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
            raise ConfigError([ConfigIssue("storage", f"{file} is a file; runs need a folder")])
        return cls(str(place), name)

    @classmethod
    def at(cls, run: str) -> RunFolder:
        """Return the run folder at a path or URI; raise `ConfigError` where a file lies there."""
        if "://" not in run:
            if Path(run).is_file():
                raise ConfigError([ConfigIssue(run, "is a file; a run is a folder")])
            run = str(Path(run).expanduser().resolve())
        storage, _, name = run.rstrip("/").rpartition("/")
        return cls(storage, name)

    @property
    def uri(self) -> str:
        """The folder's path or URI."""
        return f"{self.storage.rstrip('/')}/{self.name}"

    @property
    def local(self) -> Path | None:
        """The folder as a path, or None where it is remote."""
        return None if "://" in self.storage else Path(self.uri)

    def read_text(self, name: str) -> str | None:
        """Return the text of a file, or None where there is none."""
        files, root = self._open()
        try:
            with files.open_input_stream(f"{root}/{name}") as stream:
                data: bytes = stream.read()
        except FileNotFoundError:
            return None
        return data.decode()

    def write_text(self, name: str, text: str) -> None:
        """Write a file, whole or not at all."""
        files, root = self._open()
        files.create_dir(root, recursive=True)
        partial = f"{root}/.{name}.partial"
        with files.open_output_stream(partial) as stream:
            stream.write(text.encode())
        files.move(partial, f"{root}/{name}")

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        files, root = self._open()
        if files.get_file_info(f"{root}/{name}").type == fs.FileType.File:
            files.delete_file(f"{root}/{name}")

    def names(self, folder: str) -> list[str]:
        """Return the names of the files of a folder in here, hidden ones aside, in order."""
        files, root = self._open()
        found = files.get_file_info(fs.FileSelector(f"{root}/{folder}", allow_not_found=True))
        return sorted(f.base_name for f in found if f.is_file and not f.base_name.startswith("."))

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders in a folder in here, in order."""
        files, root = self._open()
        found = files.get_file_info(fs.FileSelector(f"{root}/{folder}", allow_not_found=True))
        return sorted(f.base_name for f in found if f.type == fs.FileType.Directory)

    def put_folder(self, local: Path, name: str) -> None:
        """Copy a local folder or file to `name`."""
        files, root = self._open()
        files.create_dir(f"{root}/{name}" if local.is_dir() else root, recursive=True)
        fs.copy_files(str(local), f"{root}/{name}", fs.LocalFileSystem(), files)

    def checkpoints(self) -> list[str]:
        """Return the names of the checkpoint directories, newest first."""
        files, root = self._open()
        found = files.get_file_info(fs.FileSelector(root, allow_not_found=True))
        names = [f.base_name for f in found if checkpoint.step_of(f.base_name) >= 0]
        return sorted(names, key=lambda n: (checkpoint.step_of(n), n), reverse=True)

    def fetch(self, name: str, scratch: Path) -> Path:
        """Return a local path of a folder in here, copied to `scratch` if it is remote."""
        if self.local is not None:
            return self.local / name
        files, root = self._open()
        target = scratch / name
        target.mkdir(parents=True, exist_ok=True)
        fs.copy_files(f"{root}/{name}", str(target), files, fs.LocalFileSystem())
        return target

    def newest(self, scratch: Path) -> Path | None:
        """Return a local path of the newest checkpoint that verifies, or None.

        What does not verify is named in the log and passed over.
        """
        for name in self.checkpoints():
            folder = self.fetch(name, scratch)
            try:
                checkpoint.read_record(folder)
            except CheckpointError as error:
                log.warning("passing over checkpoint %s: %s", name, error)
                continue
            return folder
        return None

    def is_locked(self) -> bool:
        """Return whether a driver holds the folder; of a remote one that is not known: False."""
        if self.local is None or not (self.local / LOCK).exists():
            return False
        with (self.local / LOCK).open() as file:
            return not _locks(file, fcntl.LOCK_SH)

    def ensure_unlocked(self) -> None:
        """Raise `RunError` where another driver is known to hold the folder."""
        if self.local is not None and self.is_locked():
            raise self._taken(self.local / LOCK)

    @contextmanager
    def lock(self, wait_s: float = 0.0) -> Iterator[None]:
        """Hold the folder, so that no second driver writes to it; nothing is lock of a remote one.

        Args:
            wait_s: For another to let go of it.

        Raises:
            RunError: Another driver holds it.
        """
        if self.local is None:
            yield
            return
        self.local.mkdir(parents=True, exist_ok=True)
        deadline, is_told = time.monotonic() + wait_s, False
        with (self.local / LOCK).open("a+") as file:
            while not _locks(file, fcntl.LOCK_EX):
                if time.monotonic() >= deadline:
                    raise self._taken(self.local / LOCK)
                if not is_told:
                    is_told = True
                    log.warning("%s; waiting %g s", self._taken(self.local / LOCK), wait_s)
                time.sleep(0.5)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            yield

    def repair_snapshot(self) -> list[str]:
        """Set Ray's snapshot aside if it names checkpoints that are gone; return their names.

        Ray Train refuses to start a run whose snapshot names a missing directory. Without a
        snapshot it starts afresh, and ours finds the newest checkpoint by itself.
        """
        text = self.read_text(SNAPSHOT)
        if text is None:
            return []
        try:
            results = json.loads(text)["checkpoint_results"]
            named = {str(result["checkpoint_dir_name"]) for result in results}
        except (ValueError, KeyError, TypeError):
            named = {"(an unreadable snapshot)"}
        gone = sorted(named - set(self.checkpoints()))
        if gone:
            files, root = self._open()
            files.move(f"{root}/{SNAPSHOT}", f"{root}/{SNAPSHOT}.set-aside")
        return gone

    def _taken(self, lock: Path) -> RunError:
        holder = lock.read_text(encoding="utf-8") or "another process"
        return RunError(f"{self.uri} is being run by {holder}")

    def _open(self) -> tuple[fs.FileSystem, str]:
        if self.local is not None:
            return fs.LocalFileSystem(), self.uri
        files, root = fs.FileSystem.from_uri(self.uri)
        return files, root


def _locks(file: IO[str], kind: int) -> bool:
    """Return whether a lock could be taken; it goes with the file, or with the process."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system that knows no locks: then nobody holds anything
        return True
    return True


METRICS, BAD_ROWS = "metrics.jsonl", "bad_rows.jsonl"
RUN_FILE, CONFIG_FILE = "run.json", "experiment.yaml"
