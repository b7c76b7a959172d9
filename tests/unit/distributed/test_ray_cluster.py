"""An address where no Ray cluster is ends in one line, and soon."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import ray

from simclr_ray.distributed import ray_address, ray_cluster, ray_token
from simclr_ray.errors import ClusterError


@pytest.fixture
def stranger(request: pytest.FixtureRequest) -> Iterator[str]:
    """Listen on a port, and answer what the parameter says to whoever comes; give the address."""
    answer: bytes | None = request.param
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    stream, _ = server.accept()
                except OSError:
                    return
                if answer is not None:
                    stream.recv(64)
                    stream.sendall(answer)
                    stream.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    "stranger", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", None], indirect=True
)
def test_what_listens_but_is_not_ray_ends_in_one_line(
    stranger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_address, "ANSWER_TIMEOUT_S", 1.0)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # another test may have connected
    monkeypatch.setenv("RAY_ADDRESS", stranger)
    began = time.monotonic()
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at RAY_ADDRESS={stranger}"):
        ray_cluster.connect()
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("port", [2**16, 99_999, 10**20])
def test_a_port_that_cannot_be_is_an_address_where_nobody_answers(port: int) -> None:
    with pytest.raises(OSError, match="there is no such port"):
        ray_address.check_answers(f"127.0.0.1:{port}")


def test_a_ray_that_does_not_start_is_tried_twice_and_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    starts: list[object] = []

    def fail(**options: object) -> None:
        starts.append(options)
        raise RuntimeError("timed out during startup")

    monkeypatch.setattr(ray_cluster, "_init_marked", fail)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # another test may have connected
    with pytest.raises(
        ClusterError, match=r"did not start on this machine.*timed out during start"
    ):
        ray_cluster._start(num_cpus=2)
    assert starts == [{"num_cpus": 2}] * 2


def test_the_ray_of_a_check_has_a_token_and_ends_with_its_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    monkeypatch.setattr(ray_token, "create", lambda: done.append("token"))
    monkeypatch.setattr(ray_cluster, "_init_marked", lambda **given: done.append(str(given)))
    ray_cluster.start_to_check()
    token, started = done
    assert (token, "'include_dashboard': True" in started) == ("token", True)
