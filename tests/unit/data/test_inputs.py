"""What `prepare` is pointed at is recognised, listed, cut into shuffled parts, and read."""

from __future__ import annotations

import inspect
import io
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image

from simclr_ray.augment.decode import ImageError, decode_image
from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.data import torchvision_input
from simclr_ray.data.folder_input import FolderInput
from simclr_ray.data.inputs import ParquetInput, ShapesInput, open_input
from simclr_ray.data.items import Input, Item
from simclr_ray.data.shapes import render
from simclr_ray.data.slices import cut_groups
from simclr_ray.data.source import Source
from simclr_ray.data.torchvision_input import UNSUPPORTED, TorchvisionInput
from simclr_ray.errors import DataError


def opened(kind_or_path: str, *, num_images: int = 0, split: str = "", root: str = "") -> Input:
    return open_input(
        kind_or_path,
        columns=ColumnsConfig(),
        split=split,
        root=root,
        num_images=num_images,
        seed=5,
    )


def read(given: Input, rows_per_shard: int = 4, seed: int = 0) -> list[list[Item]]:
    """The items of every part, after the way through pickle that they take to a Ray task."""
    parts = pickle.loads(pickle.dumps(given.parts(rows_per_shard, seed)))  # noqa: S301 - our own
    return [list(part.read()) for part in parts]


def jpeg(color: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (20, 12), color).save(out, "JPEG")
    return out.getvalue()


def fill(folder: Path, names: Sequence[str]) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg((i * 20, 100, 50)))
    return folder


def test_shapes_are_drawn_as_their_ids_say_and_stored_without_loss() -> None:
    given = opened("shapes", num_images=10)
    assert isinstance(given, ShapesInput)
    items = [item for part in read(given) for item in part]
    assert sorted(item.id for item in items) == list(range(10))
    for item in items:
        assert item.encoded is not None
        np.testing.assert_array_equal(decode_image(item.encoded), render(item.id, 5).pixels)
        assert item.label == item.id % 10


def test_a_folder_of_folders_gives_classes_in_order_of_their_names(tmp_path: Path) -> None:
    fill(tmp_path, ["dog/1.jpg", "cat/deep/2.JPEG", "cat/1.png", "ant/x.webp", "dog/.hidden.jpg"])
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    given = opened(str(tmp_path))
    assert isinstance(given, FolderInput)
    assert given.class_names == ("ant", "cat", "dog")
    items = sorted(item for part in read(given) for item in part)
    assert [(i.id, i.name, i.label) for i in items] == [
        (0, "ant/x.webp", 0),
        (1, "cat/1.png", 1),
        (2, "cat/deep/2.JPEG", 1),
        (3, "dog/1.jpg", 2),
    ]
    assert all(i.encoded == (tmp_path / i.name).read_bytes() for i in items)


