"""A study's figure: ours beside the paper's, from stored results alone."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

mpl.use("Agg")  # no display, whatever the machine

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simclr_ray.config import Scalar
from simclr_ray.config.metrics import is_fraction
from simclr_ray.studies.analysis import Results, Row
from simclr_ray.studies.definition import Study
from simclr_ray.studies.space import label_of

STYLE = {"svg.fonttype": "none", "svg.hashsalt": "simclr_ray"}  # the same file for the same numbers
UNDATED = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
TITLE_CHARS = 60  # of the title above a panel
LABEL_CHARS = 45  # of an axis label; more lines instead of more characters
LABELS_CHARS = 75  # of all labels below an axis, spaces between them included
COLORS = "viridis"


class Datum(NamedTuple):
    """One value in the figure."""

    panel: str
    series: str
    x: Scalar
    value: float
    deviation: float


def draw_study(results: Results, path: Path) -> None:
    """Write the figure, in the format of its ending: our panels, then the paper's if any."""
    study = results.study
    percent = 100 if is_fraction(study.metric) else 1
    measured = _measured(results, percent)
    panels: list[tuple[str, list[Datum]]] = []
    for name in dict.fromkeys(d.panel for d in measured):
        title = (
            f"here: {study.figure.panel} = {name}" if name else f"here ({study.scale or 'as is'})"
        )
        panels.append((title, [d for d in measured if d.panel == name]))
    paper = _paper(study)
    for name in dict.fromkeys(d.panel for d in paper):
        title = f"paper: {study.paper.source}" + (
            f"; {study.figure.panel} = {name}" if name else ""
        )
        panels.append((title, [d for d in paper if d.panel == name]))
    with mpl.rc_context(STYLE):  # type: ignore[arg-type] # keys are literals there
        figure = Figure(figsize=(5.2 * max(1, len(panels)), 4.2), layout="constrained")
        axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
        for axis, (title, data) in zip(axes, panels, strict=False):
            is_measured = title.startswith("here")
            _draw(study, axis, data)
            if is_measured and study.figure.kind != "matrix":
                _draw_baselines(results, axis, percent)
            axis.set_title(textwrap.fill(title, TITLE_CHARS), fontsize=9)
            label = study.figure.y_label or study.metric
            unit = " (%)" if percent == 100 else ""
            shown = textwrap.fill(
                f"{label}{unit}" if is_measured else study.paper.metric, LABEL_CHARS
            )
            if study.figure.kind == "matrix":
                axis.set_xlabel(f"{study.figure.x}; {shown}", fontsize=8)
            else:
                axis.set_ylabel(shown, fontsize=8)
        figure.suptitle(textwrap.fill(study.question, TITLE_CHARS * len(axes)), fontsize=10)
        figure.savefig(path, dpi=130, metadata=UNDATED.get(path.suffix))


def draw_curves(results: Results, path: Path) -> None:
    """Write the curves over epochs, in the format of its ending: mean and deviation of seeds.

    Points are told apart by what varies among them; baselines are dashed lines.
    """
    metric = results.curve_metric
    percent = 100 if is_fraction(metric) else 1
    points = [curve.point for curve in results.curves]
    names = [n for n in results.study.space if len({str(p.get(n)) for p in points}) > 1]
    with mpl.rc_context(STYLE):  # type: ignore[arg-type] # keys are literals there
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axis = figure.subplots()
        colors = mpl.colormaps[COLORS](np.linspace(0.0, 0.9, max(1, len(points))))
        for curve, color in zip(results.curves, colors, strict=True):
            means = percent * np.array(curve.means)
            deviations = percent * np.array(curve.deviations)
            label = ", ".join(f"{n.rpartition('.')[2]} {curve.point.get(n)}" for n in names)
            axis.plot(curve.epochs, means, marker="o", ms=2.5, lw=1.2, color=color, label=label)
            axis.fill_between(
                curve.epochs, means - deviations, means + deviations, color=color, alpha=0.15, lw=0
            )
        _draw_baselines(results, axis, percent, metric)
        axis.set_xlabel("epoch", fontsize=8)
        axis.set_ylabel(f"{metric}{' (%)' if percent == 100 else ''}", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(visible=True, axis="y", alpha=0.3)
        if names:
            columns = 1 + len(points) // 25
            figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=6,
                          ncols=columns)  # fmt: skip
        figure.savefig(path, dpi=130, metadata=UNDATED.get(path.suffix))


def _draw_baselines(results: Results, axis: Axes, percent: int, metric: str = "") -> None:
    """Draw a dashed line for each baseline that has the metric, its name on it."""
    key = metric or results.study.metric
    baselines = {name: values[key] for name, values in results.baselines.items() if key in values}
    for name, value in baselines.items():
        # below its line where it is the lowest of several, or two that are close hide each other
        is_lowest = len(baselines) > 1 and value == min(baselines.values())
        axis.axhline(percent * value, color="0.4", ls="--", lw=1)
        axis.annotate(
            name, (1.0, percent * value), xycoords=("axes fraction", "data"),
            ha="right", va="top" if is_lowest else "bottom", fontsize=7, color="0.2",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )  # fmt: skip


def _measured(results: Results, percent: int) -> list[Datum]:
    """Return our points; over dimensions that are not drawn, means and deviations of the points."""
    groups: dict[tuple[str, str, Scalar], list[Row]] = {}
    for row in results.rows:
        groups.setdefault(_places(results.study, row.point), []).append(row)
    data = []
    for place, rows in groups.items():
        means = [row.mean for row in rows]
        deviation = statistics.stdev(means) if len(means) > 1 else rows[0].deviation
        data.append(Datum(*place, percent * statistics.fmean(means), percent * deviation))
    return data


