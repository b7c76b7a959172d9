"""The logs of a run as local files: in its folder, or in scratch that is uploaded to it."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from simclr_ray.errors import RunError, StorageError, one_line
from simclr_ray.storage.lease import is_lost
from simclr_ray.storage.log_pieces import BucketLog
from simclr_ray.storage.metrics_log import append_record, read_records
from simclr_ray.storage.rank_states import RANKS
from simclr_ray.storage.run_folder import LOGS, METRICS, OTHER_METRICS, RunFolder
from simclr_ray.storage.scratch import scratch_folder
from simclr_ray.storage.space import writing
from simclr_ray.tracking.delivery import STATE

UPLOAD_EVERY_S = 60.0
FAILS_S = 1800.0  # without one upload that arrives: then the run ends, before it loses more
END_PAUSES_S = (1.0, 4.0, 15.0)  # between the last tries, at the end
WAIT_S = 30.0  # for an upload that is under way
DELIVERED = (METRICS, OTHER_METRICS)  # logs of points, which go to MLflow
REWRITTEN = (STATE, RANKS)  # files that are not appended to
CANNOT_BE_UPLOADED = "the log of the run cannot be uploaded"
log = logging.getLogger(__name__)


class RunLog:
    """The logs of a run, as local files while the block runs.

    Those of a remote folder are fetched at the start; what is new is uploaded every minute, by a
    thread of its own, and at the end: a kill loses at most what came since.

    Args:
        folder: Of the run.
        is_patient: At the end, what fails is tried again after some seconds.

    Attributes:
        path: Folder of the files.
    """

    path: Path

    def __init__(self, folder: RunFolder, *, is_patient: bool = False) -> None:
        self.folder, self._pauses_s = folder, END_PAUSES_S if is_patient else ()
        self._scratch = ExitStack()
        self._tried_at = self._began_at = time.monotonic()  # to upload; a thread to do so
        self._fails_since: float | None = None
        self._failure: OSError | None = None  # that is to end the run
        self._thread: threading.Thread | None = None  # that uploads, or did last
        self._lock = threading.Lock()  # of the files of a remote folder
        self._logs: dict[str, BucketLog] = {}  # of a remote folder
        self._uploaded: dict[str, tuple[int, int]] = {}  # name -> size and time of the file

    def __enter__(self) -> RunLog:
        if self.folder.local is not None:
            self.path = self.folder.local
            self.path.mkdir(parents=True, exist_ok=True)
            return self
        self.path = self._scratch.enter_context(scratch_folder())
        self._logs = {name: BucketLog.at(self.folder.below(name)) for name in LOGS}
        for name, bucket_log in self._logs.items():
            if (data := bucket_log.read()) is not None:
                (self.path / name).write_bytes(data)
        for name in REWRITTEN:
            self.fetch(name)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._scratch:
            if kind is not None:  # the error that ended the run is raised, not one of the upload
                with suppress(StorageError):
                    self.try_upload(is_last=True)
                return
            for pause_s in self._pauses_s:
                if self.try_upload(is_last=True):
                    return
                time.sleep(pause_s)
            try:
                self.upload(is_last=True)
            except StorageError:
                raise
            except OSError as error:
                raise RunError(f"{CANNOT_BE_UPLOADED}: {one_line(error)}") from error

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Append a record to a log; raise `StorageError` where the disk takes no more."""
        with writing(self.path / name):
            append_record(self.path / name, record)

    def replace(self, name: str, text: str) -> None:
        """Write a file anew, whole or not at all; a lost one costs nothing but that."""
        new = self.path / f".{name}.tmp"
        with writing(self.path / name):
            new.write_text(text, encoding="utf-8")
            new.replace(self.path / name)

    def remove(self, name: str) -> None:
        """Remove a file here and in the run folder; where that fails, an old one stays."""
        with suppress(OSError), self._alone():  # an upload under way would bring it back
            (self.path / name).unlink(missing_ok=True)
            self.folder.remove(name)
        (self.path / name).unlink(missing_ok=True)

    def records(self, name: str) -> list[dict[str, Any]]:
        """Return the records of a log; none where there is no such log yet."""
        file = self.path / name
        return (
            read_records(file.read_text(encoding="utf-8", errors="replace"))
            if file.is_file()
            else []
        )

    def fetch(self, name: str) -> None:
        """Have a file of a remote run folder in `path`, if there is one."""
        if self.folder.local is None and not (self.path / name).exists():
            data = self.folder.read_bytes(name)
            if data is not None:
                (self.path / name).write_bytes(data)
                self._uploaded[name] = self._stamp(name)

    def put(self, path: Path) -> None:
        """Store a local file in the run folder, and have it in `path`."""
        self.folder.put_folder(path, path.name)
        if self.folder.local is None:
            shutil.copyfile(path, self.path / path.name)

    def upload(self, *, is_last: bool = False) -> None:
        """Bring a remote folder up to date; of a local one there is nothing to do.

        Args:
            is_last: Nothing is appended after it.

        Raises:
            OSError: The folder cannot be written.
        """
        self._tried_at = time.monotonic()
        if self.folder.local is not None or is_lost(self.folder.uri):  # the log is another driver's
            return
        with self._alone():
            for name, bucket_log in self._logs.items():
                if (self.path / name).is_file():
                    with writing(self.folder.uri):
                        bucket_log.bring_up(self.path / name, is_last=is_last)
            for name in REWRITTEN:
                if (self.path / name).is_file() and self._uploaded.get(name) != self._stamp(name):
                    stamp = self._stamp(name)  # before: what comes meanwhile is new
                    self.folder.put_folder(self.path / name, name)
                    self._uploaded[name] = stamp
        self._fails_since = None

    def try_upload(self, *, is_last: bool = False) -> bool:
        """Bring a remote folder up to date; return whether it is. A failure is a line of the log.

        Args:
            is_last: As of `upload`.

        Raises:
            StorageError: The place takes no more: trying again does not help.
        """
        try:
            self.upload(is_last=is_last)
        except StorageError:
            raise
        except OSError as error:
            log.warning("%s: %s", CANNOT_BE_UPLOADED, one_line(error))
            return False
        return True

    def upload_if_due(self) -> None:
        """Have a remote folder brought up to date, once a minute; what fails is tried again.

        That takes a thread of its own: a slow store holds up nobody.

        Raises:
            OSError: It has failed for half an hour, or takes as long, or the place takes no more.
        """
        if self.folder.local is not None:
            return
        now, (failure, self._failure) = time.monotonic(), (self._failure, None)
        if failure is not None:
            raise failure
        if self._thread is not None and self._thread.is_alive():
            late_s = now - self._began_at
            if late_s > FAILS_S:
                raise OSError(f"{CANNOT_BE_UPLOADED}: no answer for {late_s / 60:.0f} minutes")
        elif now - self._tried_at > UPLOAD_EVERY_S:
            self._tried_at = self._began_at = now
            self._thread = threading.Thread(target=self._upload_beside, name="log", daemon=True)
            self._thread.start()

    def _upload_beside(self) -> None:
        """Bring a remote folder up to date in a thread; keep what is to end the run."""
        began = time.monotonic()
        try:
            if self._fails_since is not None and began - self._fails_since > FAILS_S:
                self.upload()
            elif not self.try_upload():
                self._fails_since = self._fails_since or began
        except OSError as error:
            self._failure = error
        except Exception as error:  # noqa: BLE001 - of Arrow; a thread's would be a traceback
            self._failure = OSError(f"{CANNOT_BE_UPLOADED}: {one_line(error)}")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Have no other upload while the block runs; raise `OSError` where one does not end."""
        if not self._lock.acquire(timeout=WAIT_S):
            raise OSError("an earlier upload does not end")
        try:
            yield
        finally:
            self._lock.release()

    def _stamp(self, name: str) -> tuple[int, int]:
        stat = (self.path / name).stat()
        return stat.st_size, stat.st_mtime_ns
