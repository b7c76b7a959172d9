"""What a run on 8 to 1,024 GPUs takes of network, data nodes and memory: a model, held to figures.

    python -m benchmarks.scaling_model [--quick] [--write]

The model of a step: compute at a device's published rate; z and its log-sum-exps gathered; the
gradient summed around a ring, beside the backward pass; two exchanges a batch norm, that of their
latency. It is held against what `benchmarks.wire` counted, and against published times of SimCLR.
How often the set is read is counted by the plan itself (`data.plan`), rank by rank. How many data
nodes keep GPUs busy is simulated in `benchmarks.data_nodes`; a billion images are planned in
`benchmarks.billion`, with footers of $SIMCLR_RAY_DATA/caltech101. Writes
`benchmarks/results/scaling_model.json`; `--write` fills the tables of `docs/scaling.md` from it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks import billion
from benchmarks.billion import BILLION, IMAGE_BYTES, LOCAL, child, footer_of, planned
from benchmarks.data_nodes import data_nodes
from benchmarks.record import RESULTS, store
from simclr_ray.data.plan import BatchPlan
from simclr_ray.distributed.collectives import partition
from simclr_ray.nn.resnet import RESNET50_PARAMETERS

PAGE: Final = Path(__file__).parents[1] / "docs" / "scaling.md"
IMAGENET: Final = 1_281_167
DIM, SIDE, FLOAT = 128, 224, 4
BATCH_NORMS: Final = 54
BACKWARD: Final = 2 / 3  # of a step's compute, beside which gradients travel
LATENCY_S: Final = 30e-6  # of one hop
FASTER: Final = (1, 8)  # times a V100
GPUS: Final = (8, 32, 128, 192, 512, 1024)
LINKS: Final = {"10 Gbit/s": 1.25e9, "100 Gbit/s": 12.5e9}  # bytes a second, for each GPU
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
        images_per_s: Of one device alone, which exchanges nothing.
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
    args = parser.parse_args()
    if args.child:
        print(json.dumps(planned(args.child)))
        return
    if args.write:
        PAGE.write_text(filled(PAGE.read_text(), json.loads(stored_text("scaling_model"))))
        return
    scale = 1000 if args.quick else 1
    images = Path(os.environ["SIMCLR_RAY_DATA"]) / "caltech101" / "train" / "part-00000.parquet"
    plans = [child(max(8192, num // scale)) for num in (IMAGENET, 10**7, 10**8, BILLION)]
    gpu_rates = [times * rate_alone("V100") for times in FASTER]
    result = {
        "command": "python -m benchmarks.scaling_model",
        "against_wire": against_wire(),
        "against_published": against_published(),
        "steps": steps(),
        "reads": reads(IMAGENET // scale),
        "data_nodes": data_nodes(),
        "plans": plans,
        "billion": billion.billion(plans[-1], footer_of(images), gpu_rates),
    }
    if args.quick:
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

    The figure of the fewest devices gives the rate of one; the others are predicted from it.
    """
    rows = []
    for figure in PUBLISHED:
        step = step_of(
            figure.devices,
            figure.batch // figure.devices,
            rate_alone(figure.what),
            LINKS[figure.network],
        )
        model = figure.batch / step.total
        is_smallest = figure == smallest(figure.what)
        rows.append(
            {
                "what": f"{figure.devices} {figure.what}, B = {figure.batch:,}",
                "source": figure.source,
                "published": round(figure.images_per_s),
                "model": round(model),
                "alone": round(rate_alone(figure.what), 1),
                "error": None if is_smallest else round(model / figure.images_per_s - 1, 3),
            }
        )
    return rows


def smallest(what: str) -> Published:
    """Return the published figure of the fewest devices of a kind."""
    return min((k for k in PUBLISHED if k.what == what), key=lambda k: k.devices)


def rate_alone(what: str) -> float:
    """Return the images a second of one device at which the model gives the smallest figure.

    The figure is of several devices and has their exchange in it, so that the device alone is
    faster than its part of it. A faster device makes a shorter step, so the rate is found by
    halving.
    """
    figure = smallest(what)
    low = figure.images_per_s / figure.devices
    high = 100 * low
    for _ in range(100):
        rate = (low + high) / 2
        step = step_of(figure.devices, figure.batch // figure.devices, rate, LINKS[figure.network])
        low, high = (rate, high) if step.total > figure.batch / figure.images_per_s else (low, rate)
    return low


def steps() -> list[dict[str, Any]]:
    """Return a step by device, network and their number: its parts, and efficiency."""
    v100 = rate_alone("V100")
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
                "set_mib_per_s": round(rate * IMAGE_BYTES / MIB),
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
    rows = result["data_nodes"]["rows"]
    actors = sorted({row["actors"] for row in rows})
    busy = {(row["capacity"], row["actors"]): row for row in rows}
    lines = [
        f"| {capacity:.1f} | "
        + " | ".join(
            f"{100 * busy[capacity, num][f'busy_{name}']:.0f} %"
            for name in ("steady", "unsteady")
            for num in actors
        )
        + " |"
        for capacity in sorted({row["capacity"] for row in rows})
    ]
    head = [f"{name}, {num} actors" for name in ("steady", "unsteady") for num in actors]
    return table(f"| made of what is needed | {' | '.join(head)} |", lines)


def _billion(result: dict[str, Any]) -> list[str]:
    return ["| what | takes | how it is known |", "|---|---|---|", *billion.lines(result)]


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
    "billion": _billion,
}

if __name__ == "__main__":
    main()