def _places(study: Study, point: dict[str, Scalar]) -> tuple[str, str, Scalar]:
    """Return panel, series and x of a point."""
    figure = study.figure
    panel = str(point[figure.panel]) if figure.panel else ""
    series = str(point[figure.series]) if figure.series else ""
    return panel, series, point[figure.x]


def _paper(study: Study) -> list[Datum]:
    """Return the paper's values, where its columns hold the figure's axis."""
    paper, figure = study.paper, study.figure
    if any(k not in paper.columns for k in (figure.x, figure.series) if k):
        return []
    data = []
    for row in paper.rows:
        point = dict(zip(paper.columns, row[:-1], strict=True))
        panel = str(point[figure.panel]) if figure.panel in point else ""
        series = str(point[figure.series]) if figure.series else ""
        data.append(Datum(panel, series, point[figure.x], float(row[-1]), 0.0))
    return data


def _draw(study: Study, axis: Axes, data: Sequence[Datum]) -> None:
    names = [str(v) for v in _ordered(study, study.figure.series, [d.series for d in data])]
    xs = _ordered(study, study.figure.x, [d.x for d in data])
    if study.figure.kind == "matrix":
        _draw_matrix(axis, data, xs, names)
        axis.set_ylabel(study.figure.series, fontsize=8)
        return
    if study.figure.kind == "bars":
        _draw_bars(axis, data, xs, names)
    else:
        _draw_lines(study, axis, data, xs, names)
    axis.set_xlabel(study.figure.x_label or study.figure.x, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(visible=True, axis="y", alpha=0.3)
    if names != [""]:
        across = 1
        if study.figure.kind == "bars":  # they leave no corner free
            axis.margins(y=0.25)
            across = len(names)
        axis.legend(title=study.figure.series, fontsize=7, title_fontsize=7, ncols=across)


def _draw_lines(
    study: Study, axis: Axes, data: Sequence[Datum], xs: list[Scalar], names: list[str]
) -> None:
    scale = study.figure.x_scale
    colors = mpl.colormaps[COLORS](np.linspace(0.1, 0.85, max(1, len(names))))
    for name, color in zip(names, colors, strict=True):
        mine = sorted((d for d in data if d.series == name), key=lambda d: xs.index(d.x))
        at = [xs.index(d.x) if scale == "category" else float(d.x) for d in mine]
        values, deviations = [d.value for d in mine], [d.deviation for d in mine]
        spread = deviations if any(deviations) else None
        axis.errorbar(at, values, spread, marker="o", ms=4, capsize=3, color=color, label=name)
    if scale in ("log2", "log10"):
        axis.set_xscale("log", base=2 if scale == "log2" else 10)
    ticks = range(len(xs)) if scale == "category" else [float(x) for x in xs]
    axis.set_xticks(list(ticks), [str(x) for x in xs])
    axis.minorticks_off()


def _draw_bars(axis: Axes, data: Sequence[Datum], xs: list[Scalar], names: list[str]) -> None:
    width = 0.8 / max(1, len(names))
    colors = mpl.colormaps[COLORS](np.linspace(0.25, 0.75, max(1, len(names))))
    for place, (name, color) in enumerate(zip(names, colors, strict=True)):
        mine = [d for d in data if d.series == name]
        at = [xs.index(d.x) + (place - (len(names) - 1) / 2) * width for d in mine]
        values, deviations = [d.value for d in mine], [d.deviation for d in mine]
        spread = deviations if any(deviations) else None
        axis.bar(at, values, width, yerr=spread, capsize=3, color=color, label=name)
        for x, d in zip(at, mine, strict=True):
            axis.annotate(
                f"{d.value:.1f}", (x, d.value + d.deviation), ha="center", va="bottom", fontsize=7
            )
    slanted = sum(len(str(x)) + 2 for x in xs) > LABELS_CHARS  # side by side they would overlap
    style: dict[str, Any] = {"rotation": 35, "ha": "right"} if slanted else {}
    axis.set_xticks(range(len(xs)), [str(x) for x in xs], **style)
    axis.margins(y=0.12)  # room for the numbers; bars begin at zero, so that lengths do not lie


def _draw_matrix(axis: Axes, data: Sequence[Datum], xs: list[Scalar], names: list[str]) -> None:
    grid = np.full((len(names), len(xs)), np.nan)
    for d in data:
        grid[names.index(d.series), xs.index(d.x)] = d.value
    axis.imshow(grid, cmap=COLORS)
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for i, j in np.ndindex(*grid.shape):
        if not np.isnan(grid[i, j]):
            color = "white" if grid[i, j] < middle else "black"
            axis.text(j, i, f"{grid[i, j]:.1f}", ha="center", va="center", size=8, color=color)
    axis.set_xticks(range(len(xs)), [str(x) for x in xs], fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)


def _ordered(study: Study, dimension: str, values: Sequence[Scalar]) -> list[Scalar]:
    """Return the different values in the order of the study, the paper's own after them."""
    distinct = list(dict.fromkeys(values))
    if all(isinstance(v, int | float) for v in distinct):
        return sorted(distinct, key=float)
    listed = [str(label_of(v)) for v in study.space[dimension].listed] if dimension else []
    return sorted(distinct, key=lambda v: listed.index(str(v)) if str(v) in listed else len(listed))
