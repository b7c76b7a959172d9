"""Checks that a Ray server answers at an address, before Ray itself waits for it."""

from __future__ import annotations

import os
import socket
from typing import Final

ANSWER_TIMEOUT_S: Final = 10.0
PORTS: Final = 2**16
HTTP2_SETTINGS: Final = 4  # type of a frame
HTTP2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


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
