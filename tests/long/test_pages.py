"""Sheets, maps and reports open in a browser, wide and narrow, without a complaint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_ray.inference.embedding_index import EmbeddingIndex
from simclr_ray.inference.embedding_map import make_map, write_map
from simclr_ray.inference.embedding_sheets import write_groups, write_neighbours
from simclr_ray.inference.encoder import Encoder
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.train.run_report import write_report
from tests.long.browser import broken_links, open_page
from tests.shell_blocks import ROOT
from tests.unit.inference.test_embedding_pages import NUM, encoder, photos
from tests.unit.train.test_run_report import SCORES, run

pytestmark = pytest.mark.long
__all__ = ["encoder", "photos", "run"]  # fixtures

WIDTHS = pytest.mark.parametrize("width", [1200, 400])


def check(page: Path, folder: Path, width: int, *shown: str) -> None:
    """Fail where a page complains, asks another host, lacks something or scrolls sideways."""
    assert broken_links([page]) == []
    opened = open_page(page, folder, width)
    assert opened.console == []
    assert opened.overflow <= 0
    for text in shown:
        assert text in opened.dom
    with Image.open(opened.screenshot) as shot:
        assert len(shot.convert("L").getcolors(256) or []) > 20


@WIDTHS
def test_a_sheet_of_neighbours_and_one_of_copies(
    photos: Path, encoder: Encoder, tmp_path: Path, width: int
) -> None:
    index = EmbeddingIndex(str(photos / "photos.parquet"))
    queries = sorted((photos / "photos").iterdir())[:5]
    nearest = index.nearest(encoder.embed(queries), 11)
    near, copies = photos / "near.html", photos / "copies.html"
    write_neighbours(str(near), index, queries, encoder.transform, nearest)
    write_groups(str(copies), index, index.pairs(0.999), 0.999)
    check(near, tmp_path, width, "query", queries[0].name)
    check(copies, tmp_path, width, "00.png", "03.png")


@WIDTHS
def test_a_map_paints_its_points(photos: Path, tmp_path: Path, width: int) -> None:
    index = EmbeddingIndex(str(photos / "photos.parquet"))
    page = photos / "map.html"
    write_map(str(page), index, make_map(index, NUM, label="shape"))
    check(page, tmp_path, width, "round", "square")
    with Image.open(open_page(page, tmp_path, width).screenshot) as shot:
        canvas = np.asarray(shot.convert("HSV"))[200:1400, :width]
    assert (canvas[..., 1] > 100).sum() > 100 * NUM // 10  # points or thumbnails have colors


@WIDTHS
@pytest.mark.parametrize("scored", [True, False])
def test_a_report_of_a_run(run: Path, tmp_path: Path, width: int, *, scored: bool) -> None:
    (run / "scores.json").unlink(missing_ok=True)
    if scored:
        (run / "scores.json").write_text(json.dumps(SCORES))
    page = tmp_path / "report.html"
    write_report(RunFolder.at(str(run)), str(page))
    check(page, tmp_path, width, "effective rank")


@WIDTHS
@pytest.mark.parametrize("study", ["temperature", "projection_head"])
def test_a_report_of_a_study(study: str, tmp_path: Path, width: int) -> None:
    folder = tmp_path / study
    shutil.copytree(ROOT / "docs" / "studies" / study, folder)
    check(folder / "report.html", tmp_path, width, "95 %")
