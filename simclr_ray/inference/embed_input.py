"""What is to be embedded: a dataset, a folder or files, as rows, refused before anything starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow.fs as pafs

from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.data.files import states_of_files
from simclr_ray.data.folder_input import index_files, index_folder
from simclr_ray.data.listing import all_parquet
from simclr_ray.data.source import Source
from simclr_ray.errors import ConfigError, ConfigIssue, DataError
from simclr_ray.evaluation.feature_columns import ERROR, ID, PATH, ROW
from simclr_ray.inference.embedding_file import EMBEDDING, EmbeddingFile, are_embeddings
from simclr_ray.storage.filesystem import filesystem, info_of


def open_rows(
    where: str | Sequence[str], file: EmbeddingFile, columns: ColumnsConfig | None = None
) -> Source:
    """Return the images of a dataset, of a folder, or of files, as rows.

    Of what is no parquet a list is written beside the file, where all nodes see it. Files of
    embeddings among images are not in the way.

    Raises:
        DataError: There are none, or they cannot be read, or the file is to lie among parquet.
    """
    if not isinstance(where, str):
        return Source.open(index_files(where, file.lists), columns)
    fs, root = filesystem(where)
    if info_of(fs, root).type == pafs.FileType.Directory:
        paths = [listed.path for listed in all_parquet(fs, root, where).files]
        if are_embeddings(fs, paths):
            return Source.open(index_folder(where, file.lists), columns)
        if fs.equals(file.fs) and file.path.startswith(f"{root.rstrip('/')}/"):
            raise DataError(f"{file.uri} lies in the dataset {where}; write it beside that")
    source = Source.open(where, columns)
    if fs.equals(file.fs) and file.path in source.files:
        raise DataError(f"{file.uri} holds the images themselves; choose another file")
    return source


def check_columns(source: Source, keep: Sequence[str]) -> None:
    """Raise `ConfigError` for columns that cannot be handed on."""
    if not keep:
        return
    schemas = [source.schema_of(file) for file in range(len(source.files))]
    names, taken = schemas[0].names, {key_of(source), EMBEDDING, ERROR}
    issues = []
    for name in keep:
        if name in taken:
            problem = "is written anyway, or would take the place of one that is"
            issues.append(ConfigIssue("--keep", f"{name!r} {problem}"))
        elif name not in names:
            problem = f"there is no column {name!r}; the columns: {', '.join(names)}"
            issues.append(ConfigIssue("--keep", problem))
        else:
            kinds = [
                schema.field(name).type if name in schema.names else None for schema in schemas
            ]
            other = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), 0)
            if other:
                problem = (
                    f"{name!r} is {kinds[0]} in {source.files[0]}, and in {source.files[other]}"
                )
                issues.append(ConfigIssue("--keep", f"{problem} {kinds[other] or 'not there'}"))
    if issues:
        raise ConfigError(issues)


def key_of(source: Source) -> str:
    """Return the column that says which image a row is."""
    if source.has_paths:
        return PATH
    return ID if source.has_ids else ROW


def states_of_images(source: Source) -> Iterator[str]:
    """Yield place and state of each image that is a file of its own: a list says only its name."""
    fs, _ = filesystem(source.uri)
    name = source.columns.image
    if not source.names_files:
        return
    for column, group in zip(source.read_columns(name), source.row_groups, strict=True):
        yield from states_of_files(column, fs, source.files[group.file], source.image_root)
