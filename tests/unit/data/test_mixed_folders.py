"""Where parquet and images lie together, the one that is meant is read, or neither."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simclr_ray.data.folder_input import FolderInput
from simclr_ray.data.inputs import ParquetInput, open_input
from simclr_ray.data.prepare import prepare
from simclr_ray.data.source import Source
from simclr_ray.errors import DataError
from tests.ray.images import noise_png

NAMES = [f"{folder}/{at}.png" for folder in ("cat", "dog") for at in range(4)]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of eight images in two folders."""
    folder = tmp_path / "photos"
    for at, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(noise_png(at, 8))
    return folder


def write_list(path: Path, images: Sequence[str | bytes | None]) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": ["x"] * len(images)}), path)
    return path


def refusal(where: Path | str) -> str:
    with pytest.raises(DataError) as raised:
        Source.open(str(where))
    return str(raised.value)


def test_a_list_of_some_of_the_images_beside_it_is_refused_with_both_ways(photos: Path) -> None:
    labels = write_list(photos / "labels.parquet", [*NAMES[:3], None])
    assert refusal(photos) == (
        f"{photos} holds 8 images beside 1 parquet file of 4 rows, which name 3 of them: for the "
        f"rows give {labels}; for the images move the parquet out, or `simclr-ray prepare {photos} "
        "OUT "
        "labels=auto`"
    )
    assert Source.open(str(labels)).num_rows == 4  # as is said
    given = open_input(str(photos), labels="auto")
    assert isinstance(given, FolderInput)
    assert given.num_rows == len(NAMES)
    with pytest.raises(DataError, match="holds 8 images beside 1 parquet file of 4 rows"):
        open_input(str(photos))


def test_folders_that_hold_one_of_both_are_named(photos: Path) -> None:
    for name in ("a", "b"):
        write_list(photos / "tables" / f"{name}.parquet", [b"image"])
    for name in NAMES[4:]:
        (photos / name).unlink()
    line = refusal(photos)
    assert "holds 4 images beside 2 parquet files of 2 rows: for the rows" in line
    assert f"give {photos}/tables; for the images give {photos}/cat, or" in line
    write_list(photos / "cat" / "c.parquet", [b"image"])
    said = refusal(photos)
    assert "for the rows move the images out; for the images move the parquet out, or" in said


def test_a_list_of_all_images_beside_it_is_read(photos: Path) -> None:
    names = [f"./{name}" for name in NAMES[:4]] + [f"{photos}/{name}" for name in NAMES[4:]]
    write_list(photos / "labels.parquet", names)
    assert Source.open(str(photos)).num_rows == len(NAMES)
    assert isinstance(open_input(str(photos)), ParquetInput)


def test_a_figure_beside_many_rows_is_no_dataset(photos: Path) -> None:
    write_list(photos.parent / "rows" / "0.parquet", [b"image"] * 100)
    for number, name in enumerate(NAMES[:2]):
        assert Source.open(str(photos.parent / "rows")).num_rows == 100
        figure = photos.parent / "rows" / f"{number}.png"
        figure.write_bytes((photos / name).read_bytes())
    assert "holds 2 images beside 1 parquet file of 100 rows" in refusal(photos.parent / "rows")


def test_a_split_that_files_of_parquet_have_alone_is_theirs(photos: Path) -> None:
    for split in ("train", "test"):
        write_list(photos / f"{split}.parquet", [*NAMES[:3]])
    assert Source.open(f"{photos}#train").num_rows == 3
    (photos / "cat").rename(photos / "train")
    (photos / "dog").rename(photos / "test")
    assert f"for the images give {photos}/train, or" in refusal(f"{photos}#train")


def test_images_are_told_by_contents_where_no_ending_says_it(photos: Path) -> None:
    for name in NAMES:
        (photos / name).rename((photos / name).with_suffix(""))
    (photos / "README.md").write_text("of no image")
    write_list(photos / "labels.parquet", [*NAMES[:3]])
    assert "holds 8 images beside" in refusal(photos)


def test_shards_are_not_written_among_images(photos: Path) -> None:
    with pytest.raises(DataError, match=r"photos holds 8 images \(cat/0.png\); prepare into"):
        prepare("shapes", str(photos), num_images=10)
    assert sorted(path.name for path in photos.iterdir()) == ["cat", "dog"]
