"""Torchvision's datasets as inputs of `prepare`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simclr_ray.data.classes import NO_LABEL, Int64s
from simclr_ray.data.items import Item, ShardTask, cut, encode, shuffled
from simclr_ray.errors import DataError
from simclr_ray.storage.filesystem import cache_folder


@dataclass(frozen=True)
class TorchvisionInput:
    """A torchvision dataset, which each process opens for itself from the downloaded files."""

    dataset: str
    split: str
    root: str
    num_rows: int
    class_names: tuple[str, ...]

    @classmethod
    def open(cls, dataset: str, split: str, root: str, limit: int) -> TorchvisionInput:
        """Return the dataset of that class name, downloaded to `root` unless it is there.

        Raises:
            DataError: it cannot be had.
        """
        root = str(Path(root).expanduser() if root else cache_folder("torchvision"))
        try:
            opened = _open_torchvision(dataset, split, root, download=True)
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            raise DataError(f"torchvision {dataset} ({split}): {error}") from error
        names = getattr(opened, "classes", None) or ()
        num_rows = min(len(opened), limit) if limit else len(opened)
        return cls(dataset, split, root, num_rows, tuple(str(name) for name in names))

    @property
    def identity(self) -> dict[str, object]:
        """Name and split; the files are pinned by torchvision's own check sums."""
        return {"kind": self.dataset, "split": self.split, "n": self.num_rows}

    def parts(self, rows_per_shard: int, seed: int) -> list[ShardTask]:
        """Return the shuffled rows, cut."""
        return [
            TorchvisionTask(self.dataset, self.split, self.root, rows)
            for rows in cut(shuffled(self.num_rows, seed), rows_per_shard)
        ]


@dataclass(frozen=True)
class TorchvisionTask:
    """Some rows of a torchvision dataset."""

    dataset: str
    split: str
    root: str
    rows: Int64s

    def read(self) -> Iterator[Item]:
        """Yield the original bytes where the dataset is made of files, lossless WebP where not."""
        opened = _open_torchvision(self.dataset, self.split, self.root, download=False)
        for row in self.rows.tolist():
            image, label = opened[row]
            encoded = image if isinstance(image, bytes) else encode(image)
            label = label if isinstance(label, int | np.integer) else NO_LABEL
            yield Item(row, f"{self.dataset} {row}", encoded, int(label))


@functools.cache
def torchvision_names() -> dict[str, str]:
    """Return the datasets of torchvision, by their names in lower case."""
    from torchvision import datasets

    return {name.lower(): name for name in datasets.__all__}


@functools.lru_cache(maxsize=1)
def _open_torchvision(dataset: str, split: str, root: str, *, download: bool) -> Any:
    """Return the dataset, giving its constructor those of our arguments that it has."""
    from torchvision import datasets

    kind = getattr(datasets, dataset)
    offered: dict[str, object] = {
        "root": root,
        "download": download,
        "split": split,
        "train": split == "train",
        "loader": _read_bytes,
    }
    takes = inspect.signature(kind).parameters
    return kind(**{key: value for key, value in offered.items() if key in takes})


def _read_bytes(path: str | Path) -> bytes:
    return Path(path).read_bytes()
