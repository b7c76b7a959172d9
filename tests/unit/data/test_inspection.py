"""What `inspect` says of a dataset, against what was put into it; and the page that shows it."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simclr_ray.data import inspection_page
from simclr_ray.data.inspection import Inspection, inspect_all
from simclr_ray.data.inspection_page import as_tree, facts, write_page, write_record
from simclr_ray.data.source import Source
from tests.reference.copies import copy_of
from tests.unit.cli.test_app import errors, run
from tests.unit.data.test_duplicates import drawn


def encode(pixels: npt.NDArray[Any], kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def array_bytes(pixels: npt.NDArray[Any]) -> bytes:
    out = io.BytesIO()
    np.save(out, pixels)
    return out.getvalue()


def dataset(path: Path, images: Sequence[bytes | None], **columns: Sequence[object]) -> str:
    table = pa.table({"image": pa.array(images, pa.binary()), **columns})
    pq.write_table(table, path, row_group_size=4)
    return str(path)


def look(uri: str, against: str = "", *, duplicates: bool = True) -> Inspection:
    other = Source.open(against) if against else None
    return inspect_all(Source.open(uri), against=other, duplicates=duplicates)


def test_sizes_ranges_and_unusable_rows_are_those_of_the_images(tmp_path: Path) -> None:
    pixels = [drawn(seed, 20 + seed, 30) for seed in range(6)]
    images = [*map(encode, pixels), b"", None, b"text", encode(pixels[0])[:300]]
    seen = look(dataset(tmp_path / "a.parquet", images))
    assert seen.scan.unusable == {"empty": [6, 7], "not an image": [8], "truncated": [9]}
    assert seen.scan.usable.tolist() == list(range(6))
    every = np.concatenate([image.reshape(-1, 3) for image in pixels])
    for at, channel in enumerate(seen.scan.channels):
        assert (channel.least, channel.most) == (every[:, at].min(), every[:, at].max())
        assert channel.mean == pytest.approx(every[:, at].mean(), abs=1e-9)
        assert channel.std == pytest.approx(every[:, at].std(), abs=1e-9)
    words = facts(seen)
    assert words["images"] == "10, all of them looked at"
    assert words["unusable"] == "4: 2 x empty; 1 x truncated; 1 x not an image"
    assert words["sizes"].startswith("30 to 30 px wide, 20 to 25 px high, median 30 and 22.5")
    assert words["exact duplicates"] == words["near duplicates"] == "none"


def test_the_same_bytes_and_the_same_pixels_are_exact_and_others_are_near(tmp_path: Path) -> None:
    one, two, white = drawn(1), drawn(2), np.full((9, 9, 3), 255, np.uint8)
    rng = np.random.default_rng(0)
    images = [
        encode(one), encode(two), encode(one), encode(one, "BMP"), encode(white),
        copy_of(one, "all", rng), encode(white), encode(white - 1), encode(two),
    ]  # fmt: skip
    labels = [0, 1, 0, 0, 2, 1, 2, 2, 1]
    seen = look(dataset(tmp_path / "a.parquet", images, label=labels))
    groups = [(g.rows, g.same_bytes, g.labels_differ) for g in seen.same_pixels]
    assert groups == [([0, 2, 3], False, False), ([1, 8], True, False), ([4, 6], True, False)]
    assert [(g.rows, g.labels_differ) for g in seen.near] == [([0, 5], True)]
    assert 0 < seen.near[0].misfit < 0.1
    assert seen.num_flat == 3  # white and nearly white do not match by likeness
    assert facts(seen)["exact duplicates"] == (
        "4 images beyond the first of 3 groups, 2 of them byte by byte"
    )
    assert facts(seen)["near duplicates"].endswith("1 group of more than one class")
    assert facts(look(str(tmp_path / "a.parquet"), duplicates=False)).keys() == (
        facts(seen).keys() - {"exact duplicates", "near duplicates"}
    )


def test_a_thousand_copies_of_one_image_are_one_group(tmp_path: Path) -> None:
    image = encode(drawn(0, 24, 24))
    seen = look(dataset(tmp_path / "a.parquet", [image] * 1000))
    assert [len(group.rows) for group in seen.same_pixels] == [1000]
    assert (seen.near, seen.num_crowded) == ([], 0)
    write_page(seen, str(tmp_path / "a.html"))
    assert (tmp_path / "a.html").stat().st_size < 500_000


def test_images_of_a_test_set_are_found_once_each_and_exact_ones_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [encode(drawn(seed)) for seed in range(8)]
    train = dataset(tmp_path / "train.parquet", [*images, copy_of(drawn(3), "jpeg", rng)])
    test = [copy_of(drawn(5), "all", rng), images[3], encode(drawn(90)), b"bad", images[3]]
    seen = look(train, dataset(tmp_path / "test.parquet", test))
    assert seen.leaks is not None
    matches = [(m.other, m.row, m.misfit > 0) for m in seen.leaks.matches]
    assert matches == [(0, 5, True), (1, 3, False), (4, 3, False)]
    assert facts(seen)["of it found here"] == "3 of 5 images: 2 by the same pixels, 1 nearly"
    tree = as_tree(seen)["against"]
    assert [m["other"] for m in tree["matches"]] == [{"row": r, "id": r} for r in (0, 1, 4)]


def test_a_dataset_against_itself_and_against_another_that_shares_nothing(tmp_path: Path) -> None:
    one = dataset(tmp_path / "one.parquet", [encode(drawn(seed)) for seed in range(5)])
    other = dataset(tmp_path / "other.parquet", [encode(drawn(seed)) for seed in range(50, 53)])
    assert facts(look(one, one))["of it found here"] == (
        "5 of 5 images: 5 by the same pixels, 0 nearly; it is the same dataset"
    )
    assert facts(look(one, other))["of it found here"] == (
        "0 of 3 images: 0 by the same pixels, 0 nearly"
    )


@pytest.mark.parametrize("images", [[b"bad", None], [encode(drawn(0))], [encode(drawn(0, 2, 2))]])
def test_one_image_and_none_that_can_be_used_give_a_page(
    images: list[bytes | None], tmp_path: Path
) -> None:
    path = dataset(tmp_path / "a.parquet", images)
    seen = look(path, path)
    write_page(seen, str(tmp_path / "a.html"))
    write_record(seen, str(tmp_path / "a.json"))
    assert json.loads((tmp_path / "a.json").read_text())["num_rows"] == len(images)


def test_gray_of_16_bits_and_ids_that_repeat_are_looked_at(tmp_path: Path) -> None:
    deep = [drawn(seed)[:, :, 0].astype(np.uint16) * 257 for seed in range(2)]
    images = [encode(deep[0]), encode(drawn(5)), encode(deep[1]), encode(deep[0])]
    seen = look(dataset(tmp_path / "a.parquet", images, id=[7, 7, 8, 9]))
    assert seen.scan.ids.tolist() == [0, 1, 2, 3]
    assert seen.scan.unusable == {}
    assert [group.rows for group in seen.same_pixels] == [[0, 3]]
    assert facts(seen)["more than 8 bits"].endswith("of 65,535")


def test_images_of_five_channels_are_looked_at_in_all_of_them(tmp_path: Path) -> None:
    bands = [np.dstack([drawn(seed), drawn(seed + 9)[..., :2]]) for seed in range(2)]
    other_last = bands[0].copy()
    other_last[..., 4] ^= 1  # the same in red, green and blue
    images = [bands[0], bands[1], other_last, bands[0]]
    encoded = [array_bytes(image) for image in images] + [encode(drawn(0))]
    source = Source.open(dataset(tmp_path / "a.parquet", encoded))
    seen = inspect_all(source, channels=5)
    assert [group.rows for group in seen.same_pixels] == [[0, 3]]
    assert [group.rows for group in seen.near] == [[0, 2]]
    assert [*map(len, seen.scan.unusable.values())] == [1]
    every = np.concatenate([image.reshape(-1, 5) for image in images])
    assert [c.name for c in seen.scan.channels] == [f"channel {at}" for at in range(1, 6)]
    for at, channel in enumerate(seen.scan.channels):
        assert (channel.least, channel.most) == (every[:, at].min(), every[:, at].max())
        assert channel.mean == pytest.approx(every[:, at].mean(), abs=1e-9)
    write_page(seen, str(tmp_path / "a.html"))
    shown = run("inspect", str(tmp_path / "a.parquet"), "--channels", "5", cwd=tmp_path)
    assert "1 of 5 images of a sample" in " ".join(shown.stdout.split())


def test_dark_channels_are_stretched_each_by_its_own_white(tmp_path: Path) -> None:
    scale = np.array([1, 4, 16, 257], np.uint16)
    bands = [drawn(seed)[..., [0, 1, 2, 0]].astype(np.uint16) * scale for seed in range(3)]
    seen = inspect_all(
        Source.open(dataset(tmp_path / "a.parquet", [array_bytes(image) for image in bands])),
        channels=4,
    )
    assert [deep.is_dark for deep in seen.deep] == [True, True, True, False]
    assert [deep.most for deep in seen.deep] == [
        int(np.stack(bands)[..., c].max()) for c in range(4)
    ]
    assert all(channel.most == 255 for channel in seen.scan.channels)
    assert "data.white=[" in facts(seen)["more than 8 bits of channel 1"]
    assert "nearly black" not in facts(seen)["more than 8 bits of channel 4"]


def test_images_that_are_nearly_black_are_compared_all_the_same(tmp_path: Path) -> None:
    dark = [drawn(seed)[:, :, 0].astype(np.uint16) * 4 for seed in range(3)]
    copied = np.asarray(Image.fromarray(dark[1]).resize((100, 80)))
    seen = look(dataset(tmp_path / "a.parquet", [encode(i) for i in (*dark, copied)]))
    assert seen.num_flat == 0
    assert [group.rows for group in seen.near] == [[1, 3]]
    assert "nearly black: shown and compared with data.white=" in facts(seen)["more than 8 bits"]
    write_page(seen, str(tmp_path / "a.html"))


def test_names_of_files_and_classes_are_escaped_on_the_page(tmp_path: Path) -> None:
    nasty = "<script>alert(1)&"
    folder = tmp_path / "photos" / nasty
    folder.mkdir(parents=True)
    for name, seed in (("a", 1), ("b", 1), ("<img src=x>", 2)):
        (folder / f"{name}.png").write_bytes(encode(drawn(seed)))
    (folder / "bad<b>.png").write_bytes(encode(drawn(3))[:400])
    source = Source.open(str(tmp_path / "photos"))
    seen = inspect_all(source, names=(str(tmp_path / "photos <i>"), ""))
    write_page(seen, str(tmp_path / "a.html"))
    page = (tmp_path / "a.html").read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "bad<b>" not in page
    assert "photos &lt;i&gt;</h1>" in page
    assert "&lt;script&gt;alert(1)&amp;/&lt;img src=x&gt;.png" in page
    assert "<h2>Exact duplicates</h2>" in page
    assert "<h2>Near duplicates</h2>" not in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)  # needs nothing else


def test_no_reason_is_left_out_of_the_count(tmp_path: Path) -> None:
    small = [encode(np.zeros((1, side, 3), np.uint8)) for side in range(2, 30)]
    seen = look(dataset(tmp_path / "a.parquet", [*small, encode(drawn(0))]))
    assert facts(seen)["unusable"].startswith("28: 1 x too small: ")
    assert facts(seen)["unusable"].endswith("; 23 for other reasons")
    write_page(seen, str(tmp_path / "a.html"))
    assert "<td class=l>other reasons</td><td>8</td>" in (tmp_path / "a.html").read_text()


def test_the_page_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection_page, "GROUPS_SHOWN", 3)
    monkeypatch.setattr(inspection_page, "MATCHES_SHOWN", 3)
    monkeypatch.setattr(inspection_page, "SAMPLES", 3)
    images = [encode(drawn(seed // 2, 200, 200)) for seed in range(16)]
    path = dataset(tmp_path / "a.parquet", images)
    write_page(look(path, path), str(tmp_path / "a.html"))
    page = (tmp_path / "a.html").read_text()
    assert page.count("<figure>") == 3 + 3 * 2 + 3 * 2
    assert len(page) < 15 * 7_000


def test_the_verb_shows_progress_writes_page_and_record_and_refuses_before_it_looks(
    tmp_path: Path,
) -> None:
    images = [encode(drawn(seed)) for seed in (1, 2, 1)]
    dataset(tmp_path / "a.parquet", images, label=["cat", "dog", "dog"])
    shutil.copy(tmp_path / "a.parquet", tmp_path / "b.parquet")
    given = ["--against", "b.parquet", "--page", "out/a.html", "--json", "a.json"]
    done = run("inspect", "a.parquet", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for expected in (
        "column label string (label)",
        "unusable 0",
        "exact duplicates 1 image beyond the first of 1 group, 1 of them byte by byte; "
        "1 group of more than one class",
        "near duplicates none",
        "│ 1 │ dog │ 2 │",
        "wrote out/a.html",
    ):
        assert expected in lines
    assert "a.parquet: 3 of 3 images" in done.stderr
    record = json.loads((tmp_path / "a.json").read_text())
    assert [row["row"] for row in record["same_pixels"][0]["rows"]] == [0, 2]
    assert len(record["against"]["matches"]) == 3
    for wrong in (["--page", "a.txt"], ["--json", "a"], ["--page", "a.parquet/x.html"]):
        done = run("inspect", "a.parquet", *wrong, cwd=tmp_path)
        assert done.returncode == 2
        assert len(errors(done)) == 1
        assert "3 images" not in done.stderr


@pytest.mark.parametrize("channels", [2, 5])
def test_images_of_other_channels_are_said_with_what_looks_at_them(
    channels: int, tmp_path: Path
) -> None:
    folder = tmp_path / "bands"
    folder.mkdir()
    for at in range(9):
        np.save(folder / f"{at}.npy", np.full((8, 9, channels), 20 * at, np.uint8))
    told = (
        f"9 images of {channels} channels: --channels {channels} looks at them, "
        f"data.channels={channels} trains on them"
    )
    typed = run("inspect", "bands", cwd=tmp_path)
    assert f"of a sample {told}" in " ".join(typed.stdout.split())
    whole = facts(look(str(folder)))
    assert whole["channels"] == told
    assert whole["exact duplicates"] == "no image that could be compared"
    three = run("inspect", "bands", "--channels", "3", cwd=tmp_path)
    assert "9 of 9 images of a sample" in " ".join(three.stdout.split())
    asked = run("inspect", "bands", "--channels", str(channels), cwd=tmp_path)
    assert "looks at them" not in asked.stdout
    source = Source.open(str(folder))
    assert "channels" not in facts(inspect_all(source, channels=channels))


def test_a_sample_says_which_images_are_gray_and_which_bits_they_use(tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    for at in range(3):
        values = np.full((8, 9), 4095, np.uint16)
        values[0, at] = at + 7
        Image.fromarray(values).save(folder / f"{at}.png")
    shown = " ".join(run("inspect", "scans", cwd=tmp_path).stdout.split())
    assert "channels of a sample 3 images gray" in shown
    bits = "3 images of 16 bits with values of 7 to 4,095 of 65,535"
    assert f"more than 8 bits {bits}, nearly black: data.white=auto" in shown
    Image.new("RGB", (8, 9), (1, 2, 3)).save(folder / "color.png")
    shown = " ".join(run("inspect", "scans", cwd=tmp_path).stdout.split())
    assert "channels of a sample 3 images gray and 1 image in color" in shown
    assert f"more than 8 bits {bits}" in shown
