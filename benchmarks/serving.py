"""`simclr-ray model serve` under load, beside the bare encoder on the same core.

    python -m benchmarks.serving $SIMCLR_RAY_DATA/caltech101/test [--rounds 3] [--seconds 30]

ResNet-50 at 224 px with drawn weights. The server, its proxy and Ray have the first core, with one
thread for the encoder; the client has the last. In turns: the encoder alone on that core, at the
same batch, its images decoded before; the server with batches, and with batches of one image, each
with twice the batch of requests in flight. Then twice the images a second that it can do, for the
same time, and whether it answers after that. Latencies are those of the client, in milliseconds.
Writes `benchmarks/results/serving.json`.
"""

from __future__ import annotations

import argparse
import http.client
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import torch

from benchmarks.record import median, portable, store
from simclr_ray import config as cfg
from simclr_ray.config.sections.model import EncoderSection
from simclr_ray.data.source import Source
from simclr_ray.inference.encoder import Encoder, as_inputs
from simclr_ray.inference.encoder_files import write_encoder
from simclr_ray.inference.export_formats import SAFETENSORS
from simclr_ray.nn.build import encoder_from_tree, feature_dim

SIZE: Final = 224
IMAGES: Final = 64
PORT: Final = 8790
UP_S: Final = 120.0
CONFIG: Final = {"name": "resnet", "depth": 50, "stem": "imagenet"}


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        encoder = write_model(Path(folder))
        rows = Source.open(args.images).read_rows(np.arange(IMAGES))
        bodies = [image for image in rows.images if image is not None]
        rounds: list[dict[str, Any]] = []
        for _ in range(args.rounds):
            seen: dict[str, Any] = {"bare": bare_rate(encoder, bodies, args.batch, args.seconds)}
            for name, batch in (("batched", args.batch), ("single", 1)):
                with server(Path(folder), batch) as process:
                    seen[name] = under_load(process, bodies, 2 * args.batch, args.seconds)
            rounds.append(seen)
            print(seen, flush=True)
        with server(Path(folder), args.batch, "--queued", "8") as process:
            rate = 2 * median(r["batched"]["images_per_s"] for r in rounds)
            overloaded = overload(process, bodies, rate, args.seconds)
            print(overloaded, flush=True)
    ratio = median(r["batched"]["images_per_s"] / r["bare"] for r in rounds)
    command = portable(f"python -m benchmarks.serving {args.images}")
    store(
        "serving",
        {"command": command, "batch": args.batch, "of_bare": ratio, "rounds": rounds,
         "overload": overloaded},
    )  # fmt: skip


def write_model(folder: Path) -> Encoder:
    """Write an encoder's files, and return it."""
    torch.manual_seed(0)
    tree = cfg.to_tree(cfg.validate(EncoderSection, {"encoder": CONFIG}).encoder)
    network = encoder_from_tree(tree)
    network.eval()
    encoder = Encoder(network, config=tree, size=SIZE, feature_dim=feature_dim(network))
    write_encoder(folder / "encoder", encoder, [SAFETENSORS])
    return encoder


def bare_rate(encoder: Encoder, bodies: Sequence[bytes], batch: int, seconds: float) -> float:
    """Return the images a second of the encoder alone, in a thread on the first core."""
    inputs = as_inputs([encoder.transform.view(body) for body in bodies[:batch]])
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    result: list[float] = []

    def encode() -> None:
        os.sched_setaffinity(0, {0})
        torch.set_num_threads(1)
        with torch.inference_mode():
            encoder(inputs)
            began, count = time.monotonic(), 0
            while time.monotonic() - began < seconds:
                encoder(inputs)
                count += batch
        result.append(count / (time.monotonic() - began))

    thread = threading.Thread(target=encode)
    thread.start()
    thread.join()
    return round(result[0], 3)


