"""What `prepare` reads: `shapes`, a folder of images, parquet, tar shards, a torchvision dataset.

An `Input` knows how many rows there are and hands out `ShardTask`s: small picklable descriptions of
the rows of one shard, which a Ray task reads where it runs. The driver never holds images.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from simclr_ray.config import nearest
from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.config.sections.data import FolderGroups, FolderLabels, PreparationConfig
from simclr_ray.data import shapes
from simclr_ray.data.arrays import Int64s
from simclr_ray.data.arrow_input import ArrowInput, find_arrow
from simclr_ray.data.classes import NO_LABEL
from simclr_ray.data.folder_input import FolderInput
from simclr_ray.data.grouping import cut_between_groups, grouped_order, one_array
from simclr_ray.data.image_groups import group_column, group_kind
from simclr_ray.data.items import Input, Item, ShardTask, cut, encode, shuffled
from simclr_ray.data.listing import all_parquet, images_among, part_split
from simclr_ray.data.shards import GroupKind, check_group_sizes
from simclr_ray.data.source import Source
from simclr_ray.data.tar_input import TarInput, find_tars
from simclr_ray.data.torchvision_input import TorchvisionInput, torchvision_names
from simclr_ray.errors import ConfigError, ConfigIssue, DataError
from simclr_ray.storage.filesystem import filesystem

# A task that reads shuffled parquet rows holds a shard of them; this bounds what it holds.
MAX_SHARD_BYTES = 256 * 2**20


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
            for rows in cut(shuffled(self.num_rows, seed), rows_per_shard)
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
class ParquetInput:
    """The rows of a parquet dataset, which keep their ids."""

    source: Source
    bytes_per_row: int
    groups: GroupKind = ""

    @classmethod
    def open(cls, uri: str, columns: ColumnsConfig, limit: int) -> ParquetInput:
        """Return the dataset at `uri`; raises `DataError` as `Source.open` does."""
        source = Source.open(uri, columns, limit)
        groups = group_kind(source) if columns.group else ""
        return cls(source, int(source.row_bytes) + 1, groups)

    @property
    def identity(self) -> dict[str, object]:
        """The fingerprint of the dataset; of names of files also what their cut into shards is by.

        The fingerprint says which rows there are, and a list is read in slices of row groups.
        """
        identity: dict[str, object] = {"kind": "parquet", "fingerprint": self.source.fingerprint}
        if self.source.names_files:
            identity["slices"] = len(self.source.row_groups)
            identity["bytes_per_row"] = self.bytes_per_row
        return identity | ({"group": self.source.columns.group} if self.groups else {})

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

        A shuffle of single rows would have every shard read every file. Of groups of images all
        are shuffled, and a shard holds them whole.
        """
        if self.groups:
            return self._parts_of_groups(rows_per_shard, seed)
        rng = np.random.default_rng(seed)
        groups = [self.source.row_groups[g] for g in rng.permutation(len(self.source.row_groups))]
        rows = np.concatenate([g.first_row + np.arange(g.num_rows, dtype=np.int64) for g in groups])
        pieces = cut(rows, self._rows_of_a_shard(rows_per_shard))
        return [ParquetTask(self.source, rng.permutation(piece)) for piece in pieces]

    def _parts_of_groups(self, rows_per_shard: int, seed: int) -> list[ShardTask]:
        names = group_column(self.source)
        order, groups = grouped_order(names, seed)
        check_group_sizes(groups)
        runs = cut_between_groups(groups, self._rows_of_a_shard(rows_per_shard))
        pieces = [order[first:last] for first, last in runs]
        whole = one_array(names)
        return [ParquetTask(self.source, rows, whole.take(rows).to_pylist()) for rows in pieces]

    def _rows_of_a_shard(self, most: int) -> int:
        return max(min(most, MAX_SHARD_BYTES // self.bytes_per_row), 1)


@dataclass(frozen=True)
class ParquetTask:
    """Some rows of a parquet dataset, and the group of each where there are groups."""

    source: Source
    rows: Int64s
    groups: list[int | str | None] | None = None

    def read(self) -> Iterator[Item]:
        """Yield the rows with the bytes as they are."""
        got = self.source.read_rows(self.rows)
        labels = got.labels if got.labels is not None else np.full(len(self.rows), NO_LABEL)
        paths = got.paths or [None] * len(self.rows)
        numbers = (column.tolist() for column in (self.rows, got.ids, labels))
        groups = self.groups or [None] * len(self.rows)
        for row, key, label, image, path, group in zip(
            *numbers, got.images, paths, groups, strict=True
        ):
            yield Item(key, path or f"row {row}", image, label, path or "", group)


def open_input(
    kind_or_path: str,
    *,
    columns: ColumnsConfig | None = None,
    split: str | None = None,
    root: str | None = None,
    num_images: int = 0,
    size: int | None = None,
    seed: int = 0,
    labels: FolderLabels | None = None,
    groups: FolderGroups | None = None,
) -> Input:
    """Return what `kind_or_path` names: `shapes`, an existing path or URI, or torchvision's name.

    What is None is not given. Where images lie beside parquet, `labels` or `groups` say that they
    are meant.

    Args:
        kind_or_path: See `prepare`.
        columns: See `prepare`, as all that follow.
        split: Which of several.
        root: Where torchvision keeps its files.
        num_images: The first only; 0: all.
        size: Of `shapes`.
        seed: Of `shapes`.
        labels: Of a folder of images.
        groups: Of a folder of images.

    Raises:
        ConfigError: an option is given that this input does not take.
        DataError: it names nothing, or what it names cannot be read.
    """
    usual, columns = PreparationConfig(), columns or ColumnsConfig()
    options: dict[str, object] = {
        "size": size, "labels": labels, "groups": groups, "split": split, "download_folder": root,
        "columns": columns if columns.model_fields_set else None,
    }  # fmt: skip
    check_taken = functools.partial(_check_taken, options)
    if kind_or_path == "shapes":
        check_taken("size", of="`shapes`")
        return ShapesInput(num_images or 20_000, size or usual.size, seed)
    path = Path(kind_or_path).expanduser()
    is_path = path.exists() or ("#" in path.name and Path(str(path).rpartition("#")[0]).exists())
    if "://" in kind_or_path or "{" in kind_or_path or is_path:
        place, named = _place_and_split(kind_or_path, split or "")
        if arrow := find_arrow(place, named):
            check_taken("columns", "split", of="a folder of `datasets`")
            return ArrowInput.open(place, arrow, columns, num_images)
        if tars := find_tars(place, named):
            check_taken("columns", "split", of="tar shards")
            return TarInput.open(place, tars, columns, num_images, named)
        if _is_parquet(place, images_meant=bool(labels or groups)):
            check_taken("columns", "split", of="parquet")
            uri = f"{place.rstrip('/')}#{named}" if named else place
            return ParquetInput.open(uri, columns, num_images)
        check_taken("labels", "groups", "split", of="a folder of images")
        return FolderInput.open(
            place, num_images, labels or usual.labels, groups or usual.groups, named
        )
    is_name = kind_or_path.replace("_", "").isalnum()  # seconds to import, for a name alone
    datasets = torchvision_names() if is_name else {}
    if kind_or_path.lower() in datasets:
        check_taken("split", "download_folder", of="a torchvision dataset")
        return TorchvisionInput.open(
            datasets[kind_or_path.lower()], split or "train", root or "", num_images
        )
    hint = nearest(kind_or_path.lower(), ["shapes", *datasets])
    raise DataError(
        f"{kind_or_path}: no such file or folder, and no dataset of that name{hint}; "
        "give a folder of images, parquet, tar shards, `shapes`, or a torchvision dataset"
    )


def _is_parquet(place: str, *, images_meant: bool) -> bool:
    """Return whether a path is read as parquet; not where images beside it are meant."""
    fs, root = filesystem(place)
    listing = all_parquet(fs, root, place)
    return bool(listing.files) and not (images_meant and images_among(fs, listing.others))


def groups_of_input(images: Input) -> GroupKind:
    """Return how an input names its groups of images; empty: it has none."""
    return images.groups if isinstance(images, ParquetInput | FolderInput) else ""


def _place_and_split(kind_or_path: str, split: str) -> tuple[str, str]:
    """Return PATH and the split of `PATH#SPLIT`, or of the option.

    Raises:
        ConfigError: Both name one, and not the same.
    """
    if "://" in kind_or_path and "{" in kind_or_path:  # of tar shards
        return kind_or_path, split
    named = part_split(*filesystem(kind_or_path))[1]
    if not named:
        return kind_or_path, split
    if split not in ("", named):
        problem = f"got {split!r}, and {kind_or_path} names {named}"
        raise ConfigError.of("split", problem)
    return kind_or_path.rpartition("#")[0], named


def _check_taken(options: Mapping[str, object], *taken: str, of: str) -> None:
    """Raise `ConfigError` for each option that has no meaning for an input; None is not given."""
    issues = [
        ConfigIssue(key, f"got {value!r}; {of} takes {' and '.join(taken)}, and not this")
        for key, value in options.items()
        if key not in taken and value not in (None, "")
    ]
    if issues:
        raise ConfigError(issues)
