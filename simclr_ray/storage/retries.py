"""Writing again where a disk, a mount or a bucket fails for a moment.

What it costs to give up: all ranks start again from the checkpoint before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from simclr_ray.errors import StorageError, one_line
from simclr_ray.storage.space import DENIED, OF_THE_DISK, error_number

WAITS_S = (2.0, 5.0, 10.0)  # between four attempts; less than a rank may stand still
log = logging.getLogger(__name__)


def with_retries(write: Callable[[], None], what: str, waits_s: Iterable[float] = WAITS_S) -> None:
    """Write, and again where it may do better: not where a disk is full or writing is denied.

    Args:
        write: What writes; it may be repeated.
        what: Is written, for the log.
        waits_s: Seconds before each further attempt.

    Raises:
        OSError, StorageError: What `write` raised last.
    """
    for wait_s in waits_s:
        try:
            return write()
        except (OSError, StorageError) as error:
            if error_number(error.__cause__ or error) in (*OF_THE_DISK, *DENIED):
                raise
            log.warning("%s: %s; again in %g s", what, one_line(error), wait_s)
            time.sleep(wait_s)
    return write()
