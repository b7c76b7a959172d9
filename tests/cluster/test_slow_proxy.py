"""The pure parts of the nodes' harness: addresses, environments, and the proxy that holds back."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from tests.cluster.machines import REPOSITORY, environment_of, shared_paths
from tests.cluster.nodes import SUBNETS, CannotBuild, free_subnet
from tests.cluster.slow_proxy import Proxy


def test_a_subnet_is_taken_that_no_route_meets() -> None:
    assert free_subnet(["default", "10.77.1.0/24", "10.77.2.7", "192.168.0.0/16"]) == "10.77.3."
    with pytest.raises(CannotBuild, match="no private subnet"):
        free_subnet(f"{subnet}0/24" for subnet in SUBNETS)


def test_machines_inherit_nothing_of_the_sessions_ray_mlflow_or_store() -> None:
    given = {"PATH": "/bin", "RAY_ADDRESS": "a:1", "AWS_PROFILE": "me", "MLFLOW_TRACKING_URI": "x"}
    kept = environment_of(given)
    assert kept["PATH"] == "/bin"
    assert kept["PYTHONPATH"] == str(REPOSITORY)
    assert not {"RAY_ADDRESS", "AWS_PROFILE", "MLFLOW_TRACKING_URI"} & set(kept)
    paths = shared_paths()
    assert any(REPOSITORY.is_relative_to(path) for path in paths)
    assert not any(a != b and a.is_relative_to(b) for a in paths for b in paths)


async def _ask_thrice(settings: Path) -> list[float]:
    """Return how long each of three answers took, of 0, 0.2 and 0 s that the proxy waits."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while said := await reader.read(100):
            writer.write(said)
        writer.close()

    behind = await asyncio.start_server(echo, "127.0.0.1", 0)
    proxy = Proxy(behind.sockets[0].getsockname()[1], settings)
    front = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    port = front.sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    took = []
    for seconds in (0.0, 0.2, 0.0):
        settings.write_text(json.dumps({"seconds": seconds, "bytes_per_s": 0}))
        began = time.monotonic()
        writer.write(b"hello")
        assert await reader.read(100) == b"hello"
        took.append(time.monotonic() - began)
    writer.close()
    for server in (front, behind):
        server.close()
    return took


def test_the_proxy_holds_each_question_back_as_long_as_it_is_told(tmp_path: Path) -> None:
    took = asyncio.run(_ask_thrice(tmp_path / "slow.json"))
    assert took[1] >= 0.2
