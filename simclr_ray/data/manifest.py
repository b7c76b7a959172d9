"""The manifest of a prepared folder: what it holds, and of which input and settings it was made."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow.fs as pafs

from simclr_ray.data.footer import MANIFEST
from simclr_ray.data.shards import SCHEMA_VERSION, Rejected, SizeRange
from simclr_ray.errors import one_line

log = logging.getLogger(__name__)


class GroupSizes(NamedTuple):
    """How many groups of images there are, and the least and most images of one."""

    number: int
    least: int
    most: int


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds; `_manifest.json`.

    `has_index`: ids are distinct, and stand with the labels in `_labels.parquet`. `sizes` are None
    where shards do not say them; `groups` where images are not in groups.
    """

    schema_version: int
    num_rows: int
    num_shards: int
    fingerprint: str
    class_names: tuple[str, ...]
    rejected: tuple[Rejected, ...]
    input: dict[str, object]
    plan: str
    has_index: bool
    libraries: dict[str, str]
    sizes: SizeRange | None = None
    groups: GroupSizes | None = None


def read_manifest(fs: pafs.FileSystem, folder: str, plan: str) -> Manifest | None:
    """Return the manifest, if it is of this version and plan; one that is broken is none."""
    path = f"{folder}/{MANIFEST}"
    if fs.get_file_info(path).type != pafs.FileType.File:
        return None
    with fs.open_input_file(path) as stream:
        text = stream.read()
    try:
        return _manifest_in(json.loads(text), plan)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("%s cannot be read, and is made anew: %s", path, one_line(error))
        return None


def _manifest_in(tree: Any, plan: str) -> Manifest | None:
    """Return the manifest in a tree; any of several errors where a part of it is something else."""
    if tree["schema_version"] != SCHEMA_VERSION or tree["plan"] != plan:
        return None
    made = Manifest(
        **tree
        | {
            "class_names": tuple(tree["class_names"]),
            "rejected": tuple(Rejected(**row) for row in tree["rejected"]),
            "sizes": SizeRange(*tree["sizes"]) if tree.get("sizes") else None,
            "groups": GroupSizes(**tree["groups"]) if tree.get("groups") else None,
        }
    )
    numbers = [made.num_rows, made.num_shards, *(made.sizes or ()), *(made.groups or ())]
    texts = [made.fingerprint, *made.class_names, *(r.name + r.reason for r in made.rejected)]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{numbers} are no counts")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("it has something else for a text")
    return made
