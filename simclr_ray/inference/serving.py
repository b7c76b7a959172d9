"""An encoder behind HTTP, on Ray Serve (extra `serve`): an image in, embedding or neighbours out.

Ray's proxy takes requests and hands them to replicas; a replica reads the body, decodes it in
threads, and encodes what has come together as one batch (`serve.batch`). What is too large or no
image is refused by a 4xx before it is decoded, what comes too slowly by a 408, and what is more
than replicas keep up with by a 503, at once. Ray's proxy holds what clients send while they wait,
whatever its size, and there is no password: beyond this machine it belongs behind a proxy that has
one, and a limit.
"""
# Annotations are no strings here: FastAPI reads those of methods where their names mean nothing.

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from ray import serve
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect

from simclr_ray.augment.decode import ImageDecoder, ImageError, evaluation_view
from simclr_ray.config.uris import without_passwords
from simclr_ray.config.wording import counted
from simclr_ray.data.arrays import Float32s
from simclr_ray.distributed.machine import cores
from simclr_ray.distributed.malloc import keep_freed_memory
from simclr_ray.distributed.placement import staying_nodes
from simclr_ray.distributed.ray_cluster import is_local
from simclr_ray.errors import ClusterError
from simclr_ray.inference.embed import load_encoder
from simclr_ray.inference.embedded_images import EmbeddedImages
from simclr_ray.inference.embedding_index import EmbeddingIndex
from simclr_ray.inference.embedding_search import encoder_of
from simclr_ray.inference.encoder import as_inputs
from simclr_ray.inference.serving_hosts import OwnHosts
from simclr_ray.inference.serving_metrics import ServingMetrics
from simclr_ray.nn.precision import best_device
from simclr_ray.storage.page import render_page

Pixels = npt.NDArray[np.uint8]

log = logging.getLogger(__name__)

NAME: Final = "simclr-ray"
MOST_NEIGHBOURS: Final = 100
BYTES: Final = "application/octet-stream"
HEALTH: Final = "/health"  # what watches a replica asks by its address
GONE: Final = 499  # of a client that has not waited, as nginx counts it
ANSWER_S: Final = 120.0  # for all of a request, by Ray's proxy


@dataclass(frozen=True)
class Service:
    """What is served, and how.

    Attributes:
        encoder: Run or model, as `load_encoder` takes it; empty: the one of `index`.
        index: File of embeddings that neighbours come from; empty: none.
        images: Where its images lie now; empty: where they lay.
        tracking_uri: As in `load_encoder`.
        replicas: Processes with the encoder.
        gpus: That each of them has.
        threads: Of each: torch's, and as many that decode; 0: the CPUs shared.
        batch: Images that are encoded together, at most.
        wait_ms: How long the first of a batch waits for others.
        queued: Requests that may wait beside those in work; more get a 503.
        max_bytes: Of a body; more gets a 413.
        max_pixels: Of an image; more gets a 422.
        hosts: Names by which it may be asked, /health aside; empty: any. A page of another site,
            whose name was made to lead here, asks by that name.
        body_s: Seconds for a body to arrive; one that takes more gets a 408.
    """

    encoder: str
    index: str = ""
    images: str = ""
    tracking_uri: str = ""
    replicas: int = 1
    gpus: float = 0.0
    threads: int = 0
    batch: int = 32
    wait_ms: float = 5.0
    queued: int = 64
    max_bytes: int = 32 * 2**20
    max_pixels: int = 50_000_000
    hosts: tuple[str, ...] = ()
    body_s: float = 30.0


def _own_hosts() -> tuple[str, ...]:
    server: Any = serve.get_replica_context().servable_object  # Ray's type has no attributes
    service: Service = server.service
    return service.hosts


# FastAPI's own pages load scripts from elsewhere. All that the class names stands above it: it is
# pickled with that when it is decorated.
own_hosts = Middleware(OwnHosts, hosts=_own_hosts, open_paths=(HEALTH,))
app = FastAPI(title=NAME, docs_url=None, redoc_url=None, middleware=[own_hosts])


