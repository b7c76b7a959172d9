"""What `study advise` misses of the best of a full grid, on sets that it was not made with.

    python -m benchmarks.advice $SIMCLR_RAY_DATA --sets cifar10 caltech101 color_shapes

Of each set: all 24 settings are trained once as long as the experiment is (`EPOCHS`), and advice
is given for at most 15 % of that. What the grid had best and what was advised are then trained with
three other seeds; the regret is the difference of their means, with its standard error over seeds.
Where both name one setting the regret is none. Goes on with what is in `--folder`.

Sets: CIFAR-10 by views of 24 pixels, Caltech-101, and `shapes` in the color of their class, whose
form says nothing. Writes `benchmarks/results/advice.json`.
"""

from __future__ import annotations

import argparse
import colorsys
import io
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.record import RESULTS, machine, portable, store
from simclr_ray import config as cfg
from simclr_ray.data.shapes import CLASS_NAMES, render
from simclr_ray.studies.advice_results import SETTING, values_by_setting
from simclr_ray.studies.advice_space import name_of, settings_of, values_of
from simclr_ray.studies.definition import Study
from simclr_ray.studies.driver import run_study
from simclr_ray.studies.folder import StudyFolder
from simclr_ray.studies.tuning_advice import (
    EPOCH_FACTOR,
    FINAL_SEEDS,
    NUM_FINALISTS,
    TrialLengths,
    advice_task,
    advise,
)

EPOCHS = 24
ROWS = 5000
MOST_COST = 0.15
SEEDS = [11, 12, 13]
METRICS = ("eval/knn_top1", "final/knn_top1", "final/linear_top1")
OF_SET = {
    "cifar10": ["augment.size=24", "evaluation.size=24"],
    "caltech101": ["augment.size=32", "evaluation.size=32", "batch_size=128"],
    "color_shapes": [],
}


def main() -> None:
    """Measure each set, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="Folder that holds cifar10 and caltech101.")
    parser.add_argument("--sets", nargs="+", choices=sorted(OF_SET), default=sorted(OF_SET))
    parser.add_argument("--folder", type=Path, default=Path("runs/advice"))
    args = parser.parse_args()
    results = _stored()
    for name in args.sets:
        folder = args.folder.absolute() / name
        folder.mkdir(parents=True, exist_ok=True)
        measured = _measure(name, _data(name, args.data, folder), folder)
        command = portable(f"python -m benchmarks.advice {args.data} --sets {name}")
        results[name] = measured | {"command": command, "commit": machine()["commit"]}
        print(json.dumps(results[name], indent=1), flush=True)
    words = portable(f"python -m benchmarks.advice {args.data} --sets {' '.join(sorted(results))}")
    store("advice", {"command": words, "epochs": EPOCHS, "sets": results})


def _stored() -> dict[str, Any]:
    """Return the sets of earlier calls."""
    file = RESULTS / "advice.json"
    sets: dict[str, Any] = json.loads(file.read_text())["sets"] if file.is_file() else {}
    return sets


def _data(name: str, data: Path, folder: Path) -> list[str]:
    """Return the words that name a set's images; shapes are drawn."""
    if name != "color_shapes":
        return [f"data.train={data / name / 'train'}", f"data.test={data / name / 'test'}"]
    for split, (seed, num) in {"train": (0, ROWS), "test": (1, 2000)}.items():
        if not (folder / f"{split}.parquet").is_file():
            _draw(folder / f"{split}.parquet", seed, num)
    return [f"data.train={folder / 'train.parquet'}", f"data.test={folder / 'test.parquet'}"]


