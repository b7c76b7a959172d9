"""Write CIFAR-10 as parquet in the order of the studies that are kept in `docs/studies`.

    python -m benchmarks.cifar10_order DIR [ROOT]

Torchvision downloads CIFAR-10 to ROOT (by default where `prepare` keeps it) unless it is there. DIR
gets `train` (10 files of 5,000 images) and `test` (2 files): `SIMCLR_RAY_DATA` is the folder that
holds DIR where DIR is called `cifar10`. Those studies train on the first 10,000 images of `train`;
`simclr-ray prepare cifar10` shuffles in an order of its own, whose first 10,000 are others.

The order is kept in `benchmarks/cifar10_order.npz`, as six bytes of the SHA-256 of each image's
pixels; images whose pixels are equal are taken as they come. `main` checks that all were found.
"""

from __future__ import annotations

import hashlib
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from simclr_ray.data.items import encode
from simclr_ray.errors import DataError
from simclr_ray.storage.filesystem import cache_folder

ORDER = Path(__file__).with_suffix(".npz")
SPLITS = ("train", "test")
PER_FILE, PER_GROUP, BYTES = 5_000, 1_000, 6

Labelled = tuple[Image.Image, int]


def key_of(image: Image.Image) -> bytes:
    """Return six bytes that tell an image by its pixels: no two of CIFAR-10 collide by chance."""
    return hashlib.sha256(np.asarray(image, np.uint8).tobytes()).digest()[:BYTES]


def order_of(images: Iterable[Image.Image]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the keys of images, as they come: uint8 [n, 6]."""
    keys = b"".join(key_of(image) for image in images)
    return np.frombuffer(keys, np.uint8).reshape(-1, BYTES)


def in_order(
    images: Sequence[Labelled], order: np.ndarray[Any, np.dtype[np.uint8]]
) -> Iterator[Labelled]:
    """Yield images in an order of keys.

    Raises:
        DataError: An image is not among them.
    """
    rows: dict[bytes, list[int]] = defaultdict(list)
    for row, (image, _) in enumerate(images):
        rows[key_of(image)].append(row)
    for at, key in enumerate(order):
        there = rows[key.tobytes()]
        if not there:
            raise DataError(f"image {at} of the order is not among the {len(images):,} given")
        yield images[there.pop(0)]


def write(images: Iterable[Labelled], names: Sequence[str], folder: Path) -> None:
    """Write labelled images as parquet files of 5,000, in the order in which they come."""
    folder.mkdir(parents=True)
    part: list[dict[str, object]] = []
    number = 0
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64()), ("label_name", pa.string())])
    for image, label in images:
        part.append({"image": encode(image), "label": label, "label_name": names[label]})
        if len(part) == PER_FILE:
            table = pa.Table.from_pylist(part, schema)
            pq.write_table(
                table, folder / f"part-{number:05d}.parquet", row_group_size=PER_GROUP,
                compression={"image": "none"},
            )  # fmt: skip
            part, number = [], number + 1


def main(folder: str, root: str = "") -> None:
    """Download, put into order, write."""
    from torchvision.datasets import CIFAR10

    with np.load(ORDER) as orders:
        for split in SPLITS:
            place = root or cache_folder("torchvision")
            images = CIFAR10(str(place), train=split == "train", download=True)
            pairs = [images[row] for row in range(len(images))]
            write(in_order(pairs, orders[split]), images.classes, Path(folder) / split)
            print(f"{folder}/{split}: {len(pairs):,} images")


if __name__ == "__main__":
    main(*sys.argv[1:])
