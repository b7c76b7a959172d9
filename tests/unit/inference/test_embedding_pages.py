"""What is found in embeddings, as lines, sheets and a map, from images where they lie now."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simclr_ray.data.source import Source
from simclr_ray.errors import ConfigError, DataError
from simclr_ray.inference.embed import load_encoder
from simclr_ray.inference.embedded_images import EmbeddedImages
from simclr_ray.inference.embedding_file import Origin
from simclr_ray.inference.embedding_index import EmbeddingIndex
from simclr_ray.inference.embedding_map import make_map, write_map
from simclr_ray.inference.embedding_sheets import write_neighbours
from simclr_ray.inference.encoder import Encoder
from tests.formats.test_formats import HERE as FORMATS
from tests.unit.cli.in_turn import run_in_turn
from tests.unit.cli.test_app import errors, run
from tests.unit.inference.test_embedding_index import write_index

MODEL = str(FORMATS / "format_2")
COPIES = {3: 0, 7: 0, 9: 4}  # image -> that which it is a copy of
NUM = 24


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(MODEL)


@pytest.fixture
def photos(tmp_path: Path, encoder: Encoder) -> Path:
    """Give a folder with images of which some are copies, and their embeddings beside it."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(NUM):
        drawn = np.random.default_rng(COPIES.get(number, number))
        pixels = drawn.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    write(tmp_path, encoder)
    return tmp_path


def write(
    place: Path, made_by: Encoder, name: str = "photos.parquet", *, num: int = NUM, **changes: Any
) -> None:
    files = sorted((place / "photos").iterdir())[:num]
    origin = Origin(MODEL, made_by.digest, str(place / "photos"), decoder=tuple(made_by.decoder))
    write_index(
        place / name, made_by.embed(files), names=[file.name for file in files],
        origin=origin._replace(**changes), shape=(["round", "square"] * NUM)[:num],
    )  # fmt: skip


def test_a_name_that_is_no_utf_8_and_a_password_are_shown_as_they_may_be(
    photos: Path, encoder: Encoder
) -> None:
    query = photos / os.fsdecode(b"\xe9.png")
    query.write_bytes((photos / "photos" / "00.png").read_bytes())
    index = EmbeddingIndex(str(photos / "photos.parquet"))
    index.uri = "s3://bucket/i.parquet?tenant_id=T&client_secret=S3CRET"
    nearest = index.nearest(encoder.embed([query]), 3)
    write_neighbours(str(photos / "a.html"), index, [query], encoder.transform, nearest)
    page = (photos / "a.html").read_text()
    assert "S3CRET" not in page
    assert "tenant_id=T&amp;client_secret=***" in page
    assert "\\udce9.png" in page
    write_map(str(photos / "map.html"), index, make_map(index, NUM))
    assert "S3CRET" not in (photos / "map.html").read_text()


def test_classes_beyond_the_most_frequent_are_others(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    classes = [f"c{n:02}" for n in [*range(30), *range(20), *range(10)]]
    index = EmbeddingIndex(write_index(tmp_path / "a.parquet", rows, kind=classes))
    write_map(str(tmp_path / "map.html"), index, make_map(index, 60, label="kind"))
    page = (tmp_path / "map.html").read_text()
    assert page.count("<label>") == 21
    assert "others</label>" in page
    (text,) = re.findall(r"id=points>(.*?)</script>", page)
    points = json.loads(text)
    assert points[25][2:4] == [20, "25.png (c25)"]


def images_in(page: str) -> list[Image.Image]:
    """Return the images of a page, which asks no other host for anything."""
    assert not re.search(r"(src|href|url)\W{1,3}(https?:)?//", page)
    found = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", page)
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in found]


def test_search_prints_the_nearest_and_draws_them(photos: Path) -> None:
    query = photos / "photos" / "00.png"
    words = ["model", "search", "photos.parquet", str(query), "--num", "5"]
    done = run(*words, "--out", "near.html", cwd=photos)
    assert done.returncode == 0, done.stderr
    *printed, loaded = done.stdout.splitlines()
    assert loaded == "LOADED"  # neither Ray nor MLflow
    lines = [line.split("\t") for line in printed]
    assert [line[0] for line in lines] == [str(query)] * 5
    assert [line[1] for line in lines[:3]] == ["1.0000"] * 3
    assert {line[2] for line in lines[:3]} == {"00.png", "03.png", "07.png"}
    assert float(lines[3][1]) < 1
    page = (photos / "near.html").read_text()
    assert len(images_in(page)) == 6  # with the one that was asked for
    assert "query" in page


