"""What every test on the session's Ray leaves behind: nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

OURS = ["-m", "simclr_ray"]  # as the words after Python's of what tests start


def programs() -> set[psutil.Process]:
    """Return the commands and scripts that this process has started and that still run."""
    found = set()
    for process in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            if words[1:3] == OURS or (words[1:2] == ["-c"] and "multiprocessing" not in words[2]):
                found.add(process)
    return found


@pytest.fixture(autouse=True)
def no_program_left() -> Iterator[None]:
    """Kill what a failed test has not waited for: it would keep the CPUs that later ones need."""
    before = programs()
    yield
    for process in programs() - before:
        with suppress(psutil.NoSuchProcess):
            process.kill()
            process.wait(30)
