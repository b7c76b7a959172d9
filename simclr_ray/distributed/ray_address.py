"""`RAY_ADDRESS`: whose cluster it names, and whether one answers; without Ray, which is slow."""

from __future__ import annotations

import os
import socket
from typing import Final

ANSWER_TIMEOUT_S: Final = 10.0
PORTS: Final = 2**16
HTTP2_SETTINGS: Final = 4  # type of a frame
HTTP2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
STARTED_HERE: Final[set[str]] = set()  # addresses of the local clusters of this process


def names_cluster() -> bool:
    """Return whether `RAY_ADDRESS` names a cluster that this process has not started itself."""
    return os.environ.get("RAY_ADDRESS", "") not in {"", *STARTED_HERE}


def check_answers(address: str) -> None:
    """Raise `OSError` where nothing listens, or no gRPC: Ray itself would go on for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return
    if int(port) >= PORTS:  # the system would take it modulo that, and ask another
        raise ConnectionError(f"{address}: there is no such port")
    with socket.create_connection((host, int(port)), timeout=ANSWER_TIMEOUT_S) as stream:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return
        stream.sendall(HTTP2_PREFACE)
        frame = stream.recv(9)  # a server's first frame holds its settings (RFC 9113 §3.4)
    if len(frame) < 4 or frame[3] != HTTP2_SETTINGS:
        raise ConnectionError(f"what listens at {address} is not Ray")
