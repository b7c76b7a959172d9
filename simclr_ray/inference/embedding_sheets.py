"""What an index says, as sheets of images: neighbours of some, and groups of duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from simclr_ray.augment.decode import shown_as_rgb
from simclr_ray.config.wording import counted
from simclr_ray.data.arrays import Int64s
from simclr_ray.data.contact_sheet import Section, Thumbnail, thumbnail_of, write_sheet
from simclr_ray.inference.embedded_images import EmbeddedImages
from simclr_ray.inference.embedding_index import EmbeddingIndex, Nearest, NearPairs
from simclr_ray.inference.encoder import EvaluationTransform

GROUPS_SHOWN, MEMBERS_SHOWN = 200, 12


def write_neighbours(
    out: str,
    index: EmbeddingIndex,
    queries: Sequence[Path],
    transform: EvaluationTransform,
    nearest: Nearest,
    where: str = "",
) -> None:
    """Write a row a query: its image as the encoder sees it, and its neighbours.

    Args:
        out: As in `write_sheet`.
        index: What was searched.
        queries: Paths of the images.
        transform: Of the encoder.
        nearest: The neighbours of each.
        where: As in `EmbeddedImages`.

    Raises:
        DataError: As in `EmbeddedImages`.
        OSError: The sheet cannot be written.
    """
    rows = []
    with EmbeddedImages(index, where) as images:
        for query, positions, cosines in zip(
            queries, nearest.positions, nearest.cosines, strict=True
        ):
            view = thumbnail_of(shown_as_rgb(transform.view(query)))
            first = Thumbnail(query.name, "query", view)
            notes = [f"{cosine:.3f}" for cosine in cosines]
            rows.append(("", [first, *images.thumbnails(positions.tolist(), notes)]))
    facts = {
        "index": f"{index.uri}, {counted(len(index.names), 'image')}",
        "encoder": index.origin.encoder or "unknown",
        "numbers": "cosines of embeddings",
    }
    write_sheet(out, "Nearest images", [Section("", "", rows)], facts)


def write_groups(
    out: str,
    index: EmbeddingIndex,
    pairs: NearPairs,
    least: float,
    where: str = "",
) -> None:
    """Write a row a group of images that are near each other, the largest first.

    Args:
        out: As in `write_sheet`.
        index: Of the images.
        pairs: What is near.
        least: The cosine from which on that is so.
        where: As in `EmbeddedImages`.

    Raises:
        DataError: As in `EmbeddedImages`.
        OSError: The sheet cannot be written.
    """
    groups = pairs.groups(len(index.names))
    shown = groups[:GROUPS_SHOWN]
    members = [group[:MEMBERS_SHOWN] for group in shown]
    with EmbeddedImages(index, where) as images:
        flat = np.concatenate(members).tolist() if members else []
        thumbnails = dict(zip(flat, images.thumbnails(flat), strict=True))
    rows = [
        (_about(group, pairs), [thumbnails[position] for position in some.tolist()])
        for group, some in zip(shown, members, strict=True)
    ]
    facts = {
        "index": f"{index.uri}, {counted(len(index.names), 'image')}",
        "near": f"a cosine of {least:g} or more",
        "found": f"{counted(len(pairs.cosines), 'pair')} in {counted(len(groups), 'group')}",
    }
    says = f"{len(shown)} of {counted(len(groups), 'group')}, up to {MEMBERS_SHOWN} images of each"
    write_sheet(out, "Near images", [Section("", says, rows)], facts)


def _about(group: Int64s, pairs: NearPairs) -> str:
    inside = pairs.cosines[np.isin(pairs.positions[:, 0], group)]
    return f"{counted(len(group), 'image')}, {inside.min():.3f} to {inside.max():.3f}"
