"""What a server's replica says and refuses, without Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi import HTTPException
from ray import serve
from starlette.requests import ClientDisconnect

from simclr_ray.cli.serve import LOOPBACK
from simclr_ray.distributed.placement import Node
from simclr_ray.errors import ClusterError
from simclr_ray.inference import serving
from simclr_ray.inference.embedding_index import Nearest
from simclr_ray.inference.serving import Service
from simclr_ray.inference.serving_hosts import OwnHosts
from simclr_ray.inference.serving_metrics import ServingMetrics

DEPLOYMENT: Any = serving.EncoderServer
REPLICA: Any = next(c for c in DEPLOYMENT.func_or_class.__mro__ if "_embedding" in vars(c))
SECRET = "s3://KEY:S3CRET@bucket/photos.parquet"


def replica(**changes: Any) -> Any:
    made = object.__new__(REPLICA)
    encoder = SimpleNamespace(feature_dim=2, size=1, channels=3)  # GET /model computes no digest
    made.service, made.index, made.encoder = Service(SECRET, SECRET), None, encoder
    made.digest = "d"
    made.metrics = ServingMetrics("r")
    made._looking = made._decoding = ThreadPoolExecutor(1)
    vars(made).update(changes)
    return made


def asked(pauses: float = 0.0) -> Any:
    async def stream() -> AsyncIterator[bytes]:
        await asyncio.sleep(pauses)
        yield b"x"

    return SimpleNamespace(headers={}, stream=stream)


def test_the_password_of_a_bucket_is_not_said() -> None:
    said = asyncio.run(replica().model())
    assert said["weights"] == "d"
    assert "S3CRET" not in str(said)
    assert said["index"] == "s3://KEY:***@bucket/photos.parquet"


def test_an_embedding_that_is_not_finite_is_no_answer() -> None:
    async def diverged(_: Any) -> Any:
        return np.array([1.0, np.nan], np.float32)

    server = replica(_view=lambda _: None, _embed=diverged)
    with pytest.raises(HTTPException, match="not finite: the encoder has diverged"):
        asyncio.run(server.embed(asked()))


def routes(router: Any = serving.app) -> Iterator[tuple[str, str]]:
    """Yield method and path of each route of an app; those of a class are nested."""
    for route in router.routes:
        if hasattr(route, "original_router"):
            yield from routes(route.original_router)
        else:
            yield from ((method, route.path) for method in route.methods)


def sent_by(app: Any, **scope: Any) -> list[Any]:
    """Return the messages of an ASGI app to a connection."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent


def answer(method: str, path: str, host: str) -> tuple[int, bytes]:
    """Return code and body of what the app answers, its routes and middleware included."""
    headers = [(b"host", host.encode()), (b"content-type", b"multipart/form-data")]  # so no image
    start, body, *_ = sent_by(
        serving.app, type="http", method=method, path=path, headers=headers, query_string=b""
    )
    return start["status"], body["body"]


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "localhost", "[::1]:80", "encoder.mine", "evil.example:8000"]
)
def test_on_this_machine_every_route_is_asked_by_its_own_name_alone(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or any site that a browser shows could ask it, by a name that it has made to lead here."""
    hosts = (*LOOPBACK, "encoder.mine")
    context = SimpleNamespace(servable_object=replica(service=Service("m", hosts=hosts)))
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    every = sorted(set(routes()))
    assert {"/", "/docs", "/model", "/metrics", "/embed", "/neighbours", "/openapi.json"} < {
        path for _, path in every
    }
    for method, path in [*every, ("GET", "/none")]:
        code, body = answer(method, path, host)
        assert (code == 403) == ("evil" in host and path != "/health")
        assert (b"--allowed-host" in body) == (code == 403)
    context.servable_object.service = Service("m")  # bound to all of a machine's names
    assert answer("GET", "/model", host)[0] == 200


def test_a_socket_that_is_asked_by_another_name_is_closed() -> None:
    door = OwnHosts(serving.app, hosts=lambda: LOOPBACK)
    sent = sent_by(door, type="websocket", path="/new", headers=[(b"host", b"evil.example")])
    assert [message["type"] for message in sent] == ["websocket.close"]


@pytest.mark.parametrize(
    ("gpus", "replicas", "room"),
    [(0.0, 9, True), (1.0, 2, True), (1.0, 3, False), (0.1, 20, True), (0.6, 2, True)],
)
def test_more_replicas_than_gpus_are_refused_on_this_machine(
    gpus: float, replicas: int, room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = [Node(f"10.0.0.{n}", is_alive=True, cpus=4, gpus=1) for n in range(2)]
    monkeypatch.setattr(serving, "staying_nodes", lambda: there)
    monkeypatch.setattr(serving, "is_local", lambda: True)
    service = Service("m", gpus=gpus, replicas=replicas)
    if room:
        serving.ensure_room(service)
        return
    with pytest.raises(ClusterError, match=r"3 replicas with 1 GPUs each .* there is room for 2"):
        serving.ensure_room(service)
    monkeypatch.setattr(serving, "is_local", lambda: False)
    serving.ensure_room(service)  # an autoscaler may bring more


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    hasty = replica(service=Service("m", body_s=0.02))
    with pytest.raises(HTTPException) as refused:
        asyncio.run(hasty._embedding(asked(pauses=5.0)))
    assert refused.value.status_code == 408


def test_thumbnails_are_made_beside_other_requests_and_answers_are_counted() -> None:
    near = Nearest(np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32))
    others_ran = threading.Event()

    def thumbnails(_: object) -> list[Any]:
        assert others_ran.wait(30)  # never set by a loop that waits for this
        return [SimpleNamespace(uri="data:,")]

    async def row(_: object) -> Any:
        return np.ones(2, np.float32)

    server = replica(
        index=SimpleNamespace(nearest=lambda *_: near, names=["a.png"]),
        images=SimpleNamespace(thumbnails=thumbnails), _embedding=row,
    )  # fmt: skip

    async def beside() -> Any:
        work = asyncio.create_task(server.neighbours(asked(), num=1, images=True))
        await asyncio.sleep(0)
        others_ran.set()
        return await work

    answer = asyncio.run(beside())
    assert answer == {"neighbours": [{"name": "a.png", "cosine": 1.0, "image": "data:,"}]}
    server.images = SimpleNamespace(thumbnails=lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(server.neighbours(asked(), num=1, images=True))

    async def leave(_: object) -> Any:
        raise ClientDisconnect

    server._embedding = leave
    with pytest.raises(ClientDisconnect):
        asyncio.run(server.neighbours(asked(), num=1, images=True))
    said = server.metrics.text()
    for code in (200, 499, 500):
        assert f'simclr_requests_total{{code="{code}",replica="r"}} 1.0' in said


def test_a_ray_on_which_serve_runs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    running = SimpleNamespace(proxies={"n": "HEALTHY"}, applications={"theirs": "RUNNING"})
    monkeypatch.setattr(serve, "status", lambda: running)
    monkeypatch.setattr(serve, "shutdown", lambda: ended.append("all"))
    monkeypatch.setattr(serve, "delete", ended.append)
    with pytest.raises(ClusterError, match="applications: theirs"):
        serving.ensure_unused()
    running.applications[serving.NAME] = "RUNNING"  # deployed behind ours since
    serving.stop()
    assert ended == [serving.NAME]
    del running.applications["theirs"]
    serving.stop()
    assert ended == [serving.NAME, "all"]
