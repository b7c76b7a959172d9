"""Splits that lie side by side are asked for, and never taken for one dataset."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.data.inputs import open_input
from simclr_ray.data.items import Input
from simclr_ray.data.source import Source
from simclr_ray.data.splits import split_of, splits_in
from simclr_ray.errors import DataError
from simclr_ray.storage.filesystem import filesystem


def opened(what: str, split: str = "train") -> Input:
    options: dict[str, Any] = {"root": "", "num_images": 0, "size": 32, "seed": 0}
    return open_input(what, columns=ColumnsConfig(), split=split, **options)


def labels_of(given: Input) -> list[int]:
    return sorted(item.label for part in given.parts(9, 0) for item in part.read())


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of a repository of the hub."""
    for name, labels in {
        "data/train-00000-of-00002.parquet": [0, 1],
        "data/train-00001-of-00002.parquet": [2],
        "data/test-00000-of-00001.parquet": [3],
        "data/unlabeled-00000-of-00001.parquet": [4],
    }.items():
        features = {"label": {"names": [*"edcba"], "_type": "ClassLabel"}}
        about = {"huggingface": json.dumps({"info": {"features": features}})}
        images = [{"bytes": str(n).encode(), "path": f"{n}.png"} for n in labels]
        table = pa.table({"image": images, "label": pa.array(labels)})
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata(about), tmp_path / "clone" / name)
    (tmp_path / "clone" / "README.md").write_text("---\n---\n")
    return tmp_path / "clone"


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00002-abc.parquet", "train"),
        ("Train.parquet", "train"),
        ("val/0.parquet", "validation"),
        ("train/dev_1.parquet", "validation"),
        ("split=test/part-00000.parquet", "test"),
        ("extra-00000-of-00001.parquet", "extra"),
        ("part-00000.parquet", ""),
        ("trainer/latest.parquet", ""),
    ],
)
def test_a_split_is_known_by_the_name_of_the_file_then_of_folders(path: str, split: str) -> None:
    assert split_of(f"/a/test/{path}", "/a/test") == split


def test_names_without_a_usual_split_among_them_are_no_splits() -> None:
    assert (
        splits_in(["/d/cats-00000-of-00001.parquet", "/d/dogs-00000-of-00001.parquet"], "/d") == {}
    )
    assert splits_in(["/d/train-1.parquet", "/d/train-2.parquet"], "/d") == {}


def test_splits_side_by_side_are_asked_for(clone: Path, tmp_path: Path) -> None:
    for what in (str(clone), f"file://{clone}"):
        with pytest.raises(DataError, match=r"splits test \(1 file\), train \(2 files\), unl") as e:
            Source.open(what)
        assert str(e.value).endswith(f"{what}#unlabeled")
        for split, labels in (("train", [0, 1, 2]), ("test", [3]), ("unlabeled", [4])):
            source = Source.open(f"{what}#{split}")
            assert source.labels().tolist() == labels
            assert source.class_names == (*"edcba",)
            assert source.read_group(0).images[0] == str(labels[0]).encode()
    with pytest.raises(DataError, match="there is no split val; by their names files are of test"):
        Source.open(f"{clone}#val")
    shutil.copytree(clone, tmp_path / "moved")
    assert (
        Source.open(f"{tmp_path}/moved#train").fingerprint
        == Source.open(f"{clone}#train").fingerprint
    )


def test_prepare_takes_the_split_of_its_option_and_says_the_others(
    clone: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert labels_of(opened(str(clone))) == [0, 1, 2]
    assert "split=train is taken; there are also test, unlabeled" in caplog.text
    assert labels_of(opened(str(clone), "test")) == [3]
    assert labels_of(opened(f"{clone}#unlabeled")) == [4]
    with pytest.raises(DataError, match="there is no split dev"):
        opened(str(clone), "dev")
    for name in ("data/test-00000-of-00001.parquet", "data/unlabeled-00000-of-00001.parquet"):
        (clone / name).unlink()
    assert labels_of(opened(str(clone))) == [0, 1, 2]
    with pytest.raises(DataError, match="there is no split test"):
        opened(str(clone), "test")


def test_a_name_with_the_mark_is_a_name(clone: Path, tmp_path: Path) -> None:
    shutil.copytree(clone / "data", tmp_path / "a#train")
    (tmp_path / "a#train" / "test-00000-of-00001.parquet").unlink()
    (tmp_path / "a#train" / "unlabeled-00000-of-00001.parquet").unlink()
    assert Source.open(str(tmp_path / "a#train")).num_rows == 3
    assert filesystem(f"file://{clone}#train")[1] == f"{clone}#train"
