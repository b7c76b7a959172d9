"""Verbs that look at a file of embeddings: search, duplicates, map."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from simclr_ray.cli.arguments import TrackingUri
from simclr_ray.cli.console import loading, out, say
from simclr_ray.cli.encoder import files_of, left_out, shown
from simclr_ray.config.wording import counted
from simclr_ray.errors import ConfigError

Index = Annotated[
    str, typer.Argument(metavar="EMBEDDINGS", help="What `embed --out` wrote, by path or URI.")
]
ImagesOption = Annotated[
    str,
    typer.Option(
        "--images", help="Where its images lie now.", show_default="where they were embedded"
    ),
]
Sheet = Annotated[
    str, typer.Option("--out", metavar="SHEET", help="Also as a page, .html, or as .png or .jpg.")
]
MAP_IMAGES = 4000  # half a minute of a core


def search(
    index: Index,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files, or folders.")],
    num: Annotated[int, typer.Option("--num", min=1, help="Neighbours of each.")] = 10,
    sheet: Sheet = "",
    encoder: Annotated[
        str, typer.Option(help="Run or model.", show_default="the one that embedded them")
    ] = "",
    where: ImagesOption = "",
    tracking_uri: TrackingUri = "",
) -> None:
    """Find the images that are nearest to one, by the cosine of their embeddings; exact.

    Printed are, of each neighbour, the image it was found for, the cosine, and its path or id,
    tab-separated. Files that are no images are named on stderr and left out; the exit code is
    then 1, and 2 where all are.

    Example: simclr-ray model search photos.parquet cat.jpg --out neighbours.png
    """
    _check_sheet(sheet)
    images = files_of(images)
    if sheet and Path(sheet).resolve() in {image.resolve() for image in images}:
        raise ConfigError.of("--out", f"{sheet} is an image that is looked for")
    from simclr_ray.inference.embedding_index import EmbeddingIndex, import_faiss

    import_faiss()
    opened = EmbeddingIndex(index)
    loading("torch")
    from simclr_ray.inference.embedding_search import encoder_of

    loaded = encoder_of(opened, encoder, tracking_uri)
    with left_out(images) as leave_out:
        vectors = loaded.embed(images, on_bad=leave_out)
        rows = [row for row, vector in enumerate(vectors) if not math.isnan(vector[0])]
        good = [images[row] for row in rows]
        if not good:
            return
        nearest = opened.nearest(vectors[rows], num)
        for image, positions, cosines in zip(good, nearest.positions, nearest.cosines, strict=True):
            for position, cosine in zip(positions, cosines, strict=True):
                print(shown(image), f"{cosine:.4f}", shown(opened.names[position]), sep="\t")
        if sheet:
            from simclr_ray.inference.embedding_sheets import write_neighbours

            write_neighbours(sheet, opened, good, loaded.transform, nearest, where)
            say(f"sheet  {sheet}")


def duplicates(
    index: Index,
    least: Annotated[
        float, typer.Option("--min-cosine", min=-1.0, max=1.0, help="Cosine from which on.")
    ] = 0.98,
    sheet: Sheet = "",
    where: ImagesOption = "",
) -> None:
    """Find pairs of images whose embeddings are nearly the same; exact.

    Printed are the cosine and both paths or ids, tab-separated, the nearest first. Other images of
    one scene are near as well: `inspect --full` compares pixels.

    Example: simclr-ray model duplicates photos.parquet --min-cosine 0.99 --out duplicates.html
    """
    _check_sheet(sheet)
    from simclr_ray.cli.progress import CountProgress
    from simclr_ray.inference.embedding_index import EmbeddingIndex
    from simclr_ray.inference.embedding_sheets import write_groups

    opened = EmbeddingIndex(index)
    with CountProgress(index, "images") as progress:
        pairs = opened.pairs(least, progress)
    for (first, second), cosine in zip(pairs.positions, pairs.cosines, strict=True):
        names = (shown(opened.names[first]), shown(opened.names[second]))
        print(f"{cosine:.4f}", *names, sep="\t")
    groups = counted(len(pairs.groups(len(opened.names))), "group")
    images = counted(len(opened.names), "image")
    say(f"{counted(len(pairs.cosines), 'pair')} in {groups}, of {images}")
    if sheet:
        write_groups(sheet, opened, pairs, least, where)
        say(f"sheet  {sheet}")


def draw_map(
    index: Index,
    page: Annotated[str, typer.Argument(metavar="PAGE", help="An .html file, by path or URI.")],
    label: Annotated[
        str, typer.Option("--label", metavar="COLUMN", help="That `embed --keep` handed on.")
    ] = "",
    num: Annotated[int, typer.Option("--num", min=10, help="Images at most.")] = MAP_IMAGES,
    where: ImagesOption = "",
    *,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample and of t-SNE.")] = 0,
) -> None:
    """Draw images on a map, alike ones near each other, as a page to move about in.

    Example: simclr-ray model map photos.parquet map.html --label label
    """
    from simclr_ray.data.contact_sheet import PAGE, check_output

    check_output(page, "PAGE", PAGE)
    loading("sklearn")
    from simclr_ray.inference.embedding_index import EmbeddingIndex
    from simclr_ray.inference.embedding_map import make_map, write_map

    opened = EmbeddingIndex(index)
    write_map(page, opened, make_map(opened, num, label=label, seed=seed), where)
    out.print(page, markup=False, soft_wrap=True)


def _check_sheet(sheet: str) -> None:
    from simclr_ray.data.contact_sheet import check_output

    if sheet:
        check_output(sheet, "--out")
