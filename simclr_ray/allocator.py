"""Keep freed memory in the process instead of handing it back at every step.

glibc gives large blocks back to the system when they are freed, and each step then faults the same
pages in again. Measured on a 2-core virtual machine, ResNet-10 x 0.25, 256 views of 32 px: 40,000
page faults and 0.13 s of system time in a step of 0.62 s; none after this call.
"""

from __future__ import annotations

import ctypes
import sys

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make glibc's allocator keep what is freed; return whether there is one. Idempotent."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another libc
        return False
    results = [
        mallopt(M_MMAP_MAX, 0),  # large blocks come from the heap, which can be kept
        mallopt(M_TRIM_THRESHOLD, LARGEST),
        mallopt(M_TOP_PAD, 64 * 2**20),
    ]
    return all(results)
