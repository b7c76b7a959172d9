"""Figures, as PNG: what the views show, and the curves of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no display, whatever the machine

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from simclr_ray.augment.crop_statistics import BESIDE, WITHIN, crop_task_fractions
from simclr_ray.augment.pipeline import Pipelines
from simclr_ray.augment.views import Step, TwoViews
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.batches import build_views
from simclr_ray.data.decoding import training_decoder
from simclr_ray.data.image_cache import DecodedImage
from simclr_ray.data.row_reader import RowReader
from simclr_ray.data.source import Source
from simclr_ray.errors import DataError
from simclr_ray.storage.metrics_log import read_series

GRAY: Any = {"cmap": "gray", "vmin": 0, "vmax": 255}  # of one channel; RGB heeds none of it
VIEW_COLORS = ("tab:orange", "tab:cyan")
CURVES = (
    ("train/loss", "loss (paper's L)"),
    ("train/contrastive_top1", "contrastive top-1"),
    ("train/classifier_top1", "classifier top-1"),
    ("train/entropy", "entropy (nats)"),
    ("train/learning_rate", "learning rate"),
    ("eval/knn_top1", "kNN top-1"),
    ("eval/effective_rank", "effective rank (RankMe)"),
    ("eval/alignment", "alignment"),
    ("eval/uniformity", "uniformity"),
    ("train/images_per_s", "images/s"),
)


def draw_views(
    experiment: Experiment, source: Source, path: Path, *, rows: int = 6, epoch: int = 0
) -> None:
    """Write an image of view pairs: each original with both crop boxes, and its views by stages.

    Above it stands how often pairs of crops set each of the two tasks of §3
    (`augment.crop_statistics`).
    """
    views = build_views(experiment.augment, experiment.seed, experiment.data.channels)
    images = _images(experiment, source, rows)
    if not images:
        raise DataError(f"{source.uri}: none of the rows looked at is an image")
    ids = np.array([p.id for p in images], np.int64)
    traces = views.trace([p.pixels for p in images], ids, epoch)
    columns = 1 + max(map(len, traces))
    width, height = 1.25 * (columns + 1), 2.5 * len(images)
    figure = Figure(figsize=(width, height + 0.6), layout="constrained")
    grid = figure.add_gridspec(2 * len(images), columns, width_ratios=[2, *[1] * (columns - 1)])
    for i, image in enumerate(images):
        left = figure.add_subplot(grid[2 * i : 2 * i + 2, 0])
        left.imshow(_shown(image.pixels), **GRAY)
        size = image.pixels.shape[:2]
        left.set_title(f"id {image.id}, {size[1]} x {size[0]} px", fontsize=7)
        left.set_axis_off()
        for view, (steps, color) in enumerate(zip(traces, VIEW_COLORS, strict=True)):
            _mark(left, views, steps[0], i, size, color, shared=traces[0][0] is traces[1][0])
            for column, step in enumerate(steps, start=1):
                axis = figure.add_subplot(grid[2 * i + view, column])
                axis.imshow(_shown(step.images[i].permute(1, 2, 0).numpy()), **GRAY)
                axis.set_xticks([])
                axis.set_yticks([])
                axis.spines[:].set_color(color)
                last = column == len(steps)
                axis.spines[:].set_linewidth(2.0 if last else 0.6)
                if i == 0:
                    axis.set_title(f"{'ab'[view]}: {step.name}", fontsize=7, color=color)
    figure.suptitle(_tasks(views, images), fontsize=8)
    figure.savefig(path, dpi=150)


def _shown(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return what can be drawn of pixels [H, W, C]: the first three channels, or the first."""
    return pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., 0]


def _images(experiment: Experiment, source: Source, num: int) -> list[DecodedImage]:
    """Return some images that can be decoded, spread over the dataset."""
    reader = RowReader(source, training_decoder(experiment.data), cache_gib=0)
    chosen = np.linspace(0, source.num_rows - 1, min(4 * num, source.num_rows)).astype(int)
    decoded = (reader.image(row) for row in dict.fromkeys(chosen.tolist()))
    good = [p for p in decoded if p is not None]
    places = np.linspace(0, len(good) - 1, min(num, len(good))).astype(int)
    return [good[place] for place in places]


def _mark(
    axis: Axes, views: TwoViews | Pipelines, step: Step, row: int, size: tuple[int, ...],
    color: str, *, shared: bool,
) -> None:  # fmt: skip
    """Draw the box of a crop; one that both views share is drawn dashed in both colors."""
    if step.draws is None:
        return
    box = views.boxes(step.draws, size[0], size[1])
    top, left, height, width = (int(side[row]) for side in box)
    style = (0, (4, 4)) if shared and color == VIEW_COLORS[1] else "-"
    patch = Rectangle(
        (left - 0.5, top - 0.5), width, height, fill=False, ec=color, lw=1.8, ls=style
    )
    axis.add_patch(patch)


def _tasks(views: TwoViews | Pipelines, images: Sequence[DecodedImage]) -> str:
    """Return how often pairs of crops set each task, over 2,000 pairs of images of one size."""
    if not images:
        return ""
    if isinstance(views, Pipelines) and views.shared:
        return "both views begin with one crop"
    shares = crop_task_fractions(views, *images[0].pixels.shape[:2])
    if shares is None:
        return ""
    return (
        f"crop pairs: {shares.global_to_local:.0%} global to local (one holds {WITHIN:.0%} of the "
        f"other, twice its area), {shares.adjacent:.0%} adjacent (overlap {BESIDE:.0%} at most)"
    )


def draw_curves(lines: str, path: Path) -> None:
    """Write the curves of a run from its `metrics.jsonl`; steps that were repeated count once."""
    series = read_series(lines)
    drawn = [(key, title) for key, title in CURVES if key in series]
    columns = 3
    rows = max(1, -(-len(drawn) // columns))
    figure = Figure(figsize=(12, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    # the axes last: zip draws from its first before it sees that its second has ended
    for (key, title), axis in zip(drawn, axes, strict=False):
        steps = sorted(series[key])
        marker = "o" if key.startswith("eval/") else None
        axis.plot(steps, [series[key][s] for s in steps], marker=marker, markersize=3)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(visible=True, alpha=0.3)
    for axis in list(axes):
        axis.set_axis_off()
    figure.savefig(path, dpi=100)
