"""What one tar shard of WebDataset holds: which members are images, where they lie, their labels.

A sample is the members of one key: the name up to the first dot behind the last slash. Nothing is
ever extracted: members are read from the stream, at most their first bytes where these must tell
whether it is an image. Python's `tarfile` does this; the package `webdataset` is not used, since
its readers hand out whole samples, pass over what they do not know without a word, take a broken
header for the end, and say neither where a member lies nor how large it is.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, NamedTuple, cast

import pyarrow as pa

from simclr_ray.augment.decode import FIRST_BYTES, format_of, missing_decoder
from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.data.left_out import LeftOut
from simclr_ray.data.listing import IMAGE_SUFFIXES
from simclr_ray.errors import DataError, one_line
from simclr_ray.storage.filesystem import filesystem, is_local

TarLabel = int | str
# One request to a bucket; seeks over members that are smaller stay within it.
LOCAL_BUFFER, REMOTE_BUFFER = 2**16, 4 * 2**20
MAX_JSON_BYTES = 16 * 2**20
MAX_CLS_BYTES = 4096
GZIP = b"\x1f\x8b"
# `tarfile` passes on what int() says of a header; UnicodeError is a ValueError too
BROKEN = (tarfile.TarError, EOFError, OSError, zlib.error, pa.ArrowException, ValueError)
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


class TarRow(NamedTuple):
    """An image of a shard: its member's name, where its bytes lie in the tar, how many.

    `labels` are the values of the sample by place in `label_keys`; None where it has none.
    """

    name: str
    offset: int
    size: int
    labels: tuple[TarLabel | None, ...]


@dataclass
class TarIndex:
    """The images of one shard in the order of its members, and what else it holds, by reason."""

    rows: list[TarRow] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    has_end: bool = True
    num_crowded: int = 0  # samples with several images
    is_packed: bool = False  # by gzip: members have places in what is unpacked alone


class _Member(NamedTuple):
    name: str
    offset: int
    size: int
    is_image: bool
    labels: tuple[TarLabel | None, ...] = ()


def label_keys(columns: ColumnsConfig) -> tuple[str, ...]:
    """Return where labels may stand, first choice first: `cls`, or a key of `.json`."""
    if not columns.label:
        return ()
    if columns.label == ColumnsConfig().label:
        return ("cls", "label", "class")
    return (columns.label.removeprefix("json."),)


@contextmanager
def open_tar(base: str, path: str) -> Iterator[IO[bytes]]:
    """Give the bytes of a tar, which gzip may have packed; seeking forward is what is cheap.

    Args:
        base: Path or URI that names the file system.
        path: On it.
    """
    fs, _ = filesystem(base)
    size = LOCAL_BUFFER if is_local(fs) else REMOTE_BUFFER
    with fs.open_input_file(path) as raw, io.BufferedReader(raw, size) as stream:
        if stream.peek(2)[:2] != GZIP:
            yield stream
            return
        with gzip.GzipFile(fileobj=stream) as unpacked:
            yield cast("IO[bytes]", unpacked)


def read_index(base: str, path: str, shard: str, columns: ColumnsConfig) -> TarIndex:
    """Return what a shard holds. It is read from begin to end, once; little is held of it.

    Args:
        base: Path or URI that names the file system.
        path: Of the shard on it.
        shard: What the shard is called in messages.
        columns: `image`: ending of the images to take; all by default. `label`: see `label_keys`.

    Raises:
        DataError: The tar is broken or cannot be read, or a name stands for several samples.
    """
    index, members, last = TarIndex(), [], ""
    try:
        with (
            open_tar(base, path) as stream,
            # Zeros within are no end, so that tars put together are read to the last.
            tarfile.open(
                fileobj=stream, mode="r:", tarinfo=_Header, ignore_zeros=True, encoding="utf-8"
            ) as tar,
        ):
            index.is_packed = isinstance(stream, gzip.GzipFile)
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else all headers are held
                last = member.name
                members += _read_member(tar, member, columns, index.left_out)
            index.has_end = getattr(tar, "end_seen", False)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except BROKEN as error:
        after = f" after member {last!r}" if last else ""
        raise DataError(f"{path} is broken{after}: {one_line(error)}") from error
    for sample in _samples(members, shard):
        _add_rows(sample, len(label_keys(columns)), index)
    index.rows.sort(key=lambda row: row.offset)
    return index


class _Header(tarfile.TarInfo):
    """A header that is believed or an error: `tarfile` takes a broken one for the end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _Header:
        try:
            member = super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            kind = type(error).__name__
            if kind not in ("EOFHeaderError", "EmptyHeaderError"):
                raise tarfile.ReadError(str(error)) from error
            if kind == "EOFHeaderError":
                tarfile_.end_seen = True  # type: ignore[attr-defined]  # a note of ours
            raise
        tarfile_.end_seen = False  # type: ignore[attr-defined] # as above
        return member


