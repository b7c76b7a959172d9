"""What `prepare` can read: `shapes`, a folder of images, parquet, or a torchvision dataset.

An `Input` knows how many rows there are and hands out `ShardTask`s: small picklable descriptions of
the rows of one shard, which a Ray task reads where it runs. The driver never holds images.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from simclr_ray.config import nearest
from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.data import shapes
from simclr_ray.data.source import NO_LABEL, Source
from simclr_ray.errors import DataError
from simclr_ray.storage.filesystem import cache_folder

Int64s = npt.NDArray[np.int64]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
# A task that reads shuffled parquet rows holds a shard of them; this bounds what it holds.
MAX_SHARD_BYTES = 256 * 2**20


class Item(NamedTuple):
    """One image to store: its id, what a person may call it, its bytes, its class or -1."""

    id: int
    name: str
    encoded: bytes | None
    label: int


class ShardTask(Protocol):
    """The rows of one shard, picklable."""

    def read(self) -> Iterator[Item]:
        """Yield the items in the order in which they are to be stored."""


class Input(Protocol):
    """A set of images that can be cut into parts."""

    @property
    def identity(self) -> dict[str, object]:
        """What decides the rows: a rerun with another identity is another dataset."""

    @property
    def num_rows(self) -> int:
        """How many rows there are, good and bad."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in label order; empty without labels."""

    def parts(self, rows_per_shard: int, seed: int) -> list[ShardTask]:
        """Return the shuffled rows, cut into shards."""


@dataclass(frozen=True)
class ShapesInput:
    """Images of the procedural set; `index` is the id."""

    num_rows: int
    size: int
    set_seed: int
    class_names: tuple[str, ...] = shapes.CLASS_NAMES

    @property
    def identity(self) -> dict[str, object]:
        """The arguments of the generator."""
        return {"kind": "shapes", "n": self.num_rows, "size": self.size, "seed": self.set_seed}

    def parts(self, rows_per_shard: int, seed: int) -> list[ShardTask]:
        """Return the shuffled indices, cut."""
        return [
            ShapesTask(rows, self.size, self.set_seed)
            for rows in _cut(_shuffled(self.num_rows, seed), rows_per_shard)
        ]


@dataclass(frozen=True)
class ShapesTask:
    """Some images of the procedural set, drawn where the part is read."""

    rows: Int64s
    size: int
    set_seed: int

    def read(self) -> Iterator[Item]:
        """Yield each image as lossless WebP."""
        for index in self.rows.tolist():
            pixels, label = shapes.render(index, self.set_seed, self.size)
            yield Item(index, f"shapes {index}", encode(Image.fromarray(pixels)), label)


@dataclass(frozen=True)
class FolderInput:
    """Image files below a folder, by relative name; the first folder of a name is its class."""

    root: str
    names: tuple[str, ...]
    class_names: tuple[str, ...]
    listing: str

    @classmethod
    def open(cls, root: str, limit: int) -> FolderInput:
        """Return the images at any depth below `root`, sorted by name.

        Raises:
            DataError: there are none.
        """
        folder = Path(root)
        paths = sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
        )
        names = tuple(n for n in paths if not any(p.startswith(".") for p in n.split("/")))
        if not names:
            raise DataError(f"{root} holds neither images ({' '.join(IMAGE_SUFFIXES)}) nor parquet")
        flat = any("/" not in name for name in names)
        classes = () if flat else tuple(sorted({name.split("/")[0] for name in names}))
        names = names[:limit] if limit else names
        sizes = [(name, (folder / name).stat().st_size) for name in names]
        listing = hashlib.sha256(repr(sizes).encode()).hexdigest()
        return cls(str(folder.absolute()), names, classes, listing)

    @property
    def identity(self) -> dict[str, object]:
        """Names and sizes of the files; where the folder lies does not matter."""
        return {"kind": "folder", "n": self.num_rows, "listing": self.listing}

    @property
    def num_rows(self) -> int:
        """Number of files."""
        return len(self.names)

    def parts(self, rows_per_shard: int, seed: int) -> list[ShardTask]:
        """Return the shuffled files, cut."""
        label_of = {name: label for label, name in enumerate(self.class_names)}
        labels = [label_of.get(name.split("/")[0], NO_LABEL) for name in self.names]
        return [
            FolderTask(self.root, rows, [self.names[r] for r in rows], [labels[r] for r in rows])
            for rows in _cut(_shuffled(self.num_rows, seed), rows_per_shard)
        ]


