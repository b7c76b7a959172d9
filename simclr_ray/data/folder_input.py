"""A folder of image files: as an input of `prepare`, and as parquet that names the files."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from simclr_ray.config.sections.data import FolderGroups, FolderLabels
from simclr_ray.config.uris import hide_passwords
from simclr_ray.config.wording import counted
from simclr_ray.data.arrays import Int64s
from simclr_ray.data.classes import NO_LABEL
from simclr_ray.data.columns import PATH_COLUMN
from simclr_ray.data.contents import Piece, evenly, sample_digest
from simclr_ray.data.files import read_file
from simclr_ray.data.footer import IMAGE_BYTES, IMAGE_LISTING, IMAGE_ROOT
from simclr_ray.data.grouping import cut_between_groups, grouped_order
from simclr_ray.data.items import Item, ShardTask, cut, shuffled
from simclr_ray.data.listing import Listing, list_images, part_split
from simclr_ray.data.shards import check_group_sizes
from simclr_ray.data.slices import GROUP_ROWS
from simclr_ray.data.splits import choose_split_folder, split_folders
from simclr_ray.errors import DataError
from simclr_ray.storage.filesystem import (
    address_below,
    filesystem,
    info_of,
    is_local,
    is_utf8,
    open_whole,
)
from simclr_ray.storage.hub import SCHEME

SAVED = ("dataset_dict.json", "state.json")  # by `datasets`, as `arrow_input` reads it

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderInput:
    """Image files below a folder, by relative name; the first folder of a name is its class."""

    uri: str
    names: tuple[str, ...]
    class_names: tuple[str, ...]
    listing: str
    num_bytes: int  # of all files
    groups: Literal["", "string"] = ""  # those of one folder are a group, of its name

    @classmethod
    def open(
        cls,
        uri: str,
        limit: int = 0,
        labels: FolderLabels = "auto",
        groups: FolderGroups = "none",
        split: str = "",
    ) -> FolderInput:
        """Return the images at any depth below a folder or URI, sorted by name.

        Args:
            uri: Of the folder, or `FOLDER#SPLIT`.
            limit: Keep the first only; 0 keeps all.
            labels: `none`: no image gets a label. `folders`: the first folder of an image's name
                is its class, and an image beside the folders has none. `auto` does as `folders`,
                says what gets no label, and takes folders of splits for what they are.
            groups: `folders`: the images of one folder, not of those in it, are a group of images
                of one thing; one that lies loose is a group of its own.
            split: As in `FOLDER#SPLIT`; empty: the folder is one dataset.

        Raises:
            DataError: There are none, the folder cannot be listed, there are no class folders
                and `labels` asks for them, or there are several splits and none is named.
        """
        fs, root = filesystem(uri)
        root, named = part_split(fs, root)
        uri = uri.rpartition("#")[0] if named else uri
        split = named or split
        if split and info_of(fs, f"{root}/{split}").type == pafs.FileType.Directory:
            uri, root, split = _joined(uri, split), f"{root}/{split}", ""
        listing = list_images(fs, root, uri)
        _say_what_is_there(listing, fs, root, uri)
        if split or labels != "folders":  # a folder that is named may hold splits as any other
            listing, folder = _of_split(listing, root, uri, split, all_of=labels == "none")
            uri, root = _joined(uri, folder), f"{root}/{folder}".rstrip("/")
        size_of = {f.path.removeprefix(root).lstrip("/"): f.size for f in listing.files}
        names = sorted(size_of)
        classes = _class_folders(names, uri, labels)
        names = names[:limit] if limit else names
        sizes = [(name, size_of[name]) for name in names]
        sample = sample_digest([Piece(fs, f"{root}/{name}") for name in evenly(names)])
        identity = repr((sizes, sample))
        digest = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()
        where = root if is_local(fs) else uri
        num_bytes = sum(size for _, size in sizes)
        kind: Literal["", "string"] = "string" if groups == "folders" else ""
        return cls(where, tuple(names), classes, digest, num_bytes, kind)

    @property
    def identity(self) -> dict[str, object]:
        """Names, sizes and a sample of the files; where the folder lies does not matter."""
        groups = {"groups": "folders"} if self.groups else {}
        return {"kind": "folder", "n": self.num_rows, "listing": self.listing} | groups

    @property
    def num_rows(self) -> int:
        """Number of files."""
        return len(self.names)

    def labels(self) -> list[int]:
        """Return the class of each file, -1 where it has none."""
        label_of = {name: label for label, name in enumerate(self.class_names)}
        return [label_of.get(_folder_of(name), NO_LABEL) for name in self.names]

    def parts(self, rows_per_shard: int, seed: int) -> list[ShardTask]:
        """Return the shuffled files, cut."""
        labels = self.labels()
        pieces = cut(shuffled(self.num_rows, seed), rows_per_shard)
        if self.groups:
            folders = [name.rpartition("/")[0] or None for name in self.names]
            order, groups = grouped_order(pa.chunked_array([pa.array(folders, pa.string())]), seed)
            check_group_sizes(groups)
            runs = cut_between_groups(groups, rows_per_shard)
            pieces = [order[first:last] for first, last in runs]
        return [
            FolderTask(
                self.uri,
                rows,
                [self.names[r] for r in rows],
                [labels[r] for r in rows],
                grouped=bool(self.groups),
            )
            for rows in pieces
        ]


def _joined(uri: str, folder: str) -> str:
    """Return the URI of a folder below another."""
    if "://" in uri and not uri.startswith(SCHEME):
        folder = urllib.parse.quote(folder)
    return address_below(uri, folder) if folder else uri


def _say_what_is_there(listing: Listing, fs: pafs.FileSystem, root: str, uri: str) -> None:
    """Log what is left out, or raise `DataError` where nothing else is there."""
    if listing.files:
        listing.say(uri)
        return
    saved = [n for n in SAVED if info_of(fs, f"{root}/{n}").type == pafs.FileType.File]
    if saved:
        split = "#SPLIT" if SAVED[0] in saved else ""
        raise DataError(
            f"{uri} is a folder that `datasets` saved, which is read by "
            f"`simclr-ray prepare {uri}{split} OUT`"
        )
    others = f" ({listing.left_out.line()})" if listing.left_out else ""
    raise DataError(f"{uri} holds neither images nor parquet{others}")


def _of_split(
    listing: Listing, root: str, uri: str, split: str, *, all_of: bool
) -> tuple[Listing, str]:
    """Return the images of a split, and the folder of its classes; all, where there is none.

    Without labels (`all_of`) folders mean nothing, so that all are taken, and said.
    """
    file_of = {file.path.removeprefix(root).lstrip("/"): file for file in listing.files}
    if all_of and not split:
        splits = split_folders(sorted(file_of))
        if len(splits) > 1:
            log.warning("%s: the splits %s are taken together", uri, ", ".join(splits))
        return listing, ""
    hint = "; if they are classes, `prepare` with labels=folders"
    chosen = choose_split_folder(sorted(file_of), split, uri, hint)
    if chosen is None:
        return listing, ""
    if not split:
        log.warning(
            "%s: all images are of the folder %s, whose folders are the classes; if it is a class "
            "itself: `prepare` with labels=folders", uri, chosen.folder,
        )  # fmt: skip
    above = f"{chosen.folder}/" if chosen.folder else ""
    files = [file_of[above + name] for name in chosen.names]
    return listing._replace(files=files), chosen.folder


def _folder_of(name: str) -> str:
    return name.split("/")[0] if "/" in name else ""


def _class_folders(names: Sequence[str], uri: str, labels: FolderLabels) -> tuple[str, ...]:
    """Return the classes of the images, and say which images get none."""
    folders = tuple(sorted({_folder_of(name) for name in names} - {""}))
    loose = [name for name in names if "/" not in name]
    if labels == "none":
        return ()
    if not folders:
        if labels == "folders":
            raise DataError(f"{uri}: labels=folders, but all {len(names)} images lie loose in it")
        return ()
    if loose and labels == "auto":
        lie = "lies" if len(loose) == 1 else "lie"
        log.warning(
            "%s: %s %s beside %s (%s): %s no label; `simclr-ray prepare %s OUT`, with "
            "labels=folders if that is meant, labels=none if no image is to have one",
            uri, counted(len(loose), "image"), lie, counted(len(folders), "class folder"),
            loose[0], "it gets" if len(loose) == 1 else "they get", uri,
        )  # fmt: skip
    return folders


@dataclass(frozen=True)
class FolderTask:
    """Some files of a folder; the id is the place in the sorted listing."""

    uri: str
    rows: Int64s
    names: list[str]
    labels: list[int]
    grouped: bool = False

    def read(self) -> Iterator[Item]:
        """Yield the bytes of each file as they are."""
        fs, root = filesystem(self.uri)
        for row, name, label in zip(self.rows.tolist(), self.names, self.labels, strict=True):
            group = (name.rpartition("/")[0] or None) if self.grouped else None
            yield Item(row, name, read_file((fs, f"{root}/{name}")), label, name, group)


def index_folder(uri: str, out: str) -> str:
    """Return parquet below the folder `out` that names the images of a folder; copies none.

    Its rows have the ids, labels and relative paths that `prepare` would give them. What lies there
    already for the same files is taken.

    Args:
        uri: Of a folder of images.
        out: Folder or URI that all nodes reach, as they reach the images.

    Raises:
        DataError: Same as `FolderInput.open`; or the list cannot be written.
    """
    source = FolderInput.open(uri)
    fs, folder = filesystem(out)
    images, root = filesystem(source.uri)
    if is_local(images) and is_local(fs):  # both may move together; `..` of a link is its target's
        root, folder = os.path.realpath(root), os.path.realpath(folder)
        base = os.path.relpath(root, folder)
    else:
        base = Path(root).as_uri() if is_local(images) else hide_passwords(source.uri)
    listing = hashlib.sha256(json.dumps([source.listing, source.class_names]).encode()).hexdigest()
    labels = np.array(source.labels(), np.int64)
    table = pa.table(
        {
            "id": pa.array(range(source.num_rows), pa.int64()),
            "image": pa.array(source.names, pa.string()),
            "label": pa.array(labels, mask=labels == NO_LABEL),
            PATH_COLUMN: pa.array(source.names, pa.string()),
        }
    )
    about = {IMAGE_ROOT: base, IMAGE_BYTES: str(source.num_bytes), IMAGE_LISTING: listing}
    if source.class_names:
        about["class_names"] = json.dumps(list(source.class_names))
    shown = _write_list(out, root.rpartition("/")[2] or "images", table, about)
    log.info(
        "%s: %s read where they lie, by the list %s", uri, counted(source.num_rows, "image"), shown
    )
    return shown


def index_files(files: Sequence[str], out: str) -> str:
    """Return parquet below the folder `out` that names local files, in their order.

    Args:
        files: Their paths, which become the paths of the rows as they are.
        out: As in `index_folder`.

    Raises:
        DataError: One is not there or no file, or has a name that is not UTF-8; or the list cannot
            be written.
    """
    sizes = []
    for name in files:
        path = Path(name).expanduser()
        if not path.is_file():
            raise DataError(
                f"{name}: {'a folder, not a file' if path.exists() else 'no such file'}"
            )
        if not is_utf8(name):
            raise DataError(f"{name!a}: the name is not UTF-8, as parquet has names")
        sizes.append(path.stat().st_size)
    absolute = [str(Path(name).expanduser().absolute()) for name in files]
    table = pa.table(
        {
            "id": pa.array(range(len(files)), pa.int64()),
            "image": pa.array([name.lstrip("/") for name in absolute], pa.string()),
            PATH_COLUMN: pa.array(list(files), pa.string()),
        }
    )
    sample = sample_digest([Piece(pafs.LocalFileSystem(), path) for path in evenly(absolute)])
    listing = hashlib.sha256(json.dumps([list(files), sizes, sample]).encode()).hexdigest()
    about = {IMAGE_ROOT: "file:///", IMAGE_BYTES: str(sum(sizes)), IMAGE_LISTING: listing}
    return _write_list(out, "files", table, about)


def _write_list(out: str, name: str, table: pa.Table, about: dict[str, str]) -> str:
    """Write a list into the folder `out`, unless it is there, and return its path or URI."""
    fs, folder = filesystem(out)
    identity = json.dumps([about[IMAGE_ROOT], about[IMAGE_LISTING]])
    digest = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:8]
    file = f"{name}-{digest}.parquet"
    path = f"{folder}/{file}"
    shown = path if is_local(fs) else address_below(out, file)
    if fs.get_file_info(path).is_file:
        return shown
    try:
        fs.create_dir(folder, recursive=True)
        with open_whole(fs, path) as stream:
            pq.write_table(table.replace_schema_metadata(about), stream, row_group_size=GROUP_ROWS)
    except OSError as error:
        raise DataError(f"{shown} cannot be written: {error}") from error
    return shown
