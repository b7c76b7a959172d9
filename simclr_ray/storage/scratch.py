"""Folders in the machine's temporary one, for copies of what lies in a bucket.

Who is killed cannot remove its own, and a checkpoint's copy may be large: the next who needs one
removes those that nobody holds any more.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

PREFIX: Final = "simclr_ray-scratch-"
# Locked while its folder is in use. A process number would say nothing to another container that
# shares the temporary folder.
HELD: Final = ".held"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give an empty folder, removed at the end, after those that killed processes have left."""
    _remove_abandoned()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        with (folder / HELD).open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            if not (folder / HELD).exists():  # taken for abandoned before the lock was held
                folder.mkdir(exist_ok=True)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError), (folder / HELD).open() as held:  # one that is just made has none
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