@contextmanager
def server(folder: Path, batch: int, *words: str) -> Iterator[psutil.Process]:
    """Serve on the first core while the block runs."""
    log = folder / "serve.log"
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    options = ["--port", str(PORT), "--batch", str(batch), "--threads", "1", "--wait-ms", "20"]
    with log.open("w") as out:
        running = subprocess.Popen(
            ["taskset", "-c", "0", sys.executable, "-m", "simclr_ray", "model", "serve",
             str(folder / "encoder"), *options, *words],
            stdout=out, stderr=out, env=env | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        until = time.monotonic() + UP_S
        while "to end it" not in log.read_text():
            if running.poll() is not None or time.monotonic() > until:
                raise SystemExit(log.read_text())
            time.sleep(0.2)
        yield psutil.Process(running.pid)
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(60)


def ask(body: bytes) -> tuple[int, float]:
    """Return the code of an answer, and the seconds that it took."""
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=120)
    try:
        connection.request("POST", "/embed", body, {"Accept": "application/octet-stream"})
        answer = connection.getresponse()
        answer.read()
        return answer.status, time.monotonic() - began
    finally:
        connection.close()


def under_load(
    process: psutil.Process, bodies: Sequence[bytes], in_flight: int, seconds: float
) -> dict[str, Any]:
    """Return what a server does with as many requests in flight at any time."""
    os.sched_setaffinity(0, {(os.cpu_count() or 1) - 1})
    try:
        with ThreadPoolExecutor(in_flight) as pool:
            list(pool.map(ask, bodies[:in_flight]))  # the first have nothing to wait for
            cpu, began = _cpu_s(process), time.monotonic()
            answers: list[tuple[int, float]] = []

            def work(place: int) -> None:
                while time.monotonic() - began < seconds:
                    answers.append(ask(bodies[place % len(bodies)]))

            list(pool.map(work, range(in_flight)))
        took = time.monotonic() - began
        used = {role: round((_cpu_s(process)[role] - cpu[role]) / took, 3) for role in cpu}
    finally:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    times = np.array([one for code, one in answers if code == 200])
    return {
        "images_per_s": round(len(times) / took, 3),
        "p50_ms": round(1000 * float(np.percentile(times, 50)), 1),
        "p99_ms": round(1000 * float(np.percentile(times, 99)), 1),
        "codes": dict(Counter(str(code) for code, _ in answers)),
        "cpu": used,
    }


def overload(
    process: psutil.Process, bodies: Sequence[bytes], rate: float, seconds: float
) -> dict[str, Any]:
    """Return what a server does with requests at a fixed rate, and how it answers after that."""
    answers: list[tuple[int, float]] = []
    with ThreadPoolExecutor(256) as pool:
        began, count = time.monotonic(), 0
        pending = []
        while time.monotonic() - began < seconds:
            pending.append(pool.submit(ask, bodies[count % len(bodies)]))
            count += 1
            time.sleep(max(0.0, began + count / rate - time.monotonic()))
        answers = [one.result() for one in pending]
    after = [ask(body) for body in bodies[:8]]
    good = np.array([one for code, one in answers if code == 200])
    return {
        "asked_per_s": round(rate, 2),
        "codes": dict(Counter(str(code) for code, _ in answers)),
        "p99_ms": round(1000 * float(np.percentile(good, 99)), 1),
        "after": dict(Counter(str(code) for code, _ in after)),
        "is_running": process.is_running(),
    }


def _cpu_s(process: psutil.Process) -> dict[str, float]:
    """Return the processor seconds of the replica, the proxy, and all else that the server is."""
    used = {"replica": 0.0, "proxy": 0.0, "rest": 0.0}
    for one in [process, *process.children(recursive=True)]:
        try:
            title = " ".join(one.cmdline())
            times = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        is_proxy = "Proxy" in title
        role = "replica" if "ServeReplica" in title else "proxy" if is_proxy else "rest"
        used[role] += times.user + times.system
    return used


if __name__ == "__main__":
    main()
