"""Splits that lie side by side are asked for, and never taken for one dataset."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simclr_ray.config.experiment import ColumnsConfig, Experiment
from simclr_ray.data.folder_input import FolderInput
from simclr_ray.data.inputs import open_input
from simclr_ray.data.items import Input
from simclr_ray.data.source import Source
from simclr_ray.data.splits import split_folders, split_of, splits_in
from simclr_ray.errors import ConfigError, DataError
from simclr_ray.storage.filesystem import filesystem
from simclr_ray.train.image_folders import resolve_folders


def opened(what: str, split: str = "") -> Input:
    options: dict[str, Any] = {"root": "", "num_images": 0, "seed": 0}
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
        ("split=test/of=train/train-0.parquet", "test"),
        ("split=extra/0.parquet", "extra"),
        ("training_site=paris/0.parquet", ""),
        ("label=test/0.parquet", ""),
        ("extra-00000-of-00001.parquet", "extra"),
        ("part-00000.parquet", ""),
        ("trainer/latest.parquet", ""),
    ],
)
def test_a_split_is_known_by_the_name_of_the_file_then_of_folders(path: str, split: str) -> None:
    assert split_of(f"/a/test/{path}", "/a/test", ["label"]) == split


def test_names_without_a_usual_split_among_them_are_no_splits() -> None:
    assert (
        splits_in(["/d/cats-00000-of-00001.parquet", "/d/dogs-00000-of-00001.parquet"], "/d") == {}
    )
    assert splits_in(["/d/train-1.parquet", "/d/train-2.parquet"], "/d") == {}


def test_splits_side_by_side_are_asked_for(clone: Path, tmp_path: Path) -> None:
    for what in (str(clone), f"file://{clone}"):
        with pytest.raises(DataError, match=r"splits test \(1 file\), train \(2 files\), unl") as e:
            Source.open(what)
        assert str(e.value).endswith(f"{what}#train")
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


def test_prepare_asks_for_a_split_as_other_verbs_do(clone: Path) -> None:
    with pytest.raises(DataError, match=r"side by side: name one, as in .*clone#train$"):
        opened(str(clone))
    assert labels_of(opened(str(clone), "train")) == [0, 1, 2]
    assert labels_of(opened(str(clone), "test")) == [3]
    assert labels_of(opened(f"{clone}#unlabeled")) == [4]
    assert labels_of(opened(f"{clone}#test", "test")) == [3]
    with pytest.raises(ConfigError, match=r"split: got 'train', and .*clone#test names test"):
        opened(f"{clone}#test", "train")
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


def images(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\x89PNG\r\n\x1a\n" + str(number).encode())
    return root


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train/a/1", "test/a/1"], ["test", "train"]),
        (["Train/1", "VAL/1"], ["Train", "VAL"]),
        (["train2017/1", "val2017/1"], ["train2017", "val2017"]),
        (["dev/1", "eval/1"], ["dev", "eval"]),
        (["set/train/a/1", "set/test/a/1"], ["test", "train"]),
        (["train/a/1", "test/a/1", "extra/1"], ["extra", "test", "train"]),
        (["train/a/1", "test/a/1", "montage"], ["test", "train"]),
        (["train/a/1", "train/b/1"], ["train"]),
        (["cat/train/1", "cat/test/1", "dog/train/1"], ["train", "test"]),
        # classes
        (["train/1", "bus/1"], []),
        (["train/1", "train/2"], []),
        (["train/steam/1", "bus/city/1", "car/1"], []),
        (["train/1", "test/1", "bus/1"], []),
        (["freight_train/1", "passenger_train/1"], []),
        (["dev_board/1", "test_tube/1"], []),
        (["test/1", "bus/1"], []),
        (["cat/train/1", "dog/2"], []),
        (["set/cat/1", "set/dog/1"], []),
        (["1", "2"], []),
    ],
)
def test_folders_are_splits_or_classes(names: list[str], splits: list[str]) -> None:
    names = [f"{name}.png" for name in names]
    found = split_folders(names)
    assert [*found] == splits
    kept = [f"{s.folder}/{name}".lstrip("/") for s in found.values() for name in s.names]
    assert sorted(kept) == sorted(name for name in names if "/" in name and found)


@pytest.mark.parametrize("above", ["", "set/"])
def test_a_folder_of_splits_is_asked_for_one_by_every_door(
    tmp_path: Path, above: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = [f"{above}{n}.png" for n in ("Train/a/1", "Train/b/2", "Test/b/3", "Test/loose")]
    root = images(tmp_path / "i", *names)
    data = {"train": str(root)}
    experiment = Experiment.model_validate({"name": "x", "data": data, "storage": str(tmp_path)})
    for door in (
        lambda: opened(str(root)),
        lambda: Source.open(str(root)),
        lambda: Source.open(f"file://{root}"),
        lambda: resolve_folders(experiment),
    ):
        with pytest.raises(
            DataError, match=r"Test \(2 images\), Train \(2 images\) side .*#Train;"
        ):
            door()
    for what, split in ((f"{root}#Test", ""), (f"file://{root}#test", ""), (str(root), "testing")):
        given = opened(what, split)
        assert isinstance(given, FolderInput)
        assert given.names == ("b/3.png", "loose.png")
        assert given.class_names == ("b",)
        items = sorted(item for part in given.parts(9, 0) for item in part.read())
        assert [item.encoded for item in items] == [
            (root / above / "Test" / name).read_bytes() for name in given.names
        ]
    for uri in (f"{root}#train", f"file://{root}#Train"):
        source = Source.open(uri)
        assert source.class_names == ("a", "b")
        assert source.labels().tolist() == [0, 1]
        assert source.read_group(0).images == [(root / name).read_bytes() for name in names[:2]]
    named = experiment.model_copy(
        update={"data": experiment.data.model_copy(update={"train": f"{root}#Train"})}
    )
    assert Source.open(resolve_folders(named).data.train).class_names == ("a", "b")
    storage = f"{tmp_path.as_uri()}/runs?region=x"  # an option of a bucket
    resolve_folders(named.model_copy(update={"storage": storage}))
    assert list((tmp_path / "runs" / "_lists").glob("*.parquet"))
    with pytest.raises(DataError, match=r"no split dev; by their folders images are of Test \(2"):
        opened(f"{root}#dev")


@pytest.mark.parametrize("by_option", [False, True])
def test_a_folder_that_is_named_may_hold_splits_itself(tmp_path: Path, by_option: bool) -> None:
    root = images(tmp_path / "data", *(f"set/{n}.png" for n in ("train/a/1", "val/a/2")))
    with pytest.raises(DataError, match=r"data/set holds the splits .* as in .*data/set#train"):
        opened(*(str(root), "set") if by_option else (f"{root}#set",))
    assert FolderInput.open(f"{root}#set", labels="folders").class_names == ("train", "val")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["160px/train-00000-of-00001", "full/train-00000-of-00001"],
            "the files of 160px, full are taken together; for one of them: {}/160px#train",
        ),
        (
            ["train-00000-of-00001", "full/train-00000-of-00001"],
            "the files of ., full are taken together; for one of them: {}/full#train",
        ),
        (
            ["a/train/0000", "b/train/0000", "b/train/0001"],
            "the files of a, b are taken together; for one of them: {}/a#train",
        ),
        (["a/train-00000-of-00002", "b/train-00001-of-00002"], ""),
        (["a/part-0", "b/part-0"], ""),
        (["label=a/0", "label=b/0"], ""),
    ],
)
@pytest.mark.parametrize("split", ["", "#train"])
def test_several_configs_of_one_set_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: list[str], said: str, split: str
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": [b"x"]}), tmp_path / f"{name}.parquet")
    if split and not any("train" in name for name in names):
        return
    assert Source.open(f"{tmp_path}{split}").num_rows == len(names)
    assert said.format(tmp_path) in caplog.text
    assert bool(caplog.text) == bool(said)


def test_splits_within_classes_keep_the_classes(tmp_path: Path) -> None:
    names = [f"{c}/{s}/{n}.png" for c in "ab" for s in ("train", "test") for n in (1, 2)]
    root = images(tmp_path, *names)
    with pytest.raises(DataError, match="name one"):
        opened(str(root))
    given = opened(f"{root}#test")
    assert isinstance(given, FolderInput)
    assert given.names == ("a/test/1.png", "a/test/2.png", "b/test/1.png", "b/test/2.png")
    assert given.labels() == [0, 0, 1, 1]


def test_classes_that_are_called_like_splits_may_be_said_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = images(tmp_path, "train/1.png", "test/2.png")
    assert FolderInput.open(str(root), labels="folders").class_names == ("test", "train")
    assert FolderInput.open(str(root), labels="none").num_rows == 2
    assert "the splits test, train are taken together" in caplog.text
    vehicles = images(tmp_path / "vehicles", "train/1.png", "bus/2.png")
    assert FolderInput.open(str(vehicles)).class_names == ("bus", "train")
    assert FolderInput.open(f"{vehicles}#train").names == ("1.png",)


def test_the_only_split_is_no_choice_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = images(tmp_path, "train/cat/1.png", "train/dog/2.png")
    assert FolderInput.open(str(root)).class_names == ("cat", "dog")
    assert "all images are of the folder train, whose folders are the classes" in caplog.text
    assert FolderInput.open(str(root), labels="folders").class_names == ("train",)
