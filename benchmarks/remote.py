"""A set ten times larger than the cache: from a bucket, and from the local disk.

    python -m benchmarks.remote PARQUET [--rows 11520] [--group-rows 48] [--size 96] [--epochs 2]
        [--batch 128] [--rounds 3] [--files 8] [--name stream_remote] [--quick]

Rows of PARQUET are repeated until there are enough and written anew, in FILES files. The bucket is
served by moto on loopback, by a process of its own that counts the bytes of its answers. Of decoded
images a tenth of the set's bytes are kept, and the shuffle windows span a tenth of its rows.
Streamed is as by one rank with two data actors, and, for the bytes alone, as by three ranks with
one each; the consumer does nothing else. The server takes time of the same cores: `of_cores_left`
is the ratio of rates, each by the cores that the server leaves. Every form has a process of its
own, rounds take turns. Writes `benchmarks/results/NAME.json`.

For each range that is asked for moto reads its file whole: many row groups want many files.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.bucket import Bucket, serving
from benchmarks.record import portable, store
from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.batches import build_plan, join
from simclr_ray.data.listing import list_parquet
from simclr_ray.data.source import Source
from simclr_ray.storage.filesystem import filesystem

SHARE = 10
FORMS = {"disk": 1, "bucket": 1, "bucket, three ranks": 3}
Row = dict[str, float]


class Settings(argparse.Namespace):
    """The command line."""

    parquet: str
    rows: int
    group_rows: int
    size: int
    epochs: int
    batch: int
    rounds: int
    files: int
    name: str
    quick: bool
    child: str
    ranks: int
    server: int
    services: Path


def main() -> None:
    """Measure and store; or, as a child, stream once."""
    settings = parse(sys.argv[1:])
    if settings.child:
        print("ROW " + json.dumps(streamed(settings)), flush=True)
        os._exit(0)
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with tempfile.TemporaryDirectory() as folder, serving(settings.services.resolve()) as bucket:
        num_bytes = write(settings, Path(folder))
        where = bucket.put("set", sorted(Path(folder).iterdir()))
        uris = {form: folder if form == "disk" else where for form in FORMS}
        rounds: dict[str, list[Row]] = {form: [] for form in FORMS}
        for _ in range(settings.rounds):
            for form, ranks in FORMS.items():
                rounds[form].append(one(uris[form], ranks, bucket, settings.epochs * num_bytes))
                print(form, json.dumps(rounds[form][-1]), flush=True)
    result = {
        "command": "python -m benchmarks.remote " + " ".join(map(portable, sys.argv[1:])),
        "set": {"bytes": num_bytes, "rows": settings.rows, "group_rows": settings.group_rows},
        **summary(rounds),
        "rounds": rounds,
    }
    store(settings.name, result)
    print(json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=1))


def parse(arguments: list[str]) -> Settings:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parquet")
    parser.add_argument("--rows", type=int, default=11_520)
    parser.add_argument("--group-rows", type=int, default=48)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--name", default="stream_remote")
    parser.add_argument("--services", type=Path, default=Path("runs/services"))
    parser.add_argument("--quick", action="store_true", help="one round of smaller images")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--server", type=int, default=0, help=argparse.SUPPRESS)
    settings = parser.parse_args(arguments, namespace=Settings())
    if settings.quick:
        settings.size, settings.rounds = 32, 1
    return settings


def summary(rounds: dict[str, list[Row]]) -> dict[str, object]:
    """Return what the rounds show: rates, their ratio, the server's share, and bytes read."""
    rates = {
        form: statistics.median(r["images_per_s"] for r in rows) for form, rows in rounds.items()
    }
    cores = os.cpu_count() or 1
    taken = statistics.median(row["server_cores"] for row in rounds["bucket"])
    ratio = rates["bucket"] / rates["disk"]
    return {
        "images_per_s": {form: round(rate, 1) for form, rate in rates.items()},
        "ratio": round(ratio, 3),
        "server_cores": taken,
        "of_cores_left": round(ratio * cores / (cores - taken), 3),
        "bytes_read_of_set": {
            form: max(row["bytes_read_of_set"] for row in rows)
            for form, rows in rounds.items()
            if form != "disk"
        },
        # each process that opens the set reads the ends of all its files, once
        "footers_of_set": {
            form: max(row["footers_of_set"] for row in rows)
            for form, rows in rounds.items()
            if form != "disk"
        },
    }