def _read_member(
    tar: tarfile.TarFile, member: tarfile.TarInfo, columns: ColumnsConfig, left_out: LeftOut
) -> list[_Member]:
    """Return the member if it is an image, or may hold labels; else count it, by reason."""
    if member.isdir():
        return []
    name = PurePosixPath(member.name).as_posix()  # without ./
    if reason := _why_not(member, name):
        left_out.add(reason, name)
        return []
    ending = _key_and_ending(name)[1]
    keys, suffix = label_keys(columns), PurePosixPath(name).suffix.lower()
    if (ending == "cls" and "cls" in keys) or (ending == "json" and set(keys) - {"cls"}):
        labels, problem = _labels_of(tar, member, ending, keys)
        if problem:
            left_out.add(problem, name)
        return [_Member(name, member.offset_data, member.size, is_image=False, labels=labels)]
    if suffix not in IMAGE_SUFFIXES and (reason := _why_no_image(tar, member, suffix)):
        left_out.add(reason, name)
        return []
    wanted = columns.image.lower().lstrip(".")
    if columns.image != ColumnsConfig().image and ending != wanted:
        left_out.add(f".{ending} (columns.image={columns.image})", name)
        return []
    return [_Member(name, member.offset_data, member.size, is_image=True)]


def _why_not(member: tarfile.TarInfo, name: str) -> str:
    """Return why a member is not looked at; nothing where it is."""
    if member.issym() or member.islnk():
        return "links"
    if not member.isreg() or member.issparse():
        return "no regular files"
    try:
        name.encode()
    except UnicodeEncodeError:  # a surrogate stands for a byte of another encoding
        return "with names that are not UTF-8"
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        return "with names that lead out of the shard"
    return "hidden" if any(part.startswith(".") for part in parts) else ""


def _why_no_image(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> str:
    first = _content(tar, member, FIRST_BYTES)
    kind = format_of(first)
    if kind is not None:
        missing = missing_decoder(kind)
        return f"{suffix or kind.name} ({missing})" if missing else ""
    return (suffix or "without an ending") if first else "empty"


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes:
    file = tar.extractfile(member)
    return file.read(most) if file is not None else b""


def _labels_of(
    tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str, keys: Sequence[str]
) -> tuple[tuple[TarLabel | None, ...], str]:
    """Return the labels that a member says, by place in `keys`, and what is wrong with it."""
    nothing: tuple[TarLabel | None, ...] = (None,) * len(keys)
    if member.size > (MAX_CLS_BYTES if ending == "cls" else MAX_JSON_BYTES):
        return nothing, f".{ending} too large for labels"
    content = _content(tar, member, member.size)
    try:
        text = content.decode("utf-8-sig").strip()
        tree = {"cls": text} if ending == "cls" else json.loads(text)
    except (ValueError, RecursionError):
        return nothing, f".{ending} that cannot be read"
    if not isinstance(tree, dict):
        return nothing, f".{ending} that cannot be read"
    if ending == "json":
        tree.pop("cls", None)  # the key of the other file
    labels = tuple(_label(tree.get(key)) for key in keys)
    wrong = [k for k, v in zip(keys, labels, strict=True) if v is None and tree.get(k) is not None]
    return labels, f".{ending} whose {wrong[0]} is no label" if wrong else ""


def _label(value: object) -> TarLabel | None:
    """Return a number as such, text as text; None for what is neither."""
    if isinstance(value, bool | int):
        return int(value) if abs(value) < 2**63 else str(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**53 else None
    if not isinstance(value, str) or not value.strip():
        return None
    value = value.strip()
    return int(value) if _INTEGER.fullmatch(value) else value


def _key_and_ending(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    key, _, ending = base.partition(".")
    return f"{folder}{slash}{key}", ending.lower()


def _samples(members: Sequence[_Member], shard: str) -> Iterator[list[_Member]]:
    """Yield the members of each sample.

    Members of one key that follow each other are a sample, as in WebDataset. Where they lie apart
    they are one sample, unless names repeat: then each run is, if all have the same endings.
    """
    runs: dict[str, list[list[_Member]]] = {}
    before = None
    for member in members:
        key = _key_and_ending(member.name)[0]
        if key != before:
            runs.setdefault(key, []).append([])
        runs[key][-1].append(member)
        before = key
    for key, of_key in runs.items():
        together = [member for run in of_key for member in run]
        names = {member.name for member in together}
        if len(names) == len(together):
            yield together
            continue
        endings = {tuple(sorted(member.name for member in run)) for run in of_key}
        if len(endings) > 1 or len(set(next(iter(endings)))) < len(of_key[0]):
            raise DataError(
                f"{shard}: names of sample {key!r} occur more than once, and which belong "
                "together is not known"
            )
        yield from of_key


def _add_rows(sample: Sequence[_Member], num_keys: int, index: TarIndex) -> None:
    """Add the images of a sample, each with the labels of the sample."""
    images = [member for member in sample if member.is_image]
    sidecars = [member for member in sample if not member.is_image]
    if not images:
        for member in sidecars:
            index.left_out.add("labels without an image", member.name)
        return
    index.num_crowded += len(images) > 1
    by_key = [
        [m.labels[at] for m in sidecars if m.labels[at] is not None] for at in range(num_keys)
    ]
    labels = tuple(values[0] if values else None for values in by_key)
    index.rows += [TarRow(m.name, m.offset, m.size, labels) for m in images]