def test_a_file_that_is_no_image_is_left_out_and_an_index_of_another_encoder_is_refused(
    photos: Path, encoder: Encoder
) -> None:
    (photos / "text.png").write_text("no image")
    write(photos, encoder, "others.parquet", weights="others")
    write(photos, encoder, "unknown.parquet", encoder="", weights="")
    query = "photos/04.png"
    left_out, others, unknown, given, ending = run_in_turn(
        ["model", "search", "photos.parquet", query, "text.png", "--num", "2", "--out", "near.png"],
        ["model", "search", "others.parquet", query],
        ["model", "search", "unknown.parquet", query],
        ["model", "search", "unknown.parquet", query, "--encoder", MODEL],
        ["model", "search", "photos.parquet", query, "--out", "near.gif"],
        cwd=photos,
    )
    assert left_out.returncode == 1
    names = {line.split("\t")[2] for line in left_out.stdout.splitlines()}
    assert names == {"04.png", "09.png"}
    assert "left out: text.png" in left_out.stderr
    with Image.open(photos / "near.png") as sheet:
        assert sheet.width > 3 * 112
        assert sheet.height < 200
    assert [others.returncode, unknown.returncode, given.returncode] == [2, 2, 0], given.stderr
    assert errors(others) == [
        f"error: {MODEL}: others.parquet was made by another encoder (its weights are others); "
        "embed the images again"
    ]
    assert "--encoder: is missing: unknown.parquet does not say" in errors(unknown)[0]
    assert "does not say by which weights it was made" in given.stderr
    (line,) = errors(ending)
    assert line == "error: --out: got near.gif; it must end in .html, .png, .jpg, .jpeg"


SAME = ["model", "duplicates", "photos.parquet", "--min-cosine", "0.99999", "--out", "same.html"]


def test_duplicates_are_pairs_and_groups_and_none_is_no_error(photos: Path) -> None:
    rows = np.eye(3, 4, dtype=np.float32)
    write_index(photos / "apart.parquet", rows, names=["a", "b", "c"])
    apart = ["model", "duplicates", "apart.parquet", "--out"]
    done, empty, drawn = run_in_turn(
        SAME, [*apart, "new/none.html"], [*apart, "none.png"], cwd=photos
    )
    assert done.returncode == empty.returncode == drawn.returncode == 0, drawn.stderr
    assert empty.stdout == drawn.stdout == ""
    assert "0 pairs in 0 groups, of 3 images" in empty.stderr
    assert (photos / "new" / "none.html").is_file()
    with Image.open(photos / "none.png") as sheet:
        assert sheet.width > 100
    pairs = {tuple(line.split("\t")[1:]) for line in done.stdout.splitlines()}
    assert pairs == {("00.png", "03.png"), ("00.png", "07.png"), ("03.png", "07.png"),
                     ("04.png", "09.png")}  # fmt: skip
    assert "4 pairs in 2 groups, of 24 images" in done.stderr
    page = (photos / "same.html").read_text()
    assert len(images_in(page)) == 5
    assert "3 images, 1.000 to 1.000" in page


def test_images_that_have_moved_are_named_and_found_again(photos: Path) -> None:
    (photos / "photos").rename(photos / "elsewhere")
    Image.new("RGB", (8, 8)).save(photos / "03.png")  # of that name, and none of them
    shutil.copytree(photos / "elsewhere", photos / "fewer")
    (photos / "fewer" / "00.png").unlink()
    shutil.copytree(photos / "fewer", photos / "changed")
    Image.new("RGB", (8, 8)).save(photos / "changed" / "99.png")
    moved, again, fewer, changed = run_in_turn(
        SAME,
        [*SAME[:-1], "again.html", "--images", "elsewhere"],
        [*SAME[:-1], "fewer.html", "--images", "fewer"],
        [*SAME[:-1], "changed.html", "--images", "changed"],
        cwd=photos,
    )
    assert [d.returncode for d in (moved, again, fewer, changed)] == [0, 0, 2, 2], moved.stderr
    assert "images are not shown: " in moved.stderr
    assert "--images says where they are" in moved.stderr
    page = (photos / "same.html").read_text()
    assert "03.png" in page
    assert not images_in(page)
    assert len(images_in((photos / "again.html").read_text())) == 5
    assert "has 23 images, and photos.parquet was made of 24" in errors(fewer)[0]
    assert not (photos / "fewer.html").exists()
    assert errors(changed) == ["error: those of changed are others now"]