def test_the_identity_of_a_list_has_the_cut_into_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output that was cut otherwise is of other settings; that of images is what it was."""
    fill(tmp_path, [f"{i}.jpg" for i in range(10)])
    names = [f"{i}.jpg" for i in range(10)]
    pq.write_table(pa.table({"image": names}), tmp_path / "list.parquet")
    images = [(tmp_path / name).read_bytes() for name in names]
    pq.write_table(pa.table({"image": images}), tmp_path / "images.parquet")

    def identity(name: str) -> dict[str, object]:
        given = ParquetInput.open(str(tmp_path / name), ColumnsConfig(), 0)
        return dict(given.identity)

    assert set(identity("images.parquet")) == {"kind", "fingerprint"}
    first = identity("list.parquet")
    assert identity("list.parquet") == first
    monkeypatch.setattr("simclr_ray.data.source.cut_groups", lambda groups: cut_groups(groups, 4))
    other = identity("list.parquet")
    assert (first["slices"], other["slices"]) == (1, 3)
    assert other["fingerprint"] == first["fingerprint"]
    mean = sum(map(len, images)) / len(images)
    assert mean < int(str(first["bytes_per_row"])) < mean + 200


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    given = opened(str(fill(tmp_path, ["b.jpg", "a.jpg", "c.jpg"])), num_images=2)
    assert given.class_names == ()
    items = sorted(item for part in read(given) for item in part)
    assert [(i.name, i.label) for i in items] == [("a.jpg", -1), ("b.jpg", -1)]


def test_messages_name_a_folder_of_images_and_not_the_list_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "cache").symlink_to(tmp_path / "far" / "away")  # as on shared homes
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = Source.open(str(fill(tmp_path / "photos", ["1.jpg", "2.jpg"])))
    assert source.uri != source.shown_uri == str(tmp_path / "photos")
    with pytest.raises(DataError) as refused:
        source.labels()
    assert str(refused.value).startswith(f"{tmp_path}/photos ")
    assert source.uri not in str(refused.value)


def test_a_file_that_went_away_is_an_item_that_says_so(tmp_path: Path) -> None:
    given = opened(str(fill(tmp_path, ["a.jpg", "b.jpg"])))
    (tmp_path / "a.jpg").unlink()
    items = sorted(item for part in read(given) for item in part)
    assert decode_image(items[1].encoded or b"").ndim == 3
    with pytest.raises(ImageError, match="no such file"):
        decode_image(items[0].encoded or b"")


def test_the_identity_of_a_folder_follows_names_and_sizes_and_not_the_place(tmp_path: Path) -> None:
    one = opened(str(fill(tmp_path / "one", ["a.jpg", "b.jpg"]))).identity
    assert opened(str(fill(tmp_path / "two", ["a.jpg", "b.jpg"]))).identity == one
    assert opened(str(fill(tmp_path / "two", ["a.jpg", "c.jpg"]))).identity != one


def test_parquet_rows_keep_ids_labels_and_bytes_and_are_each_read_once(tmp_path: Path) -> None:
    images = [jpeg((i, 0, 0)) for i in range(23)]
    ids = [100 + i for i in range(23)]
    table = pa.table({"id": ids, "image": pa.array(images), "label": [i % 3 for i in range(23)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    given = opened(str(tmp_path))
    assert isinstance(given, ParquetInput)
    parts = read(given, rows_per_shard=10)
    assert [len(part) for part in parts] == [10, 10, 3]
    items = [item for part in parts for item in part]
    assert [i.id for i in items] != sorted(ids)
    assert sorted((i.id, i.encoded, i.label) for i in items) == list(
        zip(ids, images, [i % 3 for i in range(23)], strict=True)
    )


def test_the_order_is_a_function_of_the_seed() -> None:
    given = opened("shapes", num_images=50)
    a, b, c = ([item.id for part in read(given, 7, seed) for item in part] for seed in (1, 1, 2))
    assert a == b
    assert a != c
    assert sorted(a) == sorted(c) == list(range(50))


def write_mnist(root: Path, count: int) -> np.ndarray:
    """A set in the files of torchvision's MNIST, which it opens without a check sum."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    digits: np.ndarray = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    for prefix in ("train", "t10k"):
        head = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(head + digits.tobytes())
        labels = bytes(i % 10 for i in range(count))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels)
    return digits


def test_a_torchvision_dataset_of_arrays_is_stored_without_loss(tmp_path: Path) -> None:
    digits = write_mnist(tmp_path, 12)
    for split in ("train", "test"):
        given = opened("mnist", root=str(tmp_path), split=split)
        assert isinstance(given, TorchvisionInput)
        assert given.class_names[7] == "7 - seven"
        items = [item for part in read(given) for item in part]
        assert sorted(item.id for item in items) == list(range(12))
        for item in items:
            assert item.encoded is not None
            pixels = decode_image(item.encoded)
            np.testing.assert_array_equal(pixels[..., 0], digits[item.id])
            assert item.label == item.id % 10


