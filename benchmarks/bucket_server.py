"""Serve S3 by moto on a free port of loopback: `bucket_server.py LOG` prints the port.

A line of LOG is an answer: method, path, the range that was asked for, and the bytes of its body,
tab-separated. It runs in the environment of `tests.cluster.services`, without this package.
"""

from __future__ import annotations

import importlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO


def main() -> None:
    """Serve until the process is ended."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto: Any = importlib.import_module("moto.server")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    with Path(sys.argv[1]).open("w", buffering=1) as log:
        server._server.app = noted(server._server.app, log)
        print(server.get_host_and_port()[1], flush=True)
        time.sleep(10**6)


def noted(app: Callable[..., Iterable[bytes]], log: TextIO) -> Callable[..., Iterator[bytes]]:
    """Return the WSGI application, with a line of the log for each answer."""
    lock = threading.Lock()

    def answer(environ: dict[str, str], start: Any) -> Iterator[bytes]:
        sent = 0
        for piece in app(environ, start):
            sent += len(piece)
            yield piece
        request = (environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE", ""))
        with lock:
            log.write("\t".join((*request, str(sent))) + "\n")

    return answer


if __name__ == "__main__":
    main()
