"""A stop that somebody asks for while workers train: they save a checkpoint at their step first.

The driver is told by a signal (`cli.signals`), anybody by `simclr-ray run stop`. Either way a file
in the run's folder says it to rank 0, wherever that runs, and rank 0 to the others
(`collectives.RankZeroSignal`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.storage.run_lock import this_process

STOP, RESIZE = "stop", "resize"  # the files
LOOK_S = 0.5  # rank 0 and driver look so often on a disk, and ten times less often in a bucket
log = logging.getLogger(__name__)

_requested = threading.Event()
_can_save = threading.Event()
_interrupted = threading.Event()


def defer() -> bool:
    """Ask the workers of this process's run to save and end; return whether they will.

    False where none trains yet or any more, and where they were asked before: who asks twice does
    not want to wait.
    """
    if not _can_save.is_set() or _requested.is_set():
        return False
    _requested.set()
    return True


def note_interrupt() -> None:
    """Remember that a signal has interrupted this process."""
    _interrupted.set()


def was_interrupted() -> bool:
    """Return whether a signal has interrupted this process.

    What fails after that fails for it: an interrupt within an import comes out of it as an error of
    another kind.
    """
    return _interrupted.is_set()


def workers_can_save() -> None:
    """Remember that the workers train: from now on a stop is theirs to answer."""
    _can_save.set()


def workers_are_gone() -> None:
    """Remember that no worker trains, until they do again: a stop ends this process at once."""
    _can_save.clear()


@contextmanager
def clear_after(folder: RunFolder) -> Iterator[None]:
    """Have nothing asked of this process after the block: its next run is another one."""
    try:
        yield
    finally:
        if is_seen(folder):
            with suppress(OSError):
                folder.remove(STOP)


@contextmanager
def writing_requests(folder: RunFolder) -> Iterator[None]:
    """Write the file for what is asked of this process, while the block runs; remove it after.

    What was asked of this process before it trained stays; what was asked of one that was killed
    goes.
    """
    if not is_requested_here(folder):
        folder.remove(STOP)
    ended = threading.Event()

    def wait() -> None:
        is_logged = False
        while not _requested.wait(_look_s(folder)):
            with suppress(OSError):
                if not is_logged and is_requested(folder):
                    log.info("stopping, as `run stop` asks: a checkpoint is written first")
                    is_logged = True
        if not ended.is_set():
            log.info("stopping: a checkpoint of the current step is written first")
            with suppress(OSError):  # of a full disk: the signal after this one ends it
                request_stop(folder, this_process())

    watcher = threading.Thread(target=wait, daemon=True, name="stop")
    watcher.start()
    try:
        yield
    finally:
        _can_save.clear()
        ended.set()
        _requested.set()  # wakes the thread
        watcher.join()
        _requested.clear()
        with suppress(OSError):
            folder.remove(STOP)


def request_stop(folder: RunFolder, driver: str) -> bool:
    """Ask the workers of a run to save and end; return False where they were asked already.

    Args:
        folder: Of the run.
        driver: Who holds it (`RunFolder.holder`): another one, that goes on later, is not asked.
    """
    if folder.read_text(STOP) == driver:
        return False
    folder.write_text(STOP, driver)
    return True


def is_requested_here(folder: RunFolder) -> bool:
    """Return whether this process was asked to stop the run."""
    return folder.read_text(STOP) == this_process()


def is_requested(folder: RunFolder) -> bool:
    """Return whether any process was asked to stop the run."""
    return folder.read_text(STOP) is not None


def _look_s(folder: RunFolder) -> float:
    return LOOK_S if folder.local is not None else 10 * LOOK_S


def is_seen(folder: RunFolder) -> bool:
    """Return whether this process was asked to stop; False where a store does not answer.

    Who calls it asks again.
    """
    with suppress(OSError):
        return is_requested_here(folder)
    return False


class FileWatch:
    """Rank 0's thread that looks for files, so that no step waits for a bucket's answer.

    Attributes:
        seen: Those that were there when it looked last.
    """

    def __init__(self, folder: RunFolder, names: Iterable[str]) -> None:
        self.seen: frozenset[str] = frozenset()
        self._folder, self._names = folder, tuple(names)
        self._closed = threading.Event()
        threading.Thread(target=self._look, daemon=True, name="requests").start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _look(self) -> None:
        while not self._closed.wait(_look_s(self._folder)):
            with suppress(OSError):  # a store that does not answer is asked again
                there = [n for n in self._names if self._folder.read_text(n) is not None]
                self.seen = frozenset(there)
