"""Figures are written as images that open, from what a run left behind."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure
from PIL import Image

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.image_groups import open_grouped
from simclr_ray.data.source import Source
from simclr_ray.storage.metrics_log import last_values, read_series
from simclr_ray.train.figures import draw_curves, draw_views


def png(height: int, width: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    images = [png(20 + i, 40 - i, i) for i in range(6)]
    images[2:2] = [b"no image"]
    pq.write_table(pa.table({"image": pa.array(images, pa.binary())}), tmp_path / "a.parquet")
    tree = {"name": "t", "data": {"train": str(tmp_path / "a.parquet")}, "augment": {"size": 16}}
    return cfg.validate(Experiment, tree)


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return image.convert("RGB")


def line(step: int, **values: float) -> str:
    return json.dumps({"step": step, **{k.replace("__", "/"): v for k, v in values.items()}})


def test_views_are_drawn_and_bad_rows_left_out(experiment: Experiment, tmp_path: Path) -> None:
    source = Source.open(experiment.data.train)
    draw_views(experiment, source, tmp_path / "v.png", rows=3)
    few = opened(tmp_path / "v.png")
    draw_views(experiment, source, tmp_path / "all.png", rows=8)
    # 6 good rows of 7 against 3, and a title above
    assert opened(tmp_path / "all.png").height - few.height == pytest.approx(7.5 * 150, abs=2)
    assert len(set(few.resize((64, 64)).tobytes())) > 50  # something is on it


def test_both_images_of_a_group_are_drawn(experiment: Experiment, tmp_path: Path) -> None:
    """A group of one red and one blue image: each view has the color of its own original."""
    colors = [(255, 0, 0), (0, 0, 255)]
    images = [np.full((20, 30, 3), color, np.uint8) for color in colors]
    encoded = []
    for pixels in images:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        encoded.append(out.getvalue())
    table = pa.table({"image": pa.array(encoded, pa.binary()), "visit": [7, 7]})
    pq.write_table(table, tmp_path / "visits.parquet")
    weak = {"min_area": 0.9, "jitter": 0.0, "grayscale": 0.0, "blur": 0.0}
    data = {"train": str(tmp_path / "visits.parquet"), "columns": {"group": "visit"}}
    tree = {"name": "t", "data": data, "augment": {"size": 16, **weak}}
    grouped = cfg.validate(Experiment, tree)
    source = open_grouped(grouped.data.train, grouped.data.columns)
    draw_views(grouped, source, tmp_path / "v.png", rows=1)
    drawn = np.asarray(opened(tmp_path / "v.png"))
    top, bottom = np.split(drawn[: len(drawn) // 2 * 2], 2)
    shares = [[(half == color).all(-1).mean() for color in colors] for half in (top, bottom)]
    assert min(map(max, shares)) > 0.5  # one color each, but for what the title moves down
    assert max(map(min, shares)) < 0.05


def test_views_of_another_epoch_are_other_views(experiment: Experiment, tmp_path: Path) -> None:
    source = Source.open(experiment.data.train)
    for name, epoch in (("a", 0), ("b", 0), ("c", 1)):
        draw_views(experiment, source, tmp_path / f"{name}.png", rows=2, epoch=epoch)
    a, b, c = (opened(tmp_path / f"{n}.png").tobytes() for n in "abc")
    assert a == b
    assert a != c


def test_curves_are_drawn_from_the_lines_of_a_run(tmp_path: Path) -> None:
    lines = [line(s, train__loss=5 - s / 10, train__learning_rate=0.1 * s) for s in range(1, 20)]
    lines.append(line(20, eval__knn_top1=0.5))
    draw_curves("\n".join(lines), tmp_path / "c.png")
    image = opened(tmp_path / "c.png")
    assert image.width > image.height > 100
    assert len(set(image.tobytes())) > 50


@pytest.mark.parametrize("lines", ["", json.dumps({"step": 1, "other/thing": 2.0})])
def test_a_run_without_curves_still_draws_an_image(tmp_path: Path, lines: str) -> None:
    draw_curves(lines, tmp_path / "c.png")
    opened(tmp_path / "c.png")


def test_places_without_a_curve_stay_empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    draw_curves(line(10, train__loss=3.0), tmp_path / "c.png")
    assert [axis.axison for axis in saved[0].axes] == [True, False, False]


def test_a_repeated_step_counts_once_with_its_last_value() -> None:
    lines = "\n".join(
        [
            line(10, train__loss=3.0),
            line(20, train__loss=2.0, eval__knn_top1=0.4),
            line(20, train__loss=2.5),  # after a restart from step 10
            line(30, train__loss=1.5),
        ]
    )
    assert read_series(lines) == {
        "train/loss": {10: 3.0, 20: 2.5, 30: 1.5},
        "eval/knn_top1": {20: 0.4},
    }


def test_the_last_value_of_each_name_counts_however_old() -> None:
    lines = [line(10, train__loss=3.0, eval__knn_top1=0.4), line(20, train__loss=2.0)]
    assert last_values("\n".join(lines)) == {"step": 20, "train/loss": 2.0, "eval/knn_top1": 0.4}


def test_a_last_line_cut_off_by_a_kill_is_left_out() -> None:
    whole = line(10, train__loss=3.0)
    assert read_series(f"{whole}\n{line(20, train__loss=2.0)[:15]}") == {"train/loss": {10: 3.0}}
