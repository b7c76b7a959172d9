"""A dataset embedded by `simclr-ray embed`, beside the same work done by one process.

    python -m benchmarks.embedding [--rounds 3] [--rows 5000] [--folder runs/embedding] [--bucket]

CIFAR-10 of $SIMCLR_RAY_DATA by a ResNet-18 with CIFAR stem. First rounds over the first `--rows`
images, each beside one process that decodes the next batch while it encodes one. Then all 50,000:
undisturbed; then killed by SIGKILL in the middle, and started again. Of each: seconds from the
command to the first stored rows, images a second after those until the file is there, and the most
memory that all its processes had at once, what they share counted once.
With `--bucket` images and embeddings lie behind an S3-compatible server on this machine (moto,
which takes some of its time). Writes `benchmarks/results/embedding.json`, or `_bucket`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, Final

import psutil
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import torch

from benchmarks.bucket import serving
from benchmarks.record import median, store
from benchmarks.soak import memory_of, role_of
from simclr_ray import config as cfg
from simclr_ray.config.sections.model import EncoderSection
from simclr_ray.inference.embed_pieces import FIRST_ROWS, MOST_ROWS
from simclr_ray.inference.encoder import Encoder, as_inputs
from simclr_ray.inference.encoder_files import write_encoder
from simclr_ray.inference.export_formats import SAFETENSORS
from simclr_ray.nn.build import encoder_from_tree, feature_dim
from simclr_ray.storage.filesystem import entries_in, filesystem

SIZE: Final = 32
BATCH: Final = 256
POLL_S: Final = 0.1
MEMORY_S: Final = 3.0  # between two looks at memory, which cost processor time
CONFIG: Final = {"name": "resnet", "depth": 18, "stem": "cifar"}
MIB: Final = 2**20


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--folder", type=Path, default=Path("runs/embedding"))
    parser.add_argument("--bucket", action="store_true")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model = write_model(folder / "model")
    whole = Path(os.environ["SIMCLR_RAY_DATA"]) / "cifar10" / "train"
    few = write_first(whole, args.rows, folder / f"first-{args.rows}")
    if args.bucket:
        with serving(folder / "services") as bucket:
            of_few, of_whole = (
                bucket.put(local.name, sorted(local.glob("*.parquet"))) for local in (few, whole)
            )
            result = measured(model, of_few, of_whole, bucket.uri, few, args.rounds)
    else:
        result = measured(model, str(few), str(whole), str(folder / "out"), few, args.rounds)
    flag = " --bucket" if args.bucket else ""
    command = f"python -m benchmarks.embedding --rounds {args.rounds} --rows {args.rows}{flag}"
    name = "embedding_bucket" if args.bucket else "embedding"
    store(name, {"command": command, "batch_size": BATCH, "encoder": CONFIG, **result})


def measured(
    model: Path, few: str, whole: str, out: str, local: Path, rounds: int
) -> dict[str, Any]:
    """Return all figures; of `local` one process reads the same rows as `embed` of `few`."""
    alone_in, few_in = [], []
    for index in range(rounds):
        alone_in.append(in_one_process(model, local))
        few_in.append(embedded(model, few, f"{out}/few-{index}.parquet"))
        show(f"round {index}, one process {alone_in[-1]:.1f} images/s", few_in[-1])
    undisturbed = embedded(model, whole, f"{out}/whole.parquet")
    show("whole", undisturbed)
    alone = in_one_process(model, local)
    killed = embedded(model, whole, f"{out}/killed.parquet", kill_after=undisturbed["rows"] // 2)
    show("killed", killed)
    resumed = embedded(model, whole, f"{out}/killed.parquet")
    show("resumed", resumed)
    again = in_one_process(model, local)
    ratios = [o["images_per_s"] / a for o, a in zip(few_in, alone_in, strict=True)]
    few_mib = max(each["peak_mib"] for each in few_in)
    return {
        "one_process_images_per_s": [round(speed, 2) for speed in alone_in],
        "rounds": few_in,
        "of_one_process": median(ratios),
        "whole": undisturbed,
        "one_process_before_and_after_kill": [alone, again],
        "whole_of_one_process": round(undisturbed["images_per_s"] / alone, 4),
        "killed": killed,
        "resumed": resumed,
        "resumed_equals_undisturbed": digest(f"{out}/whole.parquet")
        == digest(f"{out}/killed.parquet"),
        "peak_mib": [few_mib, undisturbed["peak_mib"]],
    }


def show(name: str, result: Mapping[str, object]) -> None:
    """Print one measurement."""
    print(name, dict(result), flush=True)


def write_model(folder: Path) -> Path:
    """Write the files of an encoder with random weights."""
    if not folder.is_dir():
        torch.manual_seed(0)
        network = encoder_from_tree(CONFIG, size=SIZE, channels=3).eval()
        tree = cfg.to_tree(cfg.validate(EncoderSection, {"encoder": CONFIG}).encoder)
        encoder = Encoder(network, config=tree, size=SIZE, feature_dim=feature_dim(network))
        write_encoder(folder, encoder, [SAFETENSORS])
    return folder


def write_first(dataset: Path, rows: int, folder: Path) -> Path:
    """Write the first rows of a dataset as one of its own, in row groups of its size."""
    if not folder.is_dir():
        folder.mkdir()
        first = pq.ParquetFile(sorted(dataset.glob("*.parquet"))[0])
        size = first.metadata.row_group(0).num_rows
        table = pq.read_table(dataset).slice(0, rows)
        pq.write_table(table, folder / "part-00000.parquet", row_group_size=size)
    return folder


def in_one_process(model: Path, dataset: Path) -> float:
    """Return images a second of reading, decoding and encoding in one process of its own."""
    program = "import sys; from benchmarks.embedding import loop; loop(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(model), str(dataset)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return float(done.stdout)


def loop(model: str, dataset: str) -> None:
    """Print images a second after the first batch: threads decode the next as one is encoded."""
    from simclr_ray.inference.embed import load_encoder

    torch.set_num_threads(os.cpu_count() or 1)  # as the actors do, whatever the environment says
    encoder = load_encoder(model)
    view, began, done = encoder.transform.view, 0.0, 0
    with ThreadPoolExecutor(os.cpu_count()) as pool, torch.inference_mode():
        batches = read(Path(dataset))
        coming = pool.map(view, next(batches))  # begins at once
        for batch in chain(batches, [[]]):
            views, coming = list(coming), pool.map(view, batch)
            encoder.network(as_inputs(views)).numpy()
            done += len(views) if began else 0
            began = began or time.monotonic()
    print(done / (time.monotonic() - began))


def read(dataset: Path) -> Iterator[list[bytes]]:
    """Yield the encoded images of a dataset in batches."""
    for file in sorted(dataset.glob("*.parquet")):
        for batch in pq.ParquetFile(file).iter_batches(BATCH, columns=["image"]):
            yield batch.column(0).to_pylist()


def embedded(model: Path, where: str, out: str, *, kill_after: int = 0) -> dict[str, Any]:
    """Run `simclr-ray embed`, to the end or to a kill, and return what was seen of it."""
    fs, path = filesystem(out)
    log_file = Path(f"/tmp/embedding-{os.getpid()}.log")  # noqa: S108 - of this process
    began = time.time()
    words = ["embed", str(model), where, "--out", out, "--batch-size", str(BATCH)]
    with log_file.open("w") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "simclr_ray", *words], stdout=log, stderr=log
        )
    seen: dict[str, float] = {}  # part -> when it was first there
    roles: dict[str, float] = {}
    peak, looked, at_start = 0.0, 0.0, len(parts_of(fs, path))
    alive: set[psutil.Process] = set()
    while driver.poll() is None:
        time.sleep(POLL_S)
        for part in parts_of(fs, path):
            seen.setdefault(part, time.time())
        if time.time() - looked > MEMORY_S:
            looked = time.time()
            total, each, alive = memory_below(driver.pid)
            peak = max(peak, total)
            roles = {role: max(each.get(role, 0.0), roles.get(role, 0.0)) for role in each | roles}
        if kill_after and MOST_ROWS * len(seen) >= kill_after:  # nearly: the first are smaller
            driver.send_signal(signal.SIGKILL)
    ended = time.time()
    psutil.wait_procs(alive, timeout=60)  # the machine is ours again
    if driver.returncode and not kill_after:
        raise SystemExit(log_file.read_text())
    times = sorted(seen.values())[at_start:]
    first = times[0] if times else ended
    result: dict[str, Any] = {
        "seconds": round(ended - began, 2),
        "first_rows_s": round(first - began, 2),
        "peak_mib": round(peak),
        "peak_mib_of": {role: round(value) for role, value in sorted(roles.items())},
    }
    if kill_after:
        return result | {"parts": len(seen)}
    with fs.open_input_file(path) as file:
        rows = pq.ParquetFile(file).metadata.num_rows
    if at_start:
        return result | {"rows": rows, "parts_at_start": at_start}
    rate = (rows - FIRST_ROWS) / (ended - first)
    return result | {"rows": rows, "images_per_s": round(rate, 2)}


def parts_of(fs: pafs.FileSystem, path: str) -> list[str]:
    """Return the stored pieces of a file of embeddings that is being made."""
    folder, _, name = path.rpartition("/")
    for info in entries_in(fs, folder):
        if info.base_name.startswith(f"{name}.parts-"):
            return [i.path for i in entries_in(fs, info.path) if i.base_name.startswith("part-")]
    return []


def memory_below(pid: int) -> tuple[float, dict[str, float], set[psutil.Process]]:
    """Return MiB of a process and all below it, all and by role, and the processes."""
    each: dict[str, float] = {}
    processes = set()
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with suppress(psutil.Error, OSError):
                role = "driver" if process.pid == pid else role_of(process)
                each[role] = each.get(role, 0.0) + memory_of(process.pid)["pss"] / MIB
                processes.add(process)
    return sum(each.values()), each, processes


def digest(uri: str) -> str:
    """Return the SHA-256 of a file."""
    fs, path = filesystem(uri)
    with fs.open_input_file(path) as file:
        return hashlib.sha256(file.read()).hexdigest()


if __name__ == "__main__":
    main()
