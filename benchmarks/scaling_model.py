"""What a run on 8 to 1,024 GPUs takes of network, data nodes and memory: a model, held to figures.

    python -m benchmarks.scaling_model [--quick] [--write]

The model of a step: compute at a device's published rate; z and its log-sum-exps gathered; the
gradient summed around a ring, beside the backward pass; two exchanges a batch norm, that of their
latency. It is held against what `benchmarks.wire` counted, and against published times of SimCLR.
How often the set is read is counted by the plan itself (`data.plan`), rank by rank; so are time and
memory of a plan of a billion images, each in a process of its own. How many data nodes keep a GPU
node busy is simulated: actors whose time for a batch varies, and a queue of a few batches. Writes
`benchmarks/results/scaling_model.json`; `--write` fills the tables of `docs/scaling.md` from it.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from benchmarks.record import RESULTS, store
from simclr_ray.data.footer import RowGroup
from simclr_ray.data.plan import BatchPlan
from simclr_ray.distributed.collectives import partition
from simclr_ray.nn.resnet import RESNET50_PARAMETERS

PAGE: Final = Path(__file__).parents[1] / "docs" / "scaling.md"
IMAGENET: Final = 1_281_167
IMAGENET_BYTES: Final = 110_000  # of an image, as the set is distributed
DIM, SIDE, FLOAT = 128, 224, 4
BATCH_NORMS: Final = 54
BACKWARD: Final = 2 / 3  # of a step's compute, beside which gradients travel
LATENCY_S: Final = 30e-6  # of one hop
FASTER: Final = (1, 8)  # times a V100
GPUS: Final = (8, 32, 128, 192, 512, 1024)
LINKS: Final = {"10 Gbit/s": 1.25e9, "100 Gbit/s": 12.5e9}  # bytes a second, for each GPU
LOCAL: Final = 32  # images of a rank: 32,768 on 1,024 ranks
GROUP_ROWS: Final = 128
MIB: Final = 2**20


class Published(NamedTuple):
    """A published time of SimCLR with a ResNet-50 on ImageNet; its network is our assumption."""

    what: str
    devices: int
    batch: int
    epochs: int
    hours: float
    network: str
    source: str

    @property
    def images_per_s(self) -> float:
        """Images a second of all devices."""
        return IMAGENET * self.epochs / self.hours / 3600


PUBLISHED: Final = (
    Published("TPU v3 core", 32, 4096, 100, 6.0, "100 Gbit/s", "the authors' README"),
    Published("TPU v3 core", 128, 4096, 100, 1.5, "100 Gbit/s", "the paper, footnote 2"),
    Published("V100", 4, 512, 100, 85.0, "10 Gbit/s", "AndrewAtanov/simclr-pytorch"),
    Published("V100", 16, 2048, 200, 55.0, "10 Gbit/s", "AndrewAtanov/simclr-pytorch"),
    Published("V100", 16, 2048, 600, 170.0, "10 Gbit/s", "AndrewAtanov/simclr-pytorch"),
)


class Step(NamedTuple):
    """Where the time of a step goes, in seconds."""

    compute: float
    gather: float
    gradient: float  # what of it the backward pass does not hide
    batch_norm: float

    @property
    def total(self) -> float:
        """Seconds of all."""
        return sum(self)


def step_of(ranks: int, local: int, images_per_s: float, link: float) -> Step:
    """Return the time of a step.

    Args:
        ranks: R, one a device.
        local: Images of a rank.
        images_per_s: Of one device that is alone.
        link: Bytes a second that a device sends and receives.
    """
    compute = local / images_per_s
    ring = 2 * (ranks - 1) / ranks * RESNET50_PARAMETERS * FLOAT / link
    hops = math.log2(ranks) if ranks > 1 else 0.0
    return Step(
        compute,
        gathered(ranks, local * ranks) / link,
        max(0.0, ring - BACKWARD * compute),
        2 * BATCH_NORMS * LATENCY_S * hops,
    )


def gathered(ranks: int, images: int) -> float:
    """Return the bytes that a rank receives of z and log-sum-exps of a global batch."""
    return 2 * images * (DIM + 1) * FLOAT * (ranks - 1) / ranks


def main() -> None:
    """Compute, simulate, store; or be one of the children."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a thousandth of the images")
    parser.add_argument("--write", action="store_true", help="write docs/scaling.md's tables")
    parser.add_argument("--child", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(planned(given.child)))
        return
    if given.write:
        PAGE.write_text(filled(PAGE.read_text(), json.loads(stored_text("scaling_model"))))
        return
    scale = 1000 if given.quick else 1
    result = {
        "command": "python -m benchmarks.scaling_model",
        "against_wire": against_wire(),
        "against_published": against_published(),
        "steps": steps(),
        "reads": reads(IMAGENET // scale),
        "data_nodes": data_nodes(),
        "plans": [child(max(8192, num // scale)) for num in (IMAGENET, 10**7, 10**8, 10**9)],
    }
    if given.quick:
        print(json.dumps(result, indent=1))
        return
    store("scaling_model", result)


def stored_text(name: str) -> str:
    """Return the text of a stored result."""
    return (RESULTS / f"{name}.json").read_text()


def against_wire() -> list[dict[str, Any]]:
    """Return bytes of a step that were counted, and the model's."""
    counted = json.loads(stored_text("wire"))
    rows = []
    for row in counted["rows"]:
        if row["form"] == "simclr_ray" and not row["shared_memory"]:
            model = counted["ranks"] * gathered(counted["ranks"], row["n"])
            error = model / row["bytes_per_step"] - 1
            rows.append(
                {
                    "images": row["n"],
                    "counted": row["bytes_per_step"],
                    "model": round(model),
                    "error": round(error, 4),
                }
            )
    return rows


def against_published() -> list[dict[str, Any]]:
    """Return images a second as published and by the model.

    The first figure of a device gives its rate; the others are predicted from it.
    """
    alone: dict[str, float] = {}
    rows = []
    for figure in PUBLISHED:
        local = figure.batch // figure.devices
        is_first = figure.what not in alone
        each = alone.setdefault(figure.what, figure.images_per_s / figure.devices)
        step = step_of(figure.devices, local, each, LINKS[figure.network])
        model = figure.batch / (figure.batch / figure.devices / each if is_first else step.total)
        rows.append(
            {
                "what": f"{figure.devices} {figure.what}, B = {figure.batch:,}",
                "source": figure.source,
                "published": round(figure.images_per_s),
                "model": round(model),
                "error": None if is_first else round(model / figure.images_per_s - 1, 3),
            }
        )
    return rows


def steps() -> list[dict[str, Any]]:
    """Return a step by device, network and their number: its parts, and efficiency."""
    v100 = next(k.images_per_s / k.devices for k in PUBLISHED if k.what == "V100")
    rows = []
    for times, name, ranks in itertools.product(FASTER, LINKS, GPUS):
        each, link = times * v100, LINKS[name]
        step = step_of(ranks, LOCAL, each, link)
        rate = ranks * LOCAL / step.total
        rows.append(
            {
                "network": name,
                "images_per_s_of_a_gpu": round(each),
                "gpus": ranks,
                "ms": {part: round(1e3 * value, 2) for part, value in step._asdict().items()},
                "efficiency": round(step.compute / step.total, 3),
                "images_per_s": round(rate),
                "views_mib_per_s": round(rate * 2 * 3 * SIDE**2 / MIB),
                "set_mib_per_s": round(rate * IMAGENET_BYTES / MIB),
            }
        )
    return rows


def reads(images: int) -> list[dict[str, Any]]:
    """Return how often an epoch of ImageNet is read by all ranks together, by the plan itself."""
    sizes = (GROUP_ROWS,) * (images // GROUP_ROWS)
    rows = []
    for ranks in GPUS:
        batch = max(LOCAL * ranks, 4096)
        if batch > len(sizes) * GROUP_ROWS:
            continue
        plan = BatchPlan(sizes, batch, 0, shuffle_rows=2**16)
        visited = sum(
            len(plan.visits(0, *partition(plan.batch_size, r, ranks)).groups) for r in range(ranks)
        )
        rows.append(
            {
                "ranks": ranks,
                "lanes": plan.num_lanes,
                "sets_read": round(visited * GROUP_ROWS / plan.num_rows, 3),
            }
        )
    return rows


def planned(images: int) -> dict[str, Any]:
    """Return what a plan of so many images takes in this process: seconds, and memory."""
    before = resident()
    began = time.perf_counter()
    plan = BatchPlan((GROUP_ROWS * 8,) * (images // (GROUP_ROWS * 8)), 4096, 0, shuffle_rows=2**16)
    rows = plan.rows_of(0, 0, LOCAL)
    first_s = time.perf_counter() - began
    began = time.perf_counter()
    steps = min(plan.steps_per_epoch, 100)
    for step in range(1, steps):
        plan.rows_of(step, 0, LOCAL)
    step_s = (time.perf_counter() - began) / max(1, steps - 1)
    began = time.perf_counter()
    visits = plan.visits(0, 0, LOCAL)
    visits_s, of_plan = time.perf_counter() - began, resident()
    groups = tuple(
        RowGroup(file, 0, file * size, size) for file, size in enumerate(plan.group_sizes)
    )
    return {
        "images": images,
        "row_groups": len(plan.group_sizes),
        "first_step_s": round(first_s, 3),
        "step_ms": round(1e3 * step_s, 3),
        "visits_s": round(visits_s, 3),
        "row_groups_of_a_rank": len(visits.groups),
        "mib": round((of_plan - before) / MIB, 1),
        "source_mib": round((resident() - of_plan) / MIB, 1),
        "pickled_mib": round(len(pickle.dumps(groups)) / MIB, 1),
        "rows_of_a_step": len(rows),
    }


def child(images: int) -> dict[str, Any]:
    """Return what a process of its own takes for a plan."""
    command = [sys.executable, "-m", "benchmarks.scaling_model", "--child", str(images)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def resident() -> int:
    """Return the most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def data_nodes() -> dict[str, Any]:
    """Return how busy GPU nodes are by what data nodes can make of what they need."""
    rows = []
    for ratio in (0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 2.0):
        busy = {cv: round(busy_share(ratio, cv), 3) for cv in (0.2, 1.0)}
        rows.append({"capacity": ratio, "busy_steady": busy[0.2], "busy_unsteady": busy[1.0]})
    measured = json.loads(stored_text("views_224"))
    per_core = measured["images_per_s"]["encoded"]["simclr_ray"] / measured["threads"]
    return {"images_per_s_of_a_core": round(per_core), "rows": rows}


def busy_share(capacity: float, variation: float, *, actors: int = 16, ahead: int = 2) -> float:
    """Return the share of time that a GPU computes, which takes a batch of every actor in turn.

    An actor makes a batch in a time of gamma distribution, and may be `ahead` batches ahead.

    Args:
        capacity: Of all actors, in batches for each that the GPU computes in that time.
        variation: Standard deviation of an actor's time, of its mean.
        actors: Which make the batches, in turn.
        ahead: Batches that wait for the GPU at most, of each actor.
    """
    rng = np.random.default_rng(0)
    num = 20_000
    mean = actors / capacity
    shape = 1 / variation**2
    takes = rng.gamma(shape, mean / shape, num)
    free = [(0.0, actor) for actor in range(actors)]
    heapq.heapify(free)
    taken = np.zeros(num)
    done = np.zeros(num)
    begins = [0.0] * actors
    gpu = 0.0
    for index in range(num):
        actor = index % actors
        allowed = taken[index - ahead * actors] if index >= ahead * actors else 0.0
        done[index] = max(begins[actor], allowed) + takes[index]
        begins[actor] = done[index]
        gpu = max(gpu, done[index])
        taken[index] = gpu
        gpu += 1.0
    return num / gpu


def filled(page: str, result: dict[str, Any]) -> str:
    """Return the page with each table anew, from `<!-- NAME -->` to `<!-- end -->`."""
    for name, rows in TABLES.items():
        head, mark, rest = page.partition(f"<!-- {name} -->\n")
        if not mark:
            raise SystemExit(f"{PAGE}: no table {name}")
        page = (
            head
            + mark
            + "\n".join(rows(result))
            + "\n<!-- end -->"
            + rest.partition("<!-- end -->")[2]
        )
    return page


def table(head: str, rows: Iterable[str]) -> list[str]:
    """Return the lines of a table; numbers to the right."""
    return [head, "|---" + "|---:" * (head.count("|") - 2) + "|", *rows]


def _wire(result: dict[str, Any]) -> list[str]:
    rows = (
        f"| {r['images']:,} | {r['counted']:,} | {r['model']:,} | {100 * r['error']:+.1f} % |"
        for r in result["against_wire"]
    )
    return table("| images | counted, bytes | model | error |", rows)


def _published(result: dict[str, Any]) -> list[str]:
    rows = (
        f"| {r['what']} | {r['published']:,} | {r['model']:,} | "
        + ("gives the rate" if r["error"] is None else f"{100 * r['error']:+.0f} %")
        + f" | {r['source']} |"
        for r in result["against_published"]
    )
    return table("| hardware | published, images/s | model | error | source |", rows)


def _steps(result: dict[str, Any]) -> list[str]:
    rows = (
        f"| {r['images_per_s_of_a_gpu']:,} | {r['network']} | {r['gpus']:,} | "
        + " | ".join(f"{value:,.1f}" for value in r["ms"].values())
        + f" | {100 * r['efficiency']:.0f} % | {r['images_per_s']:,} | {r['views_mib_per_s']:,} | "
        f"{r['set_mib_per_s']:,} |"
        for r in result["steps"]
    )
    head = (
        "| images/s of a GPU | network | GPUs | compute, ms | gather | gradient left "
        "| batch norm | efficiency | images/s | views, MiB/s | set, MiB/s |"
    )
    return table(head, rows)


def _reads(result: dict[str, Any]) -> list[str]:
    rows = (f"| {r['ranks']:,} | {r['lanes']} | {r['sets_read']:.2f} |" for r in result["reads"])
    return table("| ranks | lanes | sets read an epoch |", rows)


def _nodes(result: dict[str, Any]) -> list[str]:
    rows = (
        f"| {r['capacity']:.1f} | {100 * r['busy_steady']:.0f} % | "
        f"{100 * r['busy_unsteady']:.0f} % |"
        for r in result["data_nodes"]["rows"]
    )
    return table("| made of what is needed | GPU busy, steady | GPU busy, unsteady |", rows)


def _plans(result: dict[str, Any]) -> list[str]:
    rows = (
        f"| {r['images']:,} | {r['row_groups']:,} | {r['first_step_s']:.2f} | {r['step_ms']:.2f} | "
        f"{r['visits_s']:.2f} | {r['mib']:,.0f} | {r['source_mib']:,.0f} | "
        f"{r['pickled_mib']:,.0f} |"
        for r in result["plans"]
    )
    return table(
        "| images | row groups | first step, s | each step, ms | what a rank reads, s | plan, MiB "
        "| row groups, MiB | sent, MiB |",
        rows,
    )


def _measured(_: dict[str, Any]) -> list[str]:
    rows = json.loads(stored_text("scaling"))["steps"]
    sizes = sorted({row["batch_size"] for row in rows})
    rates = {(row["workers"], row["batch_size"]): row["images_per_s"] for row in rows}
    workers = sorted({row["workers"] for row in rows})
    lines = [
        f"| {w} | " + " | ".join(f"{rates[w, size]:,.0f}" for size in sizes) + " |" for w in workers
    ]
    return table("| workers | " + " | ".join(f"B = {s:,}" for s in sizes) + " |", lines)


TABLES: Final[dict[str, Callable[[dict[str, Any]], list[str]]]] = {
    "measured": _measured,
    "wire": _wire,
    "published": _published,
    "steps": _steps,
    "reads": _reads,
    "data nodes": _nodes,
    "plans": _plans,
}

if __name__ == "__main__":
    main()
