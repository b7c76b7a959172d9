"""Test images that are trained on too: of files, folders of images, and copies of whole sets."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from simclr_ray.config.experiment import DataConfig
from simclr_ray.data import files
from simclr_ray.data.overlap import _Folders, overlap_line
from tests.ray.images import noise_png, write_shapes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sets of 12 and 9 images, and photographs: three to train on and two within those."""
    (tmp_path / "set").mkdir()
    for name, rows in (("a", 12), ("b", 9)):
        write_shapes(tmp_path / "set" / f"{name}.parquet", rows)
    for at, name in enumerate(("cat/1", "cat/2", "dog/3", "test/cat/4", "test/dog/5")):
        file = tmp_path / "photos" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(noise_png(at, 24))
    return tmp_path


def line_of(folder: Path, **places: str) -> str:
    """Return what is said, with places below `folder`."""
    data = {key: f"{folder}/{place}" for key, place in places.items()}
    return overlap_line(DataConfig(**data)).replace(f"{folder}/", "")  # type: ignore[arg-type] # places alone


A, B, BOTH = "set/a.parquet", "set/b.parquet", "set"


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({"train": A, "test": A}, f"all 12 images of {A} are in {A} too: scores flatter"),
        ({"train": BOTH, "test": B}, f"all 9 images of {B} are in {BOTH} too: scores flatter"),
        ({"train": A, "test": BOTH}, f"12 of 21 images of {BOTH} are in {A} too: scores flatter"),
        ({"train": A, "test": B}, ""),
        ({"train": A, "eval_train": B, "test": B}, f"all 9 images of {B} are in {B} too: scores"),
        (
            {"train": BOTH, "eval_train": B, "test": B},
            f"all 9 images of {B} are in {B} too, and all 9 in {BOTH}: scores",
        ),
        ({"train": A}, ""),
        ({"train": "photos", "test": "photos/test"}, "all 2 images of photos/test are in photos"),
        ({"train": "photos/cat", "test": "photos/test"}, ""),
        ({"train": "photos/cat", "test": "photos"}, "2 of 5 images of photos are in photos/cat"),
        ({"train": "photos", "test": A}, ""),
    ],
)
def test_images_of_the_test_split_that_are_trained_on_are_counted(
    folder: Path, places: dict[str, str], said: str
) -> None:
    line = line_of(folder, **places)
    assert line.startswith(said)
    assert bool(line) == bool(said)


def test_a_split_is_known_again_by_another_path_and_as_a_copy(folder: Path) -> None:
    (folder / "link").symlink_to(folder / "set")
    shutil.copytree(folder / BOTH, folder / "copy")
    assert line_of(folder, train="link", test=A).startswith("all 12 images")
    assert line_of(folder, train="copy", test=BOTH).startswith("all 21 images")


def test_rows_past_the_limit_are_not_trained_on(folder: Path) -> None:
    data = {"train": str(folder / BOTH), "test": str(folder / B)}
    assert overlap_line(DataConfig(**data, limit=12)) == ""  # type: ignore[arg-type] # places alone
    assert "are in" in overlap_line(DataConfig(**data, limit=13))  # type: ignore[arg-type] # places alone


def test_a_limit_keeps_no_row_from_the_classifier(folder: Path) -> None:
    both = str(folder / BOTH)
    data = DataConfig(train=both, eval_train=both, test=str(folder / B), limit=12)
    assert overlap_line(data).startswith("all 9 images")


def test_a_row_group_that_a_limit_cuts_counts_for_the_rows_that_are_read(folder: Path) -> None:
    shutil.copytree(folder / "set", folder / "copy")
    for place in (B, "copy/b.parquet"):
        data = DataConfig(train=f"{folder}/{place}", test=f"{folder}/{B}", limit=4)
        assert overlap_line(data).startswith("4 of 9 images")


def test_images_that_parquet_names_are_compared_by_where_they_lie(folder: Path) -> None:
    whole = str(folder / "photos" / "test" / "cat" / "4.png")
    lists = {
        "train": ["photos/cat/1.png", None, whole],
        "test": [Path(whole).as_uri(), None, "photos/dog/3.png"],
        "other": ["photos/test/cat/4.png", "photos/dog/3.png"],
    }
    for name, images in lists.items():
        pq.write_table(pa.table({"image": pa.array(images)}), folder / f"{name}.parquet")
    said = line_of(folder, train="train.parquet", test="other.parquet")
    assert said.startswith("1 of 2 images of other.parquet are in train.parquet too")
    assert line_of(folder, train="train.parquet", test="test.parquet").startswith("1 of 3 images")


PATHS = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    "name",
    [
        "./photos/cat/1.png",
        "photos//cat/1.png",
        "photos/cat/../cat/1.png",
        "links/cat/1.png",
        "pool/own.png",
        "ABSOLUTE/links/cat/1.png",
        "file://ABSOLUTE/links/../photos/cat/%31.png",
        "pool/../photos/cat/1.png",  # where the file system takes it, not the text
    ],
)
@pytest.mark.parametrize("is_struct", [False, True], ids=["text", "struct"])
def test_an_image_is_the_same_by_whatever_name_it_is_reached(
    folder: Path, name: str, is_struct: bool
) -> None:
    (folder / "links").symlink_to(folder / "photos")
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "own.png").symlink_to(folder / "photos" / "cat" / "1.png")
    (folder / "pool").symlink_to(folder / "elsewhere")
    named = name.replace("ABSOLUTE", str(folder))
    pq.write_table(pa.table({"image": ["photos/cat/1.png"]}), folder / "train.parquet")
    test = pa.array([{"bytes": None, "path": named}], PATHS) if is_struct else [named]
    pq.write_table(pa.table({"image": test}), folder / "test.parquet")
    said = "all 1 images of test.parquet are in train.parquet too: scores flatter"
    assert line_of(folder, train="train.parquet", test="test.parquet") == said
    # and a file of the same name elsewhere is another
    other = [named.replace("1.png", "2.png").replace("%31", "2").replace("own", "other")]
    pq.write_table(pa.table({"image": other}), folder / "other.parquet")
    assert not line_of(folder, train="train.parquet", test="other.parquet")


def test_names_of_a_list_that_is_a_link_begin_at_the_link(folder: Path) -> None:
    (folder / "lists").mkdir()
    for place, target in (("a", "cat/1"), ("b", "cat/2")):
        (folder / place).mkdir()
        (folder / place / "x.png").write_bytes((folder / "photos" / f"{target}.png").read_bytes())
        pq.write_table(pa.table({"image": ["x.png"], "k": [place]}), folder / f"lists/{place}.pq")
        (folder / place / "list.parquet").symlink_to(folder / f"lists/{place}.pq")
    assert not line_of(folder, train="a", test="b")


def test_names_in_a_bucket_are_keys_however_its_address_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3 = pafs.S3FileSystem(anonymous=True, region="eu-west-1")
    monkeypatch.setattr(
        files, "filesystem", lambda uri: (s3, uri[5:].partition("?")[0].rstrip("/"))
    )
    lists = [
        ("b/lists/a.parquet", "", "../photos/x.png"),
        ("b/lists/a.parquet", "s3://b/photos?region=eu-west-1", "x.png"),
        ("b/lists/a.parquet", "s3://b?region=eu-west-1", "photos/./x.png"),
        ("b/list.parquet", "", "s3://b/photos/x.png"),
    ]
    places = {_Folders().of_list(s3, path, root).place_of(name) for path, root, name in lists}
    assert places == {"s3:b/photos/x.png"}
