"""What a billion images take before a step is trained: footers, plan, order and memory of a node.

The plan is made for so many images, in a process of its own; a footer is that of a file of
Caltech-101 that is written again in as many row groups as a file of 1 GB has. What follows from
these by a product says so in the table.
"""

from __future__ import annotations

import json
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import pyarrow.fs as pafs
import pyarrow.parquet as pq

from benchmarks.data_nodes import core_rate
from simclr_ray.data.footer import RowGroup, read_footer
from simclr_ray.data.listing import REMOTE_THREADS, Listed
from simclr_ray.data.plan import BatchPlan

BILLION: Final = 10**9
IMAGE_BYTES: Final = 110_000  # of an image of ImageNet, as the set is distributed
ROWS, BATCH, LOCAL = 1024, 4096, 32  # of a row group, of all ranks, of a rank
GROUPS_OF_A_FILE: Final = 9  # a file of 1 GB
REQUEST_S: Final = 0.03  # of a bucket, assumed
REQUESTS: Final = 3  # of a footer: the first bytes, the last, and the footer itself
WORKERS, ACTORS = 8, 8  # of a node of 8 GPUs, and of a worker, as the ImageNet presets have it
AWS_ACTORS: Final = 16  # on the data node of cluster/aws.yaml: 4 of each of 4 workers
MADE: Final = 1.2  # of what is needed, on nodes of one's own (`data_nodes`)
NODE_CORES: Final = 16  # of a data node
MIB: Final = 2**20


def planned(images: int) -> dict[str, Any]:
    """Return what a plan of so many images takes in this process: seconds, and memory."""
    before = resident()
    began = time.perf_counter()
    plan = BatchPlan((ROWS,) * (images // ROWS), BATCH, 0, shuffle_rows=2**16)
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
        "steps_per_epoch": plan.steps_per_epoch,
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


def footer_of(file: Path, groups: int = GROUPS_OF_A_FILE) -> dict[str, Any]:
    """Return bytes of the footer of a file that is written again in `groups` row groups, and ms.

    Args:
        file: Of real images, whose columns and schema it has.
        groups: Row groups.
    """
    table = pq.read_table(file)
    fs = pafs.LocalFileSystem()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.parquet"
        pq.write_table(table, path, row_group_size=-(-len(table) // groups))
        listed = Listed(str(path), path.stat().st_size)
        footer, times = read_footer(fs, listed), []
        for _ in range(50):
            began = time.perf_counter()
            read_footer(fs, listed)
            times.append(time.perf_counter() - began)
        size = pq.read_metadata(path).serialized_size
    return {
        "row_groups": len(footer.group_rows),
        "columns": len(footer.schema),
        "bytes": size,
        "ms": round(1e3 * statistics.median(times), 3),
    }


def billion(plan: dict[str, Any], footer: dict[str, Any], gpu_rates: list[float]) -> dict[str, Any]:
    """Return what a billion images take, by what was measured of a plan and of a footer.

    Args:
        plan: As `planned` gives it, of a billion.
        footer: As `footer_of` gives it.
        gpu_rates: Images a second of one GPU, of each kind.
    """
    files = -(-plan["row_groups"] // footer["row_groups"])
    actor_mib = plan["mib"] + plan["source_mib"]
    core = core_rate()
    return {
        "images": plan["images"],
        "set_tib": round(plan["images"] * IMAGE_BYTES / 2**40, 1),
        "files": files,
        "row_groups": plan["row_groups"],
        "footer": footer,
        "footers_mib": round(files * footer["bytes"] / MIB),
        "footers_local_s": round(files * footer["ms"] / 1e3, 1),
        "footers_bucket_s": round(files * REQUESTS * REQUEST_S / REMOTE_THREADS),
        "actor_mib": round(actor_mib),
        "worker_mib": round(plan["source_mib"]),
        "node_workers_mib": round(WORKERS * plan["source_mib"]),
        "node_all_mib": round(WORKERS * (plan["source_mib"] + ACTORS * actor_mib)),
        "aws_data_node_mib": round(AWS_ACTORS * actor_mib),
        "core_images_per_s": round(core),
        "cores_of_a_node": [
            {
                "images_per_s_of_a_gpu": round(rate),
                "cores": round(WORKERS * rate * MADE / core, 1),
                "epoch_h": round(plan["images"] / (WORKERS * rate) / 3600, 1),
            }
            for rate in gpu_rates
        ],
    }


def lines(result: dict[str, Any]) -> list[str]:
    """Return the rows of the table of a billion images."""
    b = result["billion"]
    plan = next(p for p in result["plans"] if p["images"] == b["images"])
    footer = b["footer"]
    rows = [
        ("the set", f"{b['set_tib']} TiB at {IMAGE_BYTES // 1000} KB an image", "computed"),
        ("manifest", f"{b['files']:,} files of 1 GB, {b['row_groups']:,} row groups", "computed"),
        ("a footer", f"{footer['bytes']:,} bytes and {footer['ms']:.2f} ms, "
         f"{footer['row_groups']} row groups of {footer['columns']} columns",
         "measured, of a file that the system has in memory"),
        ("all footers", f"{b['footers_mib']} MiB, {b['footers_local_s']:.0f} s from such files, "
         f"{b['footers_bucket_s']:,} s from a bucket",
         f"computed; {REQUESTS} requests of {1e3 * REQUEST_S:.0f} ms each, assumed, "
         f"{REMOTE_THREADS} at a time"),
        ("plan", f"{plan['first_step_s']:.2f} s to the first step, {plan['mib']:.0f} MiB",
         "measured"),
        ("order", f"{plan['step_ms']:.2f} ms a step, {plan['steps_per_epoch']:,} steps an epoch",
         "measured"),
        ("memory of a decode actor", f"{b['actor_mib']} MiB: plan and row groups", "measured"),
        ("memory of a worker", f"{b['worker_mib']} MiB: row groups", "measured"),
        (f"a node of {WORKERS} GPUs that decodes elsewhere",
         f"{b['node_workers_mib']} MiB, {WORKERS} workers", "computed"),
        (f"a node of {WORKERS} GPUs that decodes itself",
         f"{b['node_all_mib']:,} MiB, {WORKERS} workers and {WORKERS * ACTORS} actors",
         "computed"),
        ("`cluster/aws.yaml`, a GPU node", f"{b['worker_mib']} MiB, 1 worker", "computed"),
        ("`cluster/aws.yaml`, the data node",
         f"{b['aws_data_node_mib']:,} MiB, {AWS_ACTORS} actors", "computed"),
    ]  # fmt: skip
    for kind in b["cores_of_a_node"]:
        rate = kind["images_per_s_of_a_gpu"]
        rows.append(
            (
                f"cores of data nodes for {WORKERS} GPUs, {rate:,} images/s each",
                f"{kind['cores']}: {WORKERS} × {rate:,} × {MADE} / {b['core_images_per_s']}, which "
                f"is {kind['cores'] / NODE_CORES:.2f} data nodes of {NODE_CORES} cores for each "
                f"GPU node; one such node takes {kind['epoch_h']:,} h for an epoch",
                "computed, of views measured",
            )
        )
    return [f"| {what} | {much} | {how} |" for what, much, how in rows]
