"""The parquet file that embeddings are written to, and what lies beside it until it is whole.

While it is made there is a folder OUT.parts-DIGEST with a file a piece of the rows, each whole or
not there; DIGEST is of the encoder, the images and the settings. At the end the pieces become OUT,
one after the other, and the folder goes. What another command with the same OUT has left beside
it, pieces and lists of images, stays unless OUT is overwritten.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from simclr_ray.config.wording import counted
from simclr_ray.data.arrays import Int64s
from simclr_ray.errors import DataError, StorageError, one_line
from simclr_ray.storage.filesystem import (
    address_below,
    entries_in,
    filesystem,
    info_of,
    is_local,
    make_parent,
    open_large,
    open_whole,
    remove_file,
    split_address,
)
from simclr_ray.storage.space import writing

# Keys of a file's metadata: its digest; which encoder made it, of which images.
IDENTITY: Final = b"simclr_ray.embeddings"
ORIGIN: Final = b"simclr_ray.origin"
PARTS: Final = ".parts-"  # between the name of a file and the digest of its pieces
EMBEDDING, ERROR = "embedding", "error"
FIRST_BAD: Final = 5

log = logging.getLogger(__name__)


class EmbedSummary(NamedTuple):
    """What was written.

    Attributes:
        num_rows: Rows of the file, bad ones included.
        num_bad: Of them without an embedding.
        first_bad: Path or id, and reason, of some of those.
    """

    num_rows: int
    num_bad: int
    first_bad: list[tuple[str, str]]


class Origin(NamedTuple):
    """Which encoder made the embeddings of a file, and of which images.

    Attributes:
        encoder: Where it was, as `load_encoder` takes it; of a registered model its version.
        weights: Their digest.
        images: Where they are, without passwords; empty: files that were named one by one.
        folder: That relative paths of such files are below.
        fingerprint: Of the images, unless they are files that were named one by one.
        columns: Tree of a `ColumnsConfig`, which columns of parquet hold what.
        decoder: Fields of an `ImageDecoder`, how they were decoded.
        classes: Column of numbers that was handed on -> the names of the classes 0, 1, ...
    """

    encoder: str = ""
    weights: str = ""
    images: str = ""
    folder: str = ""
    fingerprint: str = ""
    columns: Mapping[str, Any] = {}
    decoder: Sequence[Any] = ()
    classes: Mapping[str, Sequence[str]] = {}

    @classmethod
    def read(cls, metadata: Mapping[bytes, bytes] | None) -> Origin:
        """Return the origin in a file's metadata; an empty one if an earlier release wrote it."""
        try:
            tree = json.loads((metadata or {}).get(ORIGIN, b"{}"))
            values = (tuple(v) if isinstance(v, list) else v for v in tree.pop("decoder", ()))
            return cls(**tree, decoder=tuple(values))
        except (ValueError, TypeError, AttributeError):
            return cls()

    def as_metadata(self) -> dict[bytes, bytes]:
        """Return what `read` reads."""
        return {ORIGIN: json.dumps(self._asdict()).encode()}


