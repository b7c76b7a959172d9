"""Photographs as files, of the parquet that $SIMCLR_RAY_DATA has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq


def write_photographs(
    root: Path,
    folder: Path,
    classes: Sequence[str] = (),
    most: int = 0,
    *,
    split: str = "train",
    flat: bool = False,
) -> int:
    """Write photographs of Caltech-101 as JPEG files, a folder a class; return how many.

    Args:
        root: $SIMCLR_RAY_DATA.
        folder: Made.
        classes: Those alone; empty: all.
        most: So many of a class at most; 0: all.
        split: `train` or `test`.
        flat: All into one folder.
    """
    written: Counter[str] = Counter()
    for file in sorted((root / "caltech101" / split).glob("*.parquet")):
        table = pq.read_table(file, columns=["image", "label_name"])
        rows = zip(table["image"].to_pylist(), table["label_name"].to_pylist(), strict=True)
        for image, name in rows:
            if (classes and name not in classes) or (most and written[name] == most):
                continue
            written[name] += 1
            place = folder if flat else folder / name
            place.mkdir(parents=True, exist_ok=True)
            stem = f"{name}_" if flat else ""
            (place / f"{stem}{written[name]:04d}.jpg").write_bytes(image)
    return written.total()
