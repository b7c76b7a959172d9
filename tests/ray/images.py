"""Small parquet files of drawn images, so that these tests need no data set."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from simclr_ray.data.shapes import render


def write_splits(folder: Path, num_images: int) -> Path:
    """Write labelled shapes as `train.parquet`, and 60 as `test.parquet`; return the folder."""
    write_shapes(folder / "train.parquet", num_images, row_group_size=100)
    write_shapes(folder / "test.parquet", 60)
    return folder


def noise_png(seed: int, side: int) -> bytes:
    """Return a PNG of random pixels, side by side, no two seeds alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_shapes(path: Path, num_images: int, *, row_group_size: int = 1000) -> None:
    """Write `num_images` labelled shapes as one parquet file."""
    images, labels = [], []
    for index in range(num_images):
        drawn = render(index, 7)
        buffer = io.BytesIO()
        Image.fromarray(drawn.pixels).save(buffer, "PNG")
        images.append(buffer.getvalue())
        labels.append(drawn.label)
    table = pa.table(
        {
            "id": pa.array(range(1000, 1000 + num_images), pa.int64()),
            "image": pa.array(images, pa.binary()),
            "label": pa.array(labels, pa.int64()),
        }
    )
    pq.write_table(table, path, row_group_size=row_group_size)