def write(settings: Settings, folder: Path) -> int:
    """Write the set and return its bytes."""
    source = pq.read_table(settings.parquet, columns=["image"])["image"].combine_chunks()
    images = source.take(pa.array(i % len(source) for i in range(settings.rows)))
    per_file = -(-settings.rows // settings.files)
    for file in range(settings.files):
        table = pa.table({"image": images[file * per_file : (file + 1) * per_file]})
        path = folder / f"{file:04d}.parquet"
        pq.write_table(table, path, row_group_size=settings.group_rows, compression="none")
    return sum(path.stat().st_size for path in folder.iterdir())


def one(uri: str, ranks: int, bucket: Bucket, expected: int) -> Row:
    """Stream once in a process of its own; return its row, with what the server sent for it."""
    options = ["--child", uri, "--ranks", str(ranks), "--server", str(bucket.pid)]
    command = [sys.executable, "-m", "benchmarks.remote", *sys.argv[1:], *options]
    sent, before = bucket.bytes_sent(), len(bucket.reads())
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if not rows:
        raise SystemExit(f"{uri} failed:\n{done.stderr[-4000:]}")
    row: Row = json.loads(rows[-1].removeprefix("ROW "))
    row["bytes_read_of_set"] = round((bucket.bytes_sent() - sent) / expected, 4)
    sizes = sizes_of(uri)
    footers = sum(
        read.size
        for read in bucket.reads()[before:]
        if read.first + read.size >= sizes.get(read.path, sys.maxsize)
    )
    row["footers_of_set"] = round(footers / expected, 4)
    return row


def sizes_of(uri: str) -> dict[str, int]:
    """Return the bytes of each file of a set, by its path."""
    fs, root = filesystem(uri)
    return {file.path: file.size for file in list_parquet(fs, root, uri).files}


def experiment(settings: Settings, source: Source) -> Experiment:
    """Return what is streamed."""
    num_bytes = sum(sizes_of(settings.child).values())
    tree: dict[str, Any] = {
        "name": "remote",
        "data": {
            "train": settings.child,
            "cache_gib": num_bytes / SHARE / 2**30,
            "shuffle_rows": source.num_rows // SHARE,
        },
        "augment": {"size": settings.size, "strength": 0.5, "blur": 0.0},
        "batch_size": settings.batch,
        "epochs": settings.epochs,
        "scaling": {"data_actors_per_worker": 2 if settings.ranks == 1 else 1},
    }
    return cfg.validate(Experiment, tree)


def streamed(settings: Settings) -> Row:
    """Stream all epochs as each of the ranks does, and return the rate after the first batch."""
    import ray

    from simclr_ray.data.stream import stream

    source = Source.open(settings.child)
    trained = experiment(settings, source)
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, logging_level=logging.ERROR,
        log_to_driver=False,
    )  # fmt: skip
    steps = range(trained.total_steps(source.num_rows))
    ranks = [stream(trained, source, steps, r, settings.ranks) for r in range(settings.ranks)]
    server = psutil.Process(settings.server)
    times, taken = [], []
    for parts in zip(*ranks, strict=True):
        join(parts)
        times.append(time.perf_counter())
        if len(times) in (1, len(steps)):
            taken.append(sum(server.cpu_times()[:2]))
    ray.shutdown()  # what its actors have decoded is gone before the next form
    streamed_s = times[-1] - times[0]
    return {
        "images_per_s": round(settings.batch * (len(times) - 1) / streamed_s, 1),
        "server_cores": round((taken[-1] - taken[0]) / streamed_s, 3),
        "lanes": build_plan(trained, source).num_lanes,
    }


if __name__ == "__main__":
    main()
