"""Figures, as PNG: what the views show, and how a run went. The only door to matplotlib."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no display, whatever the machine

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from simclr_ray.data.maker import RowReader, two_views
from simclr_ray.data.source import Source
from simclr_ray.experiment import Experiment

VIEW_COLOURS = ("tab:orange", "tab:cyan")
CURVES = (
    ("train/loss", "loss (paper's L)"),
    ("train/contrastive_accuracy", "contrastive accuracy"),
    ("train/contrastive_entropy", "contrastive entropy (nats)"),
    ("train/learning_rate", "learning rate"),
    ("eval/knn_top1", "kNN top-1"),
    ("eval/effective_rank", "effective rank (RankMe)"),
    ("eval/alignment", "alignment"),
    ("eval/uniformity", "uniformity"),
    ("train/images_per_s", "images/s"),
)


def draw_views(
    experiment: Experiment, source: Source, path: Path, *, rows: int = 8, epoch: int = 0
) -> None:
    """Write a picture of two-view pairs: each original with both crop boxes, then its views."""
    views = two_views(experiment.augment, experiment.seed)
    reader = RowReader(source, max_pixels=experiment.data.max_pixels, cache_gib=0)
    chosen = np.linspace(0, source.num_rows - 1, min(4 * rows, source.num_rows)).astype(int)
    found = (reader.picture(row) for row in dict.fromkeys(chosen.tolist()))
    pictures = [p for p in found if p is not None][:rows]
    figure = Figure(figsize=(6, 2 * len(pictures)), layout="constrained")
    axes = figure.subplots(len(pictures), 3, squeeze=False)
    ids = np.array([p.id for p in pictures], np.int64)
    pair = views([p.pixels for p in pictures], ids, epoch)
    for i, (picture, (left, *right)) in enumerate(zip(pictures, axes, strict=True)):
        left.imshow(picture.pixels)
        height, width = picture.pixels.shape[:2]
        for view, colour in enumerate(VIEW_COLOURS):
            box = views.boxes(views.draw(ids[i : i + 1], epoch, view), height, width)
            top, start, h, w = (int(side[0]) for side in box)
            left.add_patch(Rectangle((start - 0.5, top - 0.5), w, h, fill=False, ec=colour, lw=1.5))
            right[view].imshow(pair[view][i].permute(1, 2, 0).numpy())
            right[view].set_title(f"view {'ab'[view]}", color=colour, fontsize=8)
        left.set_title(f"id {picture.id}, {width}x{height}", fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)


def draw_curves(lines: str, path: Path) -> None:
    """Write the curves of a run from its `metrics.jsonl`; steps that were repeated count once."""
    series = read_series(lines)
    drawn = [(key, title) for key, title in CURVES if key in series]
    columns = 3
    rows = max(1, -(-len(drawn) // columns))
    figure = Figure(figsize=(12, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (key, title) in zip(axes, drawn, strict=False):
        steps = sorted(series[key])
        marker = "o" if key.startswith("eval/") else None
        axis.plot(steps, [series[key][s] for s in steps], marker=marker, markersize=3)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(visible=True, alpha=0.3)
    for axis in list(axes):
        axis.set_axis_off()
    figure.savefig(path, dpi=100)


def read_series(lines: str) -> dict[str, dict[int, float]]:
    """Return name -> step -> value of a `metrics.jsonl`; the last of a repeated step counts.

    A line that a kill has cut off is left out.
    """
    series: dict[str, dict[int, float]] = {}
    for line in lines.splitlines():
        try:
            record: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        for key, value in record.items():
            if "/" in key:
                series.setdefault(key, {})[int(record["step"])] = float(value)
    return series
