"""Writes docs/performance.md from what is stored in benchmarks/results, and from nothing else.

    python -m benchmarks.performance [--check]

`--check` only says whether the page is what the results make, for `make test`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
Result = dict[str, Any]

HEAD = """# Performance

Written by `python -m benchmarks.performance` from the files in
benchmarks/results; do not edit. Figures are medians of rounds in which all
forms take their turn in one run. Ratios travel between machines better than times do; the command
above each table makes it anew. Where a ratio `ours / this` of times is above 1, or of rates below
1, the other form is ahead. Peers are the published packages of the versions in the result files.
"""


def main() -> None:
    """Write the page, or check it."""
    page = HEAD + "\n" + "\n".join(_section(*section) for section in SECTIONS)
    if "--check" in sys.argv[1:]:
        if PAGE.read_text() != page:
            raise SystemExit(
                f"{PAGE} is not what the results make: python -m benchmarks.performance"
            )
        return
    PAGE.write_text(page)


def _section(title: str, names: tuple[str, ...], write: Callable[..., str], about: str) -> str:
    read = {name: _read(name) for name in names}
    stored = [result for result in read.values() if result is not None]
    missing = [name for name, result in read.items() if result is None]
    parts = [f"## {title}", about]
    if stored:
        parts += [*map(_made, stored), write(*stored).rstrip()]
    if missing:
        parts.append(f"Not measured yet: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def _read(name: str) -> Result | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _made(result: Result) -> str:
    hardware = result["hardware"]
    where = hardware["gpu"] if hardware["gpu"] != "none" else hardware["cpu"]
    command = result["command"].strip()
    return f"`{command}`, commit {result['commit']}, {where}, {hardware['cores']} cores."


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _loss(result: Result) -> str:
    rows = [
        (
            f"{r['n']:,}",
            r["form"],
            f"{1e3 * r['step_s']:.1f}" if "step_s" in r else "",
            f"{r['peak_mib']:,.0f}",
            f"{r['gradient_error']:.1e}" if "gradient_error" in r else "",
        )
        for r in result["rows"]
    ]
    head = ("N", "form", "forward + backward, ms", "peak above inputs, MiB", "gradient error")
    return _table(head, rows)


def _optimizer(result: Result) -> str:
    rows = [(n, ms, result["ratio"].get(n, "")) for n, ms in result["step_ms"].items()]
    return _table(("form", "step, ms", "ours / this"), rows)


def _native(result: Result) -> str:
    lines = ["| Form | " + " | ".join(f"{size} px, speed" for size in result["size_px"]) + " |"]
    lines.append("|---" * (1 + len(result["size_px"])) + "|")
    for form in next(iter(result["size_px"].values())):
        speeds = [f"{forms[form]['speed']:.2f}" for forms in result["size_px"].values()]
        lines.append(f"| {form} | " + " | ".join(speeds) + " |")
    same = all(f["bytes_of_torch"] for forms in result["size_px"].values() for f in forms.values())
    return "\n".join(lines) + f"\n\nBytes are those of torch: {'all' if same else 'NOT all'}."


def _views(*results: Result) -> str:
    rows = [
        (f"{result['size']} px, {kind}", form, f"{rate:,.0f}", result["ratio"][kind][form])
        for result in results
        for kind, rates in result["images_per_s"].items()
        for form, rate in rates.items()
    ]
    rows += [
        (f"{result['size']} px, encoded", f"decoding alone: {form}", f"{rate:,.0f}", "")
        for result in results
        for form, rate in result["decoding_alone_images_per_s"].items()
    ]
    return _table(("from", "form", "images/s", "ours / this"), rows)


def _step(*results: Result) -> str:
    rows = [
        (
            f"{result['encoder']}, {result['precision']}",
            form,
            f"{rate:,.1f}",
            result["ratio"].get(form, ""),
        )
        for result in results
        for form, rate in result["images_per_s"].items()
    ]
    return _table(("what", "form", "images/s", "ours / this"), rows)


def _wire(result: Result) -> str:
    rows = [
        (f"{r['n']:,}", r["form"], f"{r['bytes_per_step'] / 1e6:.2f}", r.get("ratio", ""))
        for r in result["rows"]
        if not r["shared_memory"]
    ]
    return _table(("N", "form", "MB a step", "of gather with gradient"), rows)


def _memory(result: Result) -> str:
    rows = [
        (f"{r['batch_size']:,}", r["groups"], f"{r['peak_mib']:,.0f}", r["step_s"])
        for r in result["rows"]
    ]
    table = _table(("global batch", "groups", "peak of the process, MiB", "step, s"), rows)
    above = result["above_one_group_mib"]
    return f"{table}\nAbove a plain step of one group: {above:,.0f} MiB.\n"


def _scaling(result: Result) -> str:
    fitted = result["loss_fit"]
    batches = sorted({r["batch_size"] for r in result["steps"]})
    rows = []
    for workers in sorted({r["workers"] for r in result["steps"]}):
        mine = {r["batch_size"]: r for r in result["steps"] if r["workers"] == workers}
        rows.append((workers, *(f"{mine[b]['images_per_s']:,.0f}" for b in batches)))
    table = _table(("workers", *(f"B = {b:,}" for b in batches)), rows)
    return (
        f"Images a second:\n\n{table}\n![growth](figures/growth.png)\n\n"
        f"Loss time grows as N^{fitted['time_exponent']:.2f} from N = {fitted['from_n']:,}; memory "
        f"as {fitted['memory_fixed_mib']:.1f} MiB + {fitted['memory_kib_per_image']:.2f} KiB an "
        f"image (R² {fitted['memory_line_r2']}).\n"
    )


def _collectives(result: Result) -> str:
    return _table(("way", "added, µs"), result["added_us"].items())


def _stream(result: Result) -> str:
    rows = []
    for form, rate in result["images_per_s"].items():
        gap = max(r["epoch_gap_s"] for r in result["rounds"][form])
        rows.append((form, f"{rate:,.0f}", result["ratio"][form], f"{1e3 * gap:.0f}"))
    table = _table(("form", "images/s", "ours / this", "longest gap between epochs, ms"), rows)
    rounds, run, plan = result["rounds"]["simclr_ray"], result["run"], result["long_plan"]
    memory = max(r["actors_mib"] for r in rounds)
    first = max(r["first_batch_after_init_s"] for r in rounds)
    return (
        f"{table}\nThe first batch comes at most {first} s after `ray.init` returns, "
        f"{plan['first_batch_after_init_s']} s of a plan of 200,000 steps. In a short training run "
        f"of two workers it comes {run['first_batch_after_init_s']} s after `ray.init`, and is "
        f"waited for {run['first_batch_when_model_is_ready_s']} s when all else is ready; "
        f"{run['data_wait_share']:.1%} of its time is spent waiting for data. The two data actors "
        f"hold {memory:,.0f} MiB at the end, decoded images (`data.cache_gib` at most) "
        "included.\n"
    )


def _remote(result: Result) -> str:
    read = result["bytes_read_of_set"]
    rows = [
        (form, f"{rate:,.0f}", read.get(form, "")) for form, rate in result["images_per_s"].items()
    ]
    table = _table(("from", "images/s", "bytes read an epoch / bytes of the set"), rows)
    return (
        f"{table}\nFrom the bucket at {result['ratio']} of the local rate; the server takes "
        f"{result['server_cores']} of the same cores, and by the cores that it leaves the rate is "
        f"{result['of_cores_left']}.\n"
    )


def _cold_start(result: Result) -> str:
    named = {"this": "this commit", "other": f"at {result.get('other_commit', '')}"}
    keys = ("first_s", "all_s", "cpu_s")
    rows = [(named[name], *(of[key] for key in keys)) for name, of in result["median"].items()]
    heads = ("code", "first report, s", "exit, s", "processor time of the machine, s")
    runs = [run for of in result["runs"].values() for run in of]
    same = all(run["scores"] == runs[0]["scores"] for run in runs)
    scores = "All scores are equal." if same else "Scores differ in the last digits."
    return f"{_table(heads, rows)}\n{len(runs)} runs in turns. {scores}\n"


def _gpu(result: Result) -> str:
    shown = {name: result[name] for name in ("parity", "loss", "views", "step") if name in result}
    parts = [f"```json\n{json.dumps({k: v}, indent=1)}\n```" for k, v in shown.items()]
    return "\n\n".join(parts) + "\n"


SECTIONS: tuple[tuple[str, tuple[str, ...], Callable[..., str], str], ...] = (
    (
        "Loss",
        ("loss",),
        _loss,
        "NT-Xent forward and backward on CPU, D = 128, float32. `tiled` is the method of Inf-CL "
        "(arXiv:2410.17243) in plain torch. Errors are against float64, where that is affordable.",
    ),
    (
        "Bytes on the wire",
        ("wire",),
        _wire,
        "One step of the loss over four processes, counted by the kernel, as between machines.",
    ),
    (
        "Batches larger than memory",
        ("memory_kept",),
        _memory,
        "ResNet-18, 32 px, float32, one CPU worker: gradient caching in groups of 256 images. "
        "Freed memory stays in the process, as in a worker of a run.",
    ),
    (
        "LARS",
        ("optimizer",),
        _optimizer,
        "One step on the parameters of ResNet-50. SGD does less: LARS must read weights and "
        "gradients once more for their norms.",
    ),
    (
        "Views",
        ("views_32", "views_224"),
        _views,
        "Two views of each image in one process with one thread, crop, flip, color and (at "
        "224 px) blur, to float32. Ours are compiled, in the wheel for Linux or where there is a C "
        "compiler; elsewhere they are made with torch, to the same bytes.",
    ),
    (
        "Compiled views",
        ("native",),
        _native,
        "The same views by the libraries that a wheel holds, one for each level of x86-64, and as "
        "compiled for this very machine. Speed is over that of -march=native, within a round. A "
        "process takes the highest level that its processor has.",
    ),
    (
        "Stream",
        ("stream",),
        _stream,
        "CIFAR-10 from parquet to the worker's tensors, three epochs, two processes that make "
        "views on either side; the consumer does nothing else.",
    ),
    (
        "Object storage",
        ("stream_remote",),
        _remote,
        "Photographs ten times the allowed cache, from a bucket that moto serves on loopback, and "
        "from the local disk. The consumer does nothing else.",
    ),
    (
        "Step",
        ("step_0.25_float32", "step_1_float32", "step_0.25_bf16", "step_1_bf16"),
        _step,
        "Whole training steps on two cores, data included. `torchrun` is the same loop fed from "
        "memory; `lightly` a script with a DataLoader of two workers, in one process or two; "
        "in two, its batch norm is each process's own, while ours is global.",
    ),
    (
        "Growth",
        ("scaling",),
        _scaling,
        "The loop alone over workers and global batch, gradient caching above 256 images, "
        "one thread a worker; four workers share two cores.",
    ),
    (
        "Small messages",
        ("collectives",),
        _collectives,
        "What a batch-norm-sized exchange between two processes of one machine adds to a block of "
        "arithmetic.",
    ),
    (
        "Cold start",
        ("cold_start",),
        _cold_start,
        "`simclr-ray pretrain` on one CPU worker with nothing kept of earlier runs: 16 steps of "
        "256 CIFAR-10 images, then the scores of the encoder, the untrained one and raw pixels. "
        "Such a run is one Ray actor beside its driver, its views made by a thread at the speed of "
        "Ray Data's actor: Ray Train and Ray Data would add seven processes that import for "
        "seconds. With several workers or data actors, a GPU, a cluster of others, or storage in a "
        "bucket it is Ray Train.",
    ),
    (
        "GPU",
        ("gpu",),
        _gpu,
        "The same parts on one GPU: `python -m benchmarks.gpu`.",
    ),
)


if __name__ == "__main__":
    main()