@serve.deployment
@serve.ingress(app)
class EncoderServer:
    """A replica: an encoder in a process of its own."""

    def __init__(self, service: Service) -> None:
        self.service = service
        threads = service.threads or max(1, cores() // service.replicas)
        torch.set_num_threads(threads)
        keep_freed_memory()  # else each batch faults the pages of its activations in again
        self.index = EmbeddingIndex(service.index) if service.index else None
        self.encoder = (
            encoder_of(self.index, service.encoder, service.tracking_uri)
            if self.index is not None
            else load_encoder(service.encoder, tracking_uri=service.tracking_uri)
        )
        self.digest = self.encoder.digest  # of hundreds of MB: once, and never between requests
        self.device = best_device()
        self.encoder.to(self.device)
        decoder = self.encoder.decoder
        least = min(decoder.max_pixels, service.max_pixels)
        self.decoder: ImageDecoder = decoder._replace(max_pixels=least)
        self.images = EmbeddedImages(self.index, service.images) if self.index else None
        self.metrics = ServingMetrics(serve.get_replica_context().replica_id.unique_id)
        # one at a time: its photographs are read and decoded whole
        self._looking = ThreadPoolExecutor(1, thread_name_prefix="neighbours")
        self._decoding = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encode")
        batching: Any = self._embed  # what the decorator adds has no types
        batching.set_max_batch_size(service.batch)
        batching.set_batch_wait_timeout_s(service.wait_ms / 1000)
        size = self.encoder.size
        blank = np.zeros((size, size, self.encoder.channels), np.uint8)
        self._encode([blank])  # before it is ready: the first pass takes longer than any other

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page(self) -> str:
        """Return a page to drop an image on."""
        return render_page("inference", "serving.html.j2", has_index=self.index is not None)

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs(self) -> str:
        """Return what can be asked, as a page."""
        paths = app.openapi()["paths"]
        rows = [
            (verb.upper(), path, operation["summary"], operation.get("description", ""))
            for path, verbs in paths.items()
            for verb, operation in verbs.items()
        ]
        return render_page("inference", "serving_docs.html.j2", rows=rows)

    @app.head(HEALTH, include_in_schema=False)
    @app.get(HEALTH, response_class=PlainTextResponse)
    async def health(self) -> str:
        """Say that the process lives; it is given requests once its encoder has encoded one."""
        return "ok"

    @app.get("/model")
    async def model(self) -> dict[str, Any]:
        """Say which encoder this is, what it takes, and the digest of its weights."""
        served = self.service.encoder or (self.index.origin.encoder if self.index else "")
        return {
            "encoder": without_passwords(served),
            "weights": self.digest,
            "feature_dim": self.encoder.feature_dim,
            "size": self.encoder.size,
            "channels": self.encoder.channels,
            "index": without_passwords(self.service.index),
        }

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus(self) -> str:
        """Return the metrics of the replica that answers, which they name, for Prometheus."""
        return self.metrics.text()

    @app.post("/embed")
    async def embed(self, request: Request) -> Response:
        """Return the embedding of the image that is the body, as JSON or as float32 bytes.

        The latter where the request accepts `application/octet-stream`.
        """
        async with self._counted():
            row = await self._embedding(request)
        if BYTES in request.headers.get("accept", ""):
            return Response(row.tobytes(), media_type=BYTES)
        return JSONResponse({"embedding": row.tolist()})

    @app.post("/neighbours")
    async def neighbours(
        self,
        request: Request,
        num: int = Query(10, ge=1, le=MOST_NEIGHBOURS),
        images: bool = Query(default=False),  # noqa: FBT001 - FastAPI's
    ) -> dict[str, Any]:
        """Return the nearest images of the index: name, cosine and, if asked for, a thumbnail."""
        if self.index is None or self.images is None:
            raise HTTPException(404, "there is no index; it was started without --index")
        async with self._counted():
            row = await self._embedding(request)
            loop = asyncio.get_running_loop()
            near = await loop.run_in_executor(self._decoding, self.index.nearest, row[None], num)
            positions, cosines = near.positions[0].tolist(), near.cosines[0].tolist()
            shown = []
            if images:
                made = await loop.run_in_executor(self._looking, self.images.thumbnails, positions)
                shown = [thumbnail.uri for thumbnail in made]
        rows = [
            {"name": self.index.names[position], "cosine": round(cosine, 6)}
            | ({"image": shown[i]} if images else {})
            for i, (position, cosine) in enumerate(zip(positions, cosines, strict=True))
        ]
        return {"neighbours": rows}

    @asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        """Count a request by its answer, also where that is an error of ours."""
        began, code = time.perf_counter(), 500
        try:
            yield
            code = 200
            self.metrics.request_s.observe(time.perf_counter() - began)
        except HTTPException as refused:
            code = refused.status_code
            raise
        except (ClientDisconnect, asyncio.CancelledError):
            code = GONE
            raise
        finally:
            self.metrics.count(code)

    async def _embedding(self, request: Request) -> Float32s:
        """Return the embedding of a request's body; raise a 4xx where it is no image."""
        most_s = self.service.body_s
        try:
            body = await asyncio.wait_for(self._body(request), most_s)
        except TimeoutError as error:
            raise HTTPException(408, f"the body took more than {most_s:g} s to arrive") from error
        loop = asyncio.get_running_loop()
        view = await loop.run_in_executor(self._decoding, self._view, body)
        row: Float32s = await self._embed(view)
        if not np.isfinite(row).all():
            raise HTTPException(500, "its embedding is not finite: the encoder has diverged")
        return row

    async def _body(self, request: Request) -> bytes:
        """Return the body; of one that is too long no more than the limit is kept here."""
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise HTTPException(415, "a form; the body is the image (curl --data-binary @a.jpg)")
        most = self.service.max_bytes
        problem = f"the body has more than {most} bytes"
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > most:
            raise HTTPException(413, problem)
        parts, read = [], 0
        async for part in request.stream():
            read += len(part)
            if read > most:
                raise HTTPException(413, problem)
            parts.append(part)
        if not read:
            raise HTTPException(400, "the body is empty; it is to be an image")
        return b"".join(parts)

    def _view(self, body: bytes) -> Pixels:
        began = time.perf_counter()
        try:
            view = evaluation_view(self.decoder.decode(body), self.encoder.size)
        except ImageError as error:
            raise HTTPException(422, str(error)) from error
        self.metrics.decode_s.observe(time.perf_counter() - began)
        return view

    @serve.batch
    async def _embed(self, views: list[Pixels]) -> list[Float32s]:
        """Return the embeddings of what has come together."""
        loop = asyncio.get_running_loop()
        rows = await loop.run_in_executor(self._encoding, self._encode, views)
        return list(rows)

    @torch.inference_mode()
    def _encode(self, views: list[Pixels]) -> Float32s:
        began = time.perf_counter()
        images = as_inputs(views).to(self.device, memory_format=torch.channels_last)
        rows: Float32s = self.encoder(images).float().cpu().numpy()
        self.metrics.batch.observe(len(views))
        self.metrics.encode_s.observe(time.perf_counter() - began)
        return rows


def check(service: Service) -> None:
    """Load what is to be served, and let it go: an error of a replica would be buried in Ray's.

    Raises:
        ConfigError: There is no such encoder, the index is of another one, or FAISS is missing.
        CheckpointError: As in `load_encoder`.
        DataError: The index or its images, where they are said to be, cannot be read.
        TrackingError: As in `load_encoder`.
    """
    if service.index:
        index = EmbeddingIndex(service.index)
        encoder_of(index, service.encoder, service.tracking_uri)
        if service.images:
            EmbeddedImages(index, service.images).close()
    else:
        load_encoder(service.encoder, tracking_uri=service.tracking_uri)


def ensure_room(service: Service) -> None:
    """Refuse more replicas on GPUs than this machine has room for: Serve would wait for them.

    On a cluster others may come, and are waited for with a warning.

    Raises:
        ClusterError: There are too few.
    """
    if not service.gpus:
        return
    of_gpu = int(1 / service.gpus + 1e-9)  # a fraction is one of a single GPU
    room = sum(
        int(node.gpus) * of_gpu if of_gpu else int(node.gpus / service.gpus)
        for node in staying_nodes()
    )
    if room >= service.replicas:
        return
    problem = (
        f"{counted(service.replicas, 'replica')} with {service.gpus:g} GPUs each "
        f"(--replicas, --gpus): there is room for {room}"
    )
    if is_local():
        raise ClusterError(problem)
    log.warning("%s; waiting for more", problem)


def ensure_unused() -> None:
    """Refuse a Ray on which Serve runs: its address is its own, and to end ours would end all.

    Raises:
        ClusterError: It does.
    """
    running = serve.status()
    if running.proxies or running.applications:
        names = ", ".join(sorted(running.applications)) or "none"
        raise ClusterError(
            f"Ray Serve runs on this cluster already (applications: {names}), at an address of its "
            "own; end it, or unset RAY_ADDRESS to serve from this machine"
        )


def start(service: Service, host: str, port: int) -> None:
    """Start the proxy and the replicas on the Ray at hand; return when they answer.

    Raises:
        ClusterError: As in `ensure_room`.
        RuntimeError: A replica does not come up; its error is in the message.
    """
    ensure_room(service)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": host, "port": port, "request_timeout_s": ANSWER_S})
    handled = service.batch * 2  # one batch is encoded while the next is decoded
    server: Any = EncoderServer
    deployment = server.options(
        num_replicas=service.replicas,
        max_ongoing_requests=handled,
        max_queued_requests=service.queued,
        ray_actor_options={"num_cpus": 0, "num_gpus": service.gpus},
    )
    serve.run(deployment.bind(service), name=NAME, route_prefix="/")


def stop() -> None:
    """End the replicas, and the proxy unless somebody has put another application behind it."""
    if set(serve.status().applications) - {NAME}:
        serve.delete(NAME)
    else:
        serve.shutdown()  # type: ignore[no-untyped-call] # Ray's
