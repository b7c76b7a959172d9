"""CIFAR-10 comes out in the order of the kept studies, whatever order it is had in."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks import cifar10_order
from benchmarks.cifar10_order import ORDER, in_order, order_of, write
from simclr_ray.errors import DataError

NAMES = ("cat", "dog", "ship")


def pixels(encoded: bytes) -> bytes:
    with Image.open(io.BytesIO(encoded)) as image:
        return image.convert("RGB").tobytes()


def test_images_come_in_the_order_that_is_kept_and_equal_ones_once_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    drawn[7] = drawn[2]
    images = [(Image.fromarray(values), row % 3) for row, values in enumerate(drawn)]
    order = order_of(image for image, _ in images)
    scrambled = [images[row] for row in rng.permutation(9)]
    monkeypatch.setattr(cifar10_order, "PER_FILE", 3)
    write(in_order(scrambled, order), NAMES, tmp_path / "train")
    files = sorted((tmp_path / "train").glob("*.parquet"))
    assert [file.name for file in files] == [f"part-0000{k}.parquet" for k in range(3)]
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert [pixels(row["image"]) for row in rows] == [values.tobytes() for values in drawn]
    assert [row["label"] for row in rows if row["image"] not in {rows[2]["image"]}] == [
        row % 3 for row in range(9) if row not in {2, 7}
    ]
    assert [row["label_name"] for row in rows] == [NAMES[row["label"]] for row in rows]


def test_an_image_that_is_not_there_is_said() -> None:
    image = Image.fromarray(np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(DataError, match="image 1 of the order is not among the 1 given"):
        list(in_order([(image, 0)], order_of([image, image])))


def test_the_kept_order_is_that_of_the_images_that_studies_ran_on(image_root: Path) -> None:
    with np.load(ORDER) as orders:
        assert {name: len(keys) for name, keys in orders.items()} == {
            "train": 50_000,
            "test": 10_000,
        }
        file = image_root / "cifar10" / "train" / "part-00001.parquet"
        rows = pq.read_table(file, columns=["image"])["image"].to_pylist()[::50]
        opened = [Image.open(io.BytesIO(row)).convert("RGB") for row in rows]
        np.testing.assert_array_equal(order_of(opened), orders["train"][5_000:10_000:50])
