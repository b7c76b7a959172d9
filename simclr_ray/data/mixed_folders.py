"""Folders in which parquet and images lie together: they say two things, and one is meant.

A list of labels that is written into a folder of photographs would make of it a dataset of the
rows that have one. Nothing is in doubt where the rows name all images by path, or where images are
few beside the rows, as a figure of a dataset's page is.
"""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Collection, Iterator, Sequence
from typing import Final

import pyarrow.fs as pafs

from simclr_ray.config.wording import counted
from simclr_ray.data.files import names_of, target_of
from simclr_ray.data.footer import Footer, names_files
from simclr_ray.data.listing import Listed, below, images_among, part_split
from simclr_ray.data.splits import choose_split_folder
from simclr_ray.data.tables import read_file_column
from simclr_ray.errors import DataError
from simclr_ray.storage.filesystem import address_below

FEW: Final = 0.01  # of the rows: so many images beside them are no dataset


def check_meant(
    fs: pafs.FileSystem, root: str, uri: str, others: Sequence[Listed], footers: Sequence[Footer],
    column: str,
) -> None:  # fmt: skip
    """Refuse parquet beside images where either may be meant.

    Args:
        fs: Where they lie.
        root: Their folder there, or `FOLDER#SPLIT`.
        uri: What messages call it.
        others: Files beside the parquet.
        footers: Of the parquet that would be read.
        column: Of its images.

    Raises:
        DataError: Either may be meant, or a file cannot be read.
    """
    num_rows = sum(sum(footer.group_rows) for footer in footers)
    most = FEW * num_rows
    if len(others) <= most:
        return  # whatever they are: none needs to be opened
    folder, split = part_split(fs, root)
    images = {file.path for file in images_among(fs, others)}
    if split:
        images = _of_split(images, folder, split)
    if len(images) <= most:
        return
    unnamed = images.difference(_places_named(fs, footers, column))
    if len(unnamed) > most:
        place = uri.rpartition("#")[0] if split else uri
        num_named = len(images) - len(unnamed)
        raise DataError(_two_meanings(place, folder, footers, images, num_named))


def _of_split(images: set[str], folder: str, split: str) -> set[str]:
    """Return the images that a split of that name would hold, were there no parquet."""
    names = sorted(below(folder, path) for path in images)
    try:
        chosen = choose_split_folder(names, split, folder)
    except DataError:  # the name says which parquet files are meant, and nothing of images
        return set()
    assert chosen is not None  # a split is asked for
    return {posixpath.join(folder, chosen.folder, name) for name in chosen.names}


def _places_named(fs: pafs.FileSystem, footers: Sequence[Footer], column: str) -> Iterator[str]:
    """Yield where the files lie that rows name."""
    for footer in footers:
        if not names_files(footer, column):
            continue
        for name in filter(None, names_of(read_file_column(fs, footer.path, column))):
            with contextlib.suppress(DataError):  # of another store
                place = target_of(name, fs, footer.path, footer.image_root)[1]
                yield posixpath.normpath(place)


def _two_meanings(
    uri: str, folder: str, footers: Sequence[Footer], images: set[str], num_named: int
) -> str:
    """Return the sentence that either may be meant, with the way to say which."""
    parquet = {footer.path for footer in footers}
    rows = counted(sum(sum(footer.group_rows) for footer in footers), "row")
    naming = f", which name {num_named:,} of them" if num_named else ""
    own = next(iter(parquet)) if len(parquet) == 1 else _folder_apart(parquet, images)
    for_rows = f"give {address_below(uri, below(folder, own))}" if own else "move the images out"
    apart = _folder_apart(images, parquet)
    out = "move the parquet out"
    for_images = f"give {address_below(uri, below(folder, apart))}" if apart else out
    return (
        f"{uri} holds {counted(len(images), 'image')} beside "
        f"{counted(len(parquet), 'parquet file')} of {rows}{naming}: for the rows {for_rows}; "
        f"for the images {for_images}, or `simclr-ray prepare {uri} OUT labels=auto`"
    )


def _folder_apart(paths: Collection[str], others: Collection[str]) -> str:
    """Return the folder that all of some files lie in, and none of others; empty: there is none."""
    folder = posixpath.commonpath([posixpath.dirname(path) for path in paths])
    return "" if any(path.startswith(f"{folder}/") for path in others) else folder