class EmbeddingFile:
    """A file of embeddings, local or in a bucket.

    Args:
        uri: Of the file.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.fs, self.path = filesystem(uri)

    @property
    def lists(self) -> str:
        """Hidden folder beside the file for the list of images that are no parquet."""
        folder, name = split_address(self.uri)
        return address_below(folder, f".{name}.list")

    def digest(self, *, overwrite: bool) -> str:
        """Return the digest that the file was written with; "": there is none, or it may go.

        Raises:
            DataError: It is a folder, or holds something else that is not to be overwritten.
        """
        kind = info_of(self.fs, self.path).type
        if kind == pafs.FileType.NotFound:
            return ""
        if kind == pafs.FileType.Directory:
            raise DataError(f"{self.uri} is a folder; embeddings are written to a file")
        stored = digest_of(self.fs, self.path)
        if not stored and not overwrite:
            raise self.taken("other data")
        return stored

    def taken(self, what: str) -> DataError:
        """Return the error that something else is there."""
        remedy = "choose another file, or start over (--overwrite)"
        return DataError(f"{self.uri} holds {what}; {remedy}")

    @contextmanager
    def place(self) -> Iterator[None]:
        """Make its folder; where the block fails, what it has made beside the file goes again."""
        folders = [] if not is_local(self.fs) else [*Path(self.path).parents]
        missing = [folder for folder in folders if not folder.exists()]
        make_parent(self.uri)
        before = self.listed()
        try:
            yield
        except BaseException:
            for path in self.listed() - before:
                remove_file(self.fs, path)
            self.remove_empty_lists()
            for folder in missing:  # the innermost first; what holds pieces stays
                with suppress(OSError):
                    folder.rmdir()
            raise

    def listed(self) -> set[str]:
        """Return the paths of the lists of images beside the file."""
        return {info.path for info in entries_in(self.fs, filesystem(self.lists)[1])}

    def remove_empty_lists(self) -> None:
        """Remove the folder of lists where none is in it."""
        folder = filesystem(self.lists)[1]
        if not self.listed() and info_of(self.fs, folder).type == pafs.FileType.Directory:
            self.fs.delete_dir(folder)

    def parts(self, digest: str, images: str = "", *, overwrite: bool = False) -> Parts:
        """Return the pieces of a digest.

        Args:
            digest: Of the encoder, the images and the settings.
            images: Path or URI that the images are read by, which may be a list beside the file.
            overwrite: What others have left beside the file goes at the end as well.
        """
        # by both names: of a link the images' path has its target
        own = filesystem(images)[1].rsplit("/", 2)[1:] if images else []
        lists = {path for path in self.listed() if path.rsplit("/", 2)[1:] == own}
        return Parts(self, f"{self.path}{PARTS}{digest}", lists, overwrite=overwrite)

    def write(self, parts: Parts, rows: Sequence[Int64s], digest: str, origin: Origin) -> None:
        """Write the file of its pieces, one in memory at a time, and remove those.

        Raises:
            DataError: It cannot be written.
            StorageError: The disk takes no more.
        """
        with self.written(), open_large(self.fs, self.path) as file:
            writer = None
            for piece in rows:
                table = parts.read(piece)
                if writer is None:
                    about = (table.schema.metadata or {}) | {IDENTITY: digest.encode()}
                    about |= origin.as_metadata()
                    writer = pq.ParquetWriter(file, table.schema.with_metadata(about))
                writer.write_table(table.replace_schema_metadata(writer.schema.metadata))
            assert writer is not None  # a dataset has rows
            writer.close()
        parts.clear()

    def pieces(self) -> list[str]:
        """Return the paths of the folders with pieces, of all digests."""
        folder, _, name = self.path.rpartition("/")
        start = f"{name}{PARTS}"
        return [i.path for i in entries_in(self.fs, folder) if i.base_name.startswith(start)]

    def summary(self) -> EmbedSummary:
        """Return what the finished file holds."""
        with self.fs.open_input_file(self.path) as file:
            stored = pq.ParquetFile(file)
            name = stored.schema_arrow.names[0]
            bad: list[tuple[str, str]] = []
            num_bad = 0
            for batch in stored.iter_batches(columns=[name, ERROR]):
                reasons = batch.column(1)
                num_bad += len(reasons) - reasons.null_count
                if len(bad) < FIRST_BAD and len(reasons) > reasons.null_count:
                    pairs = zip(batch.column(0).to_pylist(), reasons.to_pylist(), strict=True)
                    bad += [(str(key), reason) for key, reason in pairs if reason is not None]
            return EmbedSummary(stored.metadata.num_rows, num_bad, bad[:FIRST_BAD])

    @contextmanager
    def written(self) -> Iterator[None]:
        """Say of an error of the block, in one line, that the file cannot be written."""
        try:
            with writing(self.uri):
                yield
        except StorageError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.uri} cannot be written: {one_line(error)}") from error


class Parts:
    """The pieces of a file of embeddings that are done.

    Args:
        file: What they become.
        path: Of their folder.
        lists: Paths of the lists of images that go with them.
        overwrite: Once the file is whole, those of others go with them as well.
    """

    def __init__(
        self,
        file: EmbeddingFile,
        path: str,
        lists: Collection[str] = (),
        *,
        overwrite: bool = False,
    ) -> None:
        self.file, self.fs, self.path = file, file.fs, path
        self.lists, self.overwrite = lists, overwrite

    def clear(self, *, is_whole: bool = True) -> None:
        """Remove what is no longer needed, and say what others have left.

        Args:
            is_whole: The file is written; else nothing of others is overwritten.
        """
        all_go = self.overwrite and is_whole
        for path in self.file.pieces():
            if path == self.path or all_go:
                self.fs.delete_dir(path)
        if not self.file.pieces():  # which may be of the same images, and read by the same list
            for path in self.file.listed() if all_go else self.lists:
                remove_file(self.fs, path)
        self.file.remove_empty_lists()
        left = sorted({*self.file.pieces(), *self.file.listed()})
        if left:
            names = ", ".join(path.rpartition("/")[2] for path in left)
            remedy = "--overwrite removes what is not needed"
            log.info("of other models, images or settings stay: %s (%s)", names, remedy)

    def missing(self, rows: Sequence[Int64s]) -> list[int]:
        """Return which pieces are not there, of those of given rows; say which are there for none.

        Another release may have cut or named them otherwise, and what it did is done again.
        """
        there = {info.base_name for info in entries_in(self.fs, self.path)}
        names = [_name(piece) for piece in rows]
        missing = [index for index, name in enumerate(names) if name not in there]
        unused = [name for name in there.difference(names) if not name.startswith(".")]
        if missing and unused:
            pieces = counted(len(unused), "finished piece")
            log.warning("%s: %s of another release cannot be used; made again", self.path, pieces)
        return missing

    def make(self) -> None:
        """Make the folder, and see that it can be written to before there is work to be lost."""
        with self.file.written():
            self.fs.create_dir(self.path, recursive=True)
            probe = f"{self.path}/.probe"
            with self.fs.open_output_stream(probe) as stream:
                stream.write(b"-")
            self.fs.delete_file(probe)

    def put(self, rows: Int64s, table: pa.Table) -> None:
        """Write a piece."""
        with self.file.written(), open_whole(self.fs, f"{self.path}/{_name(rows)}") as file:
            pq.write_table(table, file)

    def read(self, rows: Int64s) -> pa.Table:
        """Return a piece."""
        with self.fs.open_input_file(f"{self.path}/{_name(rows)}") as stored:
            return pq.read_table(stored)


def digest_of(fs: pafs.FileSystem, path: str) -> str:
    """Return the digest of a file of embeddings; "" of any other file."""
    try:
        with fs.open_input_file(path) as file:
            stored: bytes = (pq.read_schema(file).metadata or {}).get(IDENTITY, b"")
            return stored.decode()
    except (OSError, pa.ArrowException, UnicodeError):
        return ""


def are_embeddings(fs: pafs.FileSystem, paths: Sequence[str]) -> bool:
    """Return whether all files are of embeddings, those that are being made included."""
    return all(f".parquet{PARTS}" in path or digest_of(fs, path) for path in paths)


def _name(rows: Int64s) -> str:
    """Return the name of a piece, which says its rows: another release may cut them otherwise."""
    return f"rows-{rows[0]:09d}-{len(rows)}.parquet"
