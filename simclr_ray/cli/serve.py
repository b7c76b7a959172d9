"""`simclr-ray model serve`: an encoder behind HTTP."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from typing import Annotated
from urllib.parse import urlsplit

import typer

from simclr_ray.cli.arguments import TrackingUri
from simclr_ray.cli.console import loading, say
from simclr_ray.config.wording import MIB
from simclr_ray.errors import ClusterError, ConfigError, last_line

LOOK_S = 1.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
EXTRA = "simclr-ray[serve]"


def serve(
    model: Annotated[
        str, typer.Argument(metavar="[RUN_OR_MODEL]", help="Empty: the one of --index.")
    ] = "",
    index: Annotated[str, typer.Option(help="What `embed --out` wrote, for neighbours.")] = "",
    images: Annotated[
        str, typer.Option(help="Where its images lie now.", show_default="where they were embedded")
    ] = "",
    host: Annotated[str, typer.Option(help="0.0.0.0: to all; there is no password.")] = "127.0.0.1",
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="Asked by this name: of a proxy before it, or its own.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of HTTP.")] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Processes with the encoder.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="That each of them has.")] = 0.0,
    threads: Annotated[int, typer.Option(min=0, help="Of each; 0: the CPUs shared.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images encoded together, at most.")] = 32,
    wait_ms: Annotated[
        float, typer.Option(min=0, help="That the first of a batch waits for others.")
    ] = 5.0,
    queued: Annotated[int, typer.Option(min=1, help="Requests that wait; more get a 503.")] = 64,
    max_mib: Annotated[int, typer.Option(min=1, help="Of a body; more gets a 413.")] = 32,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Of an image; more gets a 422.")
    ] = 50_000_000,
    tracking_uri: TrackingUri = "",
) -> None:
    """Serve an encoder over HTTP: POST an image to /embed or /neighbours, or drop it on the page.

    Ctrl-C or SIGTERM ends it. /docs says what can be asked, /metrics is for Prometheus.

    Example: simclr-ray model serve models:/photos@newest --port 8000
    Example: simclr-ray model serve --index photos.parquet
    """
    if not model and not index:
        raise ConfigError.of("RUN_OR_MODEL", "is missing; or give --index")
    _check_port(host, port)
    loading("torch", "ray")
    try:
        from simclr_ray.inference.serving import (
            Service,
            check,
            ensure_unused,
            start,
            stop,
        )
    except ImportError as error:
        problem = f"needs Ray Serve: pip install '{EXTRA}' ({error})"
        raise ConfigError.of("serve", problem) from error
    from simclr_ray.distributed.ray_cluster import connect

    service = Service(
        model, index, images, tracking_uri, replicas, gpus, threads, batch, wait_ms, queued,
        max_mib * MIB, max_pixels, _hosts(host, allowed_host or []),
    )  # fmt: skip
    check(service)
    connect()
    ensure_unused()
    try:
        start(service, host, port)
        say(f"http://{host}:{port}/ (to end it: Ctrl-C)")
        _wait()
    except RuntimeError as error:
        raise ClusterError(f"the server did not come up: {last_line(error)}") from error
    finally:
        stop()


def _hosts(host: str, allowed: list[str]) -> tuple[str, ...]:
    """Return the names by which a server may be asked; empty: any.

    One of this machine alone has its own besides. They are as a request's URL has them: in small
    letters, without a port.
    """
    own = LOOPBACK if host in LOOPBACK else ()
    return *own, *map(_host_of, allowed)


def _host_of(name: str) -> str:
    if name.count(":") > 1 and "[" not in name:
        return name.lower()  # of IPv6
    try:
        return urlsplit(f"//{name}").hostname or name
    except ValueError as error:
        raise ConfigError.of("--allowed-host", f"{name}: {error}") from error


def _wait() -> None:
    """Return when it is interrupted, which is how a server ends well."""
    with suppress(KeyboardInterrupt):
        while True:
            time.sleep(LOOK_S)


def _check_port(host: str, port: int) -> None:
    """Raise `ConfigError` where nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        problem = f"{host}:{port} cannot be listened on: {error.strerror or error}"
        raise ConfigError.of("--port", problem) from error