def test_a_torchvision_dataset_of_files_keeps_their_bytes(tmp_path: Path) -> None:
    base = fill(tmp_path / "eurosat" / "2750", ["Forest/1.jpg", "River/2.jpg"])
    items = [i for part in read(opened("EuroSAT", root=str(tmp_path))) for i in part]
    files = sorted(base.rglob("*.jpg"))
    assert [i.encoded for i in sorted(items)] == [f.read_bytes() for f in files]
    assert [i.label for i in sorted(items)] == [0, 1]


def test_fewer_rows_of_a_torchvision_dataset_may_be_asked_for() -> None:
    items = [i for part in read(opened("fakedata", num_images=3)) for i in part]
    assert sorted(i.id for i in items) == [0, 1, 2]


def test_an_unknown_name_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no dataset of that name \(did you mean 'cifar10'\?\)"):
        opened("cifar01")
    with pytest.raises(DataError, match="holds neither images"):
        opened(str(tmp_path))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"torchvision CIFAR10 \(train\)"):
        opened("cifar10", root=str(tmp_path / "file"))


class Given(torch.utils.data.Dataset):  # type: ignore[type-arg]  # torchvision's are untyped as well
    """A dataset that answers how it was made."""

    target: object = 2

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        self.made = {"train": train}

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Image.Image, object]:
        return Image.new("RGB", (4, 4), (255 * self.made["train"], index, 0)), self.target


class Both(Given):
    """As EMNIST: a split with both halves, the rest by keywords."""

    def __init__(self, root: str, split: str, **kwargs: Any) -> None:
        if split != "letters":
            raise ValueError(f"Unknown value {split!r}\nValid: letters")
        super().__init__(root, **kwargs)


class Splits(Given):
    """As STL10, SVHN and most others."""

    target = None

    def __init__(self, root: str, split: str = "", download: bool = False) -> None:
        self.made = {"train": split == "train"}


class Plain(Given):
    """As Caltech256: no splits."""

    def __init__(self, root: str, download: bool = False) -> None:
        self.made = {"train": True}


@pytest.mark.parametrize(
    ("kind", "split", "is_train"),
    [
        (Given, "train", True),
        (Given, "test", False),
        (Both, "letters", True),
        (Both, "letters/test", False),
        (Splits, "train", True),
        (Splits, "unlabeled", False),
        (Plain, "train", True),
    ],
)
def test_a_split_means_what_the_constructor_of_a_torchvision_dataset_says(
    kind: type[Given],
    split: str,
    is_train: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    torchvision_input._open_torchvision.cache_clear()
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", kind)
    items = [i for p in read(opened("cifar10", split=split, root=str(tmp_path))) for i in p]
    assert [i.label for i in items] == [-1 if kind is Splits else 2] * 2
    assert ("images get no label" in caplog.text) == (kind is Splits)
    assert items[0].encoded is not None
    assert decode_image(items[0].encoded)[0, 0, 0] == 255 * is_train


@pytest.mark.parametrize(
    ("kind", "split"),
    [(Given, "tset"), (Given, "val"), (Both, "train"), (Both, "letters/val"), (Plain, "test")],
)
def test_a_split_that_is_not_there_is_refused_in_one_line(
    kind: type[Given], split: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torchvision_input._open_torchvision.cache_clear()
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", kind)
    with pytest.raises(DataError, match=r"torchvision CIFAR10 \(") as error:
        opened("cifar10", split=split, root=str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*UNSUPPORTED])
def test_torchvision_sets_without_classes_of_images_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"torchvision {name} is not read: "):
        opened(name, root=str(tmp_path))


def test_every_other_torchvision_dataset_is_made_of_root_split_and_halves_alone() -> None:
    for name in sorted({*torchvision.datasets.__all__} - {*UNSUPPORTED}):
        parameters = inspect.signature(getattr(torchvision.datasets, name)).parameters.values()
        needed = {
            p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD
        }
        assert needed <= {"root", "split"}, name
