"""Figures, as PNG: what the views show, and the curves of a run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # no display, whatever the machine

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.patches import Rectangle

from simclr_ray.augment.crop_statistics import BESIDE, WITHIN, crop_task_fractions
from simclr_ray.augment.decode import shown_as_rgb
from simclr_ray.augment.pipeline import Pipelines
from simclr_ray.augment.views import StageImages, TwoViews
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.batches import build_views
from simclr_ray.data.decoding import training_decoder
from simclr_ray.data.image_cache import DecodedImage
from simclr_ray.data.image_groups import groups_of
from simclr_ray.data.row_reader import RowReader
from simclr_ray.data.source import Source
from simclr_ray.errors import DataError
from simclr_ray.nn.loss import ChanceLevel
from simclr_ray.storage.metrics_log import read_series

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

    Where the dataset is of groups, view b has an original of its own, the one that training takes.
    Above it stands how often pairs of crops set each of the two tasks of §3
    (`augment.crop_statistics`).
    """
    views = build_views(experiment.augment, experiment.seed, experiment.data.channels)
    pairs = _pairs(experiment, source, rows, epoch)
    if not pairs:
        raise DataError(f"{source.shown_uri}: none of the rows looked at is an image")
    traces = _traces(views, pairs, epoch)
    columns = 1 + max(map(len, traces))
    width, height = 1.25 * (columns + 1), 2.5 * len(pairs)
    figure = Figure(figsize=(width, height + 0.6), layout="constrained")
    grid = figure.add_gridspec(2 * len(pairs), columns, width_ratios=[2, *[1] * (columns - 1)])
    for i, pair in enumerate(pairs):
        originals = _draw_originals(figure, grid, i, pair)
        for view, (stages, color) in enumerate(zip(traces, VIEW_COLORS, strict=True)):
            size, shared = pair[view].pixels.shape[:2], traces[0][0] is traces[1][0]
            _mark(originals[view], views, stages[0], i, size, color, shared=shared)
            for column, stage in enumerate(stages, start=1):
                axis = figure.add_subplot(grid[2 * i + view, column])
                axis.imshow(shown_as_rgb(stage.images[i].permute(1, 2, 0).numpy()))
                axis.set_xticks([])
                axis.set_yticks([])
                axis.spines[:].set_color(color)
                last = column == len(stages)
                axis.spines[:].set_linewidth(2.0 if last else 0.6)
                if i == 0:
                    axis.set_title(f"{'ab'[view]}: {stage.name}", fontsize=7, color=color)
    figure.suptitle(_tasks(views, pairs[0][0]), fontsize=8)
    figure.savefig(path, dpi=150)


def _pairs(
    experiment: Experiment, source: Source, num: int, epoch: int
) -> list[tuple[DecodedImage, DecodedImage]]:
    """Return what both views are of, for some rows or groups spread over the dataset."""
    reader = RowReader(source, training_decoder(experiment.data), cache_gib=0)
    units = source.num_groups or source.num_rows
    chosen = np.unique(np.linspace(0, units - 1, min(4 * num, units)).astype(np.int64))
    rows_a = rows_b = chosen
    if source.num_groups:
        rows_a, rows_b = groups_of(source).pairs(chosen, seed=experiment.seed, epoch=epoch)
    good = []
    for row_a, row_b in zip(rows_a.tolist(), rows_b.tolist(), strict=True):
        a = reader.image(row_a)
        b = a if row_b == row_a else reader.image(row_b)
        if a is not None and b is not None:
            good.append((a, b))
    places = np.linspace(0, len(good) - 1, min(num, len(good))).astype(int)
    return [good[place] for place in places]


def _traces(
    views: TwoViews | Pipelines, pairs: Sequence[tuple[DecodedImage, DecodedImage]], epoch: int
) -> Sequence[list[StageImages]]:
    """Return the images of each view after each of its stages."""
    first, second = ([pair[view] for pair in pairs] for view in (0, 1))
    traces = [
        views.trace([p.pixels for p in images], np.array([p.id for p in images], np.int64), epoch)
        for images in ([first] if all(a is b for a, b in pairs) else [first, second])
    ]
    return traces[0] if len(traces) == 1 else [traces[0][0], traces[1][1]]


def _draw_originals(
    figure: Figure, grid: GridSpec, at: int, pair: tuple[DecodedImage, DecodedImage]
) -> list[Axes]:
    """Draw the image, or both images, of a pair; return where those of each view are."""
    one = pair[0] is pair[1]
    cells = [grid[2 * at : 2 * at + 2, 0]] if one else [grid[2 * at + v, 0] for v in (0, 1)]
    originals = []
    for cell, image in zip(cells, pair, strict=False):
        axis = figure.add_subplot(cell)
        axis.imshow(shown_as_rgb(image.pixels))
        height, width = image.pixels.shape[:2]
        axis.set_title(f"id {image.id}, {width} x {height} px", fontsize=7)
        axis.set_axis_off()
        originals.append(axis)
    return originals * 2 if one else originals


def _mark(
    axis: Axes, views: TwoViews | Pipelines, stage: StageImages, row: int, size: tuple[int, ...],
    color: str, *, shared: bool,
) -> None:  # fmt: skip
    """Draw the box of a crop; one that both views share is drawn dashed in both colors."""
    if stage.draws is None:
        return
    box = views.boxes(stage.draws, size[0], size[1])
    top, left, height, width = (int(side[row]) for side in box)
    style = (0, (4, 4)) if shared and color == VIEW_COLORS[1] else "-"
    patch = Rectangle(
        (left - 0.5, top - 0.5), width, height, fill=False, ec=color, lw=1.8, ls=style
    )
    axis.add_patch(patch)


def _tasks(views: TwoViews | Pipelines, image: DecodedImage) -> str:
    """Return how often pairs of crops set each task, over 2,000 pairs of images of one size."""
    if isinstance(views, Pipelines) and views.shared:
        return "both views begin with one crop"
    shares = crop_task_fractions(views, *image.pixels.shape[:2])
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
        _draw_curve(axis, key, title, series[key])
    for axis in list(axes):
        axis.set_axis_off()
    figure.savefig(path, dpi=100)


def curve_drawings(lines: str, chance: ChanceLevel | None = None) -> list[str]:
    """Return the same curves as SVG elements, one each.

    Args:
        lines: Of the log.
        chance: Of the loss, drawn as a line.
    """
    series = read_series(lines)
    drawings = []
    for key, title in CURVES:
        if key not in series:
            continue
        figure = Figure(figsize=(4, 2.6), layout="constrained")
        axis = figure.subplots()
        _draw_curve(axis, key, title, series[key])
        if key == "train/loss" and chance is not None:
            axis.axhline(chance.value, color="0.4", linestyle="--", linewidth=1)
            # inside the axes on either side: below the curve there is nothing under the line
            side = "top" if chance.value > sum(axis.get_ylim()) / 2 else "bottom"
            axis.annotate(
                f"chance, {chance.formula}", (0.98, chance.value), fontsize=7, color="0.4",
                xycoords=("axes fraction", "data"), ha="right", va=side,
            )  # fmt: skip
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        svg = out.getvalue()
        drawings.append(svg[svg.index("<svg") :])
    return drawings


def _draw_curve(axis: Axes, key: str, title: str, values: Mapping[int, float]) -> None:
    steps = sorted(values)
    marker = "o" if key.startswith("eval/") else None
    axis.plot(steps, [values[s] for s in steps], marker=marker, markersize=3)
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("step", fontsize=8)
    axis.grid(visible=True, alpha=0.3)
