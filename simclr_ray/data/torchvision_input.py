"""Torchvision's datasets as inputs of `prepare`."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simclr_ray.data.arrays import Int64s
from simclr_ray.data.classes import NO_LABEL
from simclr_ray.data.items import Item, ShardTask, cut, encode, shuffled
from simclr_ray.errors import DataError, one_line
from simclr_ray.storage.filesystem import cache_folder

_REASONS = {
    "it holds no single images with a class": (
        *("CocoCaptions", "CocoDetection", "VOCSegmentation", "VOCDetection", "SBDataset"),
        *("Cityscapes", "WIDERFace", "Kitti", "Flickr8k", "Flickr30k", "SBU"),
    ),
    "it holds pairs of images": (
        *("PhotoTour", "LFWPairs", "KittiFlow", "Sintel", "FlyingChairs", "FlyingThings3D"),
        *("HD1K", "Kitti2012Stereo", "Kitti2015Stereo", "CarlaStereo", "Middlebury2014Stereo"),
        *("CREStereo", "FallingThingsStereo", "SceneFlowStereo", "SintelStereo", "InStereo2k"),
        "ETH3DStereo",
    ),
    "it holds videos": ("MovingMNIST", "Kinetics", "HMDB51", "UCF101"),
    "it is no dataset; give the folder itself": ("ImageFolder", "DatasetFolder"),
    "it is no dataset": ("VisionDataset", "wrap_dataset_for_transforms_v2"),
    "its databases (lmdb) are of many files and categories; export them to folders": (
        *("LSUN", "LSUNClass"),
    ),
}
UNSUPPORTED = {name: why for why, names in _REASONS.items() for name in names}

log = logging.getLogger(__name__)


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
        if why := UNSUPPORTED.get(dataset):
            raise DataError(f"torchvision {dataset} is not read: {why}")
        try:
            opened = _open_torchvision(dataset, split, root, download=True)
            _, label = opened[0]
        except (RuntimeError, ValueError, TypeError, OSError, ImportError, LookupError) as error:
            raise DataError(f"torchvision {dataset} ({split}): {one_line(error)}") from error
        if not isinstance(label, int | np.integer):
            log.warning(
                "torchvision %s (%s): a target is no class but %s: images get no label",
                dataset, split, type(label).__name__,
            )  # fmt: skip
        names = getattr(opened, "classes", None) or ()
        num_rows = min(len(opened), limit) if limit else len(opened)
        return cls(dataset, split, root, num_rows, tuple(_class_name(name) for name in names))

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
    takes = _parameters(kind)
    name, _, half = split.partition("/")
    if {"split", "train"} <= takes:  # a set of several, each with both: EMNIST, `letters/test`
        half = half or "train"
    elif "split" in takes:
        name, half = split, "train"
    else:
        half = split
        if split not in (("train", "test") if "train" in takes else ("train",)):
            there = "train and test" if "train" in takes else "none"
            raise ValueError(f"there is no split {split}; there are: {there}")
    if half not in ("train", "test"):
        raise ValueError(f"there is no split {split}: behind the slash stands train or test")
    offered: dict[str, object] = {
        "root": root,
        "download": download,
        "split": name,
        "train": half == "train",
        "loader": _read_bytes,
    }
    return kind(**{key: value for key, value in offered.items() if key in takes})


def _parameters(kind: type) -> set[str]:
    """Return what a constructor takes, and what it hands on to those of its bases by `**kwargs`."""
    takes: set[str] = set()
    for base in kind.__mro__:
        parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]  # of a class
        takes |= {p.name for p in parameters}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return takes


def _class_name(name: object) -> str:
    """Return the name of a class; ImageNet has several for one."""
    return ", ".join(map(str, name)) if isinstance(name, tuple) else str(name)


def _read_bytes(path: str | Path) -> bytes:
    return Path(path).read_bytes()
