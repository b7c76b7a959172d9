"""A real `mlflow server`, in a process group of its own, that can be killed and started again."""

from __future__ import annotations

import collections
import http.client
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

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


@dataclass
class Proxy:
    """What stands before a server, and may be slow or answer nobody."""

    uri: str = ""
    delay_s: float = 0.0  # before each answer
    is_gone: bool = False  # connections are closed without an answer
    fails: int = 0  # so many uploads are refused before each that is passed on
    bytes_up: int = 0  # of bodies that were passed on
    refused: int = 0
    _in_row: int = 0

    def refuses(self) -> bool:
        """Return whether this upload is refused."""
        self._in_row = (self._in_row + 1) % (self.fails + 1)
        self.refused += self._in_row != 0
        return self._in_row != 0


@contextmanager
def between(uri: str) -> Iterator[Proxy]:
    """Give a proxy before a server."""
    target = urlsplit(uri)
    assert target.hostname is not None
    proxy = Proxy()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            time.sleep(proxy.delay_s)
            if proxy.is_gone:
                self.close_connection = True
                return
            if self.command == "PUT" and proxy.refuses():
                self.send_response(503 if proxy.refused % 2 else 500)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            proxy.bytes_up += len(body)
            with closing(http.client.HTTPConnection(str(target.hostname), target.port)) as there:
                there.request(self.command, self.path, body, dict(self.headers))
                answer = there.getresponse()
                data = answer.read()
            self.send_response(answer.status)
            for key, value in answer.getheaders():
                if key.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = do_PUT = forward  # noqa: N815 - as the base class calls them

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        proxy.uri = f"http://127.0.0.1:{server.server_address[1]}"
        yield proxy
        server.shutdown()
        thread.join()