def _draw(path: Path, seed: int, num: int) -> None:
    """Write shapes in gray, tinted by the hue of a class that is drawn without regard to form."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(CLASS_NAMES), num)
    images = []
    for index, label in enumerate(labels):
        gray = render(index, seed).pixels.mean(axis=2, keepdims=True)
        hue = (label + rng.uniform(-0.3, 0.3)) / len(CLASS_NAMES)
        tint = np.array(colorsys.hsv_to_rgb(hue, 0.45, 1.0))
        buffer = io.BytesIO()
        Image.fromarray((gray * tint).astype(np.uint8)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    table = {"image": pa.array(images, pa.binary()), "label": pa.array(labels, pa.int64())}
    whole = path.with_suffix(".part")
    pq.write_table(pa.table(table), whole, row_group_size=500)
    whole.replace(path)


def _measure(name: str, data: list[str], folder: Path) -> dict[str, Any]:
    """Return what is missed on one set, and what it cost."""
    overrides = [
        *data,
        *OF_SET[name],
        f"data.limit={ROWS}",
        f"epochs={EPOCHS}",
        f"evaluation.every_epochs={EPOCHS}",
        f"storage={folder}",
    ]
    task = advice_task("advise", "cifar10_laptop", overrides)
    settings = {name_of(s): values_of(s, task.factors) for s in settings_of(task.factors)}
    rows = task.num_rows
    lengths = len(settings) / 2 + EPOCH_FACTOR * (NUM_FINALISTS + 1) * len(FINAL_SEEDS)
    images = MOST_COST * len(settings) * EPOCHS * rows / lengths  # of a short trial
    epochs = max(1, math.floor(images / rows))
    advice = advise(task, TrialLengths(rows, epochs, 0.0), run_study)
    grid = run_study(_study("grid", task.values, settings, [0], []))
    ended = values_by_setting(grid, task.metric)
    measured = {name: statistics.fmean(values.values()) for name, values in ended.items()}
    best = max(measured, key=measured.__getitem__)
    cases = {"best of the grid": settings[best], "advised": advice.values}
    again = run_study(_study("again", task.values, cases, SEEDS, ["knn", "linear"]))
    short, long = (StudyFolder(f"{folder}/studies", f"advise-{part}") for part in ("short", "long"))
    cost = _seconds(short) + _seconds(long)
    order = sorted(measured, key=lambda k: -measured[k])
    return {
        "images": rows,
        "best_of_grid": best,
        "advised": advice.values,
        "rank_of_advised": _rank(order, settings, advice.values),
        "finalists": [end._asdict() for end in advice.finalists],
        "range_of_grid": round(measured[order[0]] - measured[order[-1]], 4),
        "regret": {metric: _regret(again, metric) for metric in METRICS},
        "cost_fraction_images": round(advice.cost_fraction, 4),
        "cost_fraction_seconds": round(cost / _seconds(grid), 4),
    }


def _study(
    name: str,
    values: dict[str, Any],
    cases: dict[str, dict[str, Any]],
    seeds: list[int],
    protocols: list[str],
) -> Study:
    tree = {
        "name": name,
        "question": "Which settings suit these images?",
        "base": "cifar10_laptop",
        "set": values,
        "space": {SETTING: {"cases": cases}},
        "seeds": seeds,
        "metric": "eval/knn_top1",
        "protocols": protocols,
    }
    return cfg.validate(Study, tree)


def _seconds(folder: StudyFolder) -> float:
    """Return what a study took from its start to its end: its trials, their starts and scores."""
    return float(folder.state()["seconds"])


def _rank(order: list[str], settings: dict[str, dict[str, Any]], advised: dict[str, Any]) -> int:
    """Return the place of what was advised in the grid; 0: it is not in it, as what is used now."""
    return next((n for n, name in enumerate(order, 1) if settings[name] == advised), 0)


def _regret(folder: StudyFolder, metric: str) -> dict[str, float]:
    """Return the mean difference over the seeds that both have, and its standard error."""
    values = values_by_setting(folder, metric)
    best, advised = values.get("best of the grid", {}), values.get("advised", {})
    both = [seed for seed in SEEDS if seed in best and seed in advised]
    gaps = [100 * (best[seed] - advised[seed]) for seed in both]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps))
    return {
        "points": round(statistics.fmean(gaps), 2),
        "standard_error": round(error, 2),
        "seeds": len(gaps),
    }


if __name__ == "__main__":
    main()