@dataclass(frozen=True)
class FolderTask:
    """Some files of a folder; the id is the place in the sorted listing."""

    root: str
    rows: Int64s
    names: list[str]
    labels: list[int]

    def read(self) -> Iterator[Item]:
        """Yield the bytes of each file as they are."""
        for row, name, label in zip(self.rows.tolist(), self.names, self.labels, strict=True):
            path = Path(self.root, name)
            yield Item(row, name, path.read_bytes() if path.is_file() else None, label)


@dataclass(frozen=True)
class ParquetInput:
    """The rows of a parquet dataset, which keep their ids."""

    source: Source
    bytes_per_row: int

    @classmethod
    def open(cls, uri: str, columns: ColumnsConfig, limit: int) -> ParquetInput:
        """Return the dataset at `uri`; raises `DataError` as `Source.open` does."""
        source = Source.open(uri, columns, limit)
        return cls(source, int(source.row_bytes) + 1)

    @property
    def identity(self) -> dict[str, object]:
        """The fingerprint of the dataset."""
        return {"kind": "parquet", "fingerprint": self.source.fingerprint}

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.source.num_rows

    @property
    def class_names(self) -> tuple[str, ...]:
        """As the dataset names them."""
        return self.source.class_names

    def parts(self, rows_per_shard: int, seed: int) -> list[ShardTask]:
        """Return row groups in shuffled order, cut, each shard shuffled again.

        A shuffle of single rows would have every shard read every file.
        """
        rng = np.random.default_rng(seed)
        groups = [self.source.row_groups[g] for g in rng.permutation(len(self.source.row_groups))]
        rows = np.concatenate([g.first_row + np.arange(g.num_rows, dtype=np.int64) for g in groups])
        count = max(min(rows_per_shard, MAX_SHARD_BYTES // self.bytes_per_row), 1)
        return [ParquetTask(self.source, rng.permutation(piece)) for piece in _cut(rows, count)]


@dataclass(frozen=True)
class ParquetTask:
    """Some rows of a parquet dataset."""

    source: Source
    rows: Int64s

    def read(self) -> Iterator[Item]:
        """Yield the rows with the bytes as they are."""
        got = self.source.read_rows(self.rows)
        labels = got.labels if got.labels is not None else np.full(len(self.rows), NO_LABEL)
        for row, key, label, image in zip(
            self.rows.tolist(), got.ids.tolist(), labels.tolist(), got.images, strict=True
        ):
            yield Item(key, f"row {row}", image, label)


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
            for rows in _cut(_shuffled(self.num_rows, seed), rows_per_shard)
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


def open_input(
    kind_or_path: str,
    *,
    columns: ColumnsConfig,
    split: str,
    root: str,
    num_images: int,
    size: int,
    seed: int,
) -> Input:
    """Return what `kind_or_path` names: `shapes`, an existing path or URI, or torchvision's name.

    Raises:
        DataError: it names nothing, or what it names cannot be read.
    """
    if kind_or_path == "shapes":
        return ShapesInput(num_images or 20_000, size, seed)
    path = Path(kind_or_path).expanduser()
    if "://" in kind_or_path or path.is_file() or (path.is_dir() and any(path.rglob("*.parquet"))):
        return ParquetInput.open(kind_or_path, columns, num_images)
    if path.is_dir():
        return FolderInput.open(str(path), num_images)
    datasets = _torchvision_names()
    if kind_or_path.lower() in datasets:
        return TorchvisionInput.open(datasets[kind_or_path.lower()], split, root, num_images)
    hint = nearest(kind_or_path.lower(), ["shapes", *datasets])
    raise DataError(
        f"{kind_or_path}: no such file or folder, and no dataset of that name{hint}; "
        "give a folder of images, parquet, `shapes`, or a torchvision dataset"
    )


def encode(image: Image.Image) -> bytes:
    """Return an image as lossless WebP (PNG where WebP cannot hold it), fastest setting."""
    out = io.BytesIO()
    if image.mode in ("RGB", "RGBA", "L") and max(image.size) <= 16_383:
        image.save(out, "WEBP", lossless=True, method=0, quality=0)
    else:
        image.save(out, "PNG", compress_level=1)
    return out.getvalue()


@functools.cache
def _torchvision_names() -> dict[str, str]:
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


def _shuffled(num_rows: int, seed: int) -> Int64s:
    return np.random.default_rng(seed).permutation(num_rows).astype(np.int64)


def _cut(rows: Int64s, count: int) -> Sequence[Int64s]:
    return [rows[first : first + count] for first in range(0, len(rows), count)]
