"""Ends a worker process of Ray's before its C++ library is destructed, which may never end.

When a worker ends by itself, as an actor does whose handles are gone, Ray (2.60) tells its node so,
and then lets the process exit. The destructor of its event loop drops what was posted to it and not
run; among that may be a message to a subscriber, whose destructor posts to the same loop. That is
undefined, and seen as a wait for a lock that nobody gives back: of 96 actors on a busy machine, 3.
Nobody looks for such a process any more: it keeps its memory, and its GPU, for as long as the node
has its Ray.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import sys
from contextlib import suppress


@functools.cache  # once a process: tasks come one after the other
def skip_destructors() -> None:
    """Have this process, where it is a worker of Ray's, end without them.

    By then Ray has shut it down, and threads have ended. What was registered with `atexit` before
    this call does not run.
    """
    import ray  # a worker has it; what else calls this may do without

    if ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
        atexit.register(_leave)


def _leave() -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it, or it is closed
            stream.flush()
    os._exit(0)