def test_a_map_is_one_page_with_all_images_and_classes(photos: Path, encoder: Encoder) -> None:
    write(photos, encoder, "few.parquet", num=4)
    words = ["model", "map", "photos.parquet", "map.html"]
    done, column, ending, few = run_in_turn(
        [*words, "--label", "shape"],
        [*words, "--label", "color"],
        [*words[:-1], "map.pdf"],
        ["model", "map", "few.parquet", "few.html"],
        cwd=photos,
    )
    assert [d.returncode for d in (done, column, ending, few)] == [0, 2, 2, 2], done.stderr
    page = (photos / "map.html").read_text()
    assert len(images_in(page)) == NUM
    (text,) = re.findall(r'<script type="application/json" id=points>(.*?)</script>', page)
    points = json.loads(text)
    names = [f"{n:02}.png ({['round', 'square'][n % 2]})" for n in range(NUM)]
    assert [point[3] for point in points] == names
    assert [point[2] for point in points] == [0, 1] * (NUM // 2)
    at = np.array([point[:2] for point in points])
    assert at.min() == 0
    assert at.max() == 1
    assert "round</label>" in page
    assert errors(column) == ["error: --label: there is no column 'color'; the columns: shape"]
    assert errors(ending) == ["error: PAGE: got map.pdf; it must end in .html"]
    assert "few.parquet has 4 images; a map takes 10" in errors(few)[0]


def test_a_map_is_the_same_again_and_names_cannot_end_its_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(0).normal(size=(60, 70)).astype(np.float32)
    names = ["</script><b>", *(f"{i}.png" for i in range(59))]
    index = EmbeddingIndex(write_index(tmp_path / "a.parquet", rows, names=names))
    first, again = make_map(index, 40), make_map(index, 40)
    assert np.array_equal(first.points, again.points)
    assert np.array_equal(first.positions, np.unique(first.positions))
    assert len(first.positions) == 40
    made = make_map(index, 1000)
    assert len(made.positions) == 60
    write_map(str(tmp_path / "map.html"), index, made)
    assert "</script><b>" not in (tmp_path / "map.html").read_text()
    same = EmbeddingIndex(write_index(tmp_path / "same.parquet", np.ones((40, 8), np.float32)))
    with pytest.raises(DataError, match="all the same; there is nothing to map"):
        make_map(same, 40)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ConfigError, match=r"pip install 'simclr-ray\[search\]'"):
        make_map(index, 40)


def test_a_sheet_is_not_written_over_the_image_that_is_looked_for(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = photos / "mine.png"
    shutil.copy(photos / "photos" / "00.png", image)
    before = image.read_bytes()
    (done,) = run_in_turn(
        ["model", "search", "photos.parquet", "mine.png", "--out", "./mine.png"], cwd=photos
    )
    assert done.returncode == 2
    assert "--out: ./mine.png is an image that is looked for" in done.stderr
    assert image.read_bytes() == before


def test_images_that_were_made_anew_are_not_shown_as_those_of_the_index(
    photos: Path, encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    write(photos, encoder, fingerprint=Source.open(str(photos / "photos")).fingerprint)
    index = EmbeddingIndex(str(photos / "photos.parquet"))
    with EmbeddedImages(index) as images:
        assert images.thumbnails([0])[0].image is not None
    first, second = (photos / "photos" / f"{name}.png" for name in ("00", "01"))
    first.write_bytes(second.read_bytes())
    with EmbeddedImages(index) as images:
        assert images.thumbnails([0])[0].image is None
    assert "has changed since" in caplog.text


def test_classes_that_have_names_are_called_by_them(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
    origin = Origin(MODEL, classes={"kind": ["cat", "dog"]})
    file = write_index(tmp_path / "a.parquet", rows, kind=[0, 1, 5] * 4, origin=origin)
    made = make_map(EmbeddingIndex(file), 12, label="kind")
    assert list(made.classes) == ["cat", "dog", "5"] * 4


def test_of_a_folder_all_images_are_looked_for(photos: Path) -> None:
    few, none = photos / "few", photos / "none"
    (few / "below").mkdir(parents=True)
    none.mkdir()
    for name, place in (("00", few / "below"), ("01", few), ("02", few)):
        shutil.copy(photos / "photos" / f"{name}.png", place)
    (few / "notes.txt").write_text("of mine")
    done, empty = run_in_turn(
        ["model", "search", "photos.parquet", "few", "photos/05.png", "--num", "1"],
        ["model", "search", "photos.parquet", "none"],
        cwd=photos,
    )
    assert done.returncode == 0, done.stderr
    names = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert names == ["few/01.png", "few/02.png", "few/below/00.png", "photos/05.png"]
    assert empty.returncode == 2
    assert "none has no images in it" in empty.stderr
