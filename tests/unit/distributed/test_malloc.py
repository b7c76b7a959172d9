"""Freed memory stays in the process, also in the thread that Ray Train calls its function in."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from simclr_ray.distributed.malloc import keep_freed_memory, one_arena

# 80 MiB: more than a heap of a thread's own arena can hold.
IN_A_THREAD = """
import resource, threading
import numpy as np
from simclr_ray.distributed.malloc import keep_freed_memory

def faults():
    np.ones(80 * 2**17)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():
    keep_freed_memory()
    first = faults()
    print((faults() - first) + (faults() - first))

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.skipif(not keep_freed_memory(), reason="not glibc: nothing to set")
def test_large_blocks_of_a_thread_are_not_faulted_in_again() -> None:
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", IN_A_THREAD]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 100  # of 20,480 pages each


def test_the_users_own_number_of_arenas_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    assert one_arena() == {"MALLOC_ARENA_MAX": "1"}
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert one_arena() == {"MALLOC_ARENA_MAX": "4"}
