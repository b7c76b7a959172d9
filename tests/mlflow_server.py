"""A real `mlflow server`, in a process group of its own, that can be killed and started again."""

from __future__ import annotations

import collections
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@contextmanager
def serving(folder: Path, port: int) -> Iterator[str]:
    """Serve the store of `folder`, with artifacts; give the URI, and kill the server at the end."""
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--backend-store-uri", f"sqlite:///{folder}/server.db", "--workers", "1",
        "--artifacts-destination", str(folder / "served"), "--serve-artifacts",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            told = "".join(lines)
            # on its own, either may come before the port is open
            if "Application startup complete" in told and "Uvicorn running on" in told:
                break
        else:
            pytest.fail("the server did not start:\n" + "".join(lines))
        rest = collections.deque[str](maxlen=1)  # read on, or the server blocks on a full pipe
        reader = threading.Thread(target=rest.extend, args=(process.stderr,), daemon=True)
        reader.start()
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reader.join()
    process.stderr.close()
