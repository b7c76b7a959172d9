"""Verbs that use a trained encoder: embed, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from simclr_ray.cli.arguments import TrackingUri, permitted_names
from simclr_ray.cli.console import loading, out, say

Model = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_MODEL", help="A run folder, an encoder's files, or models:/name@alias."
    ),
]


def embed(
    model: Model,
    files: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files.")],
    tracking_uri: TrackingUri = "",
) -> None:
    """Print the embedding of each image: its path, then F numbers, tab-separated.

    Files that cannot be read or are no images are named on stderr and left out; the exit code is
    then 1.
    """
    loading("torch")
    from simclr_ray.inference.embed import embed_images

    bad: dict[int, str] = {}

    def left_out(place: int, reason: str) -> None:
        bad[place] = f"left out: {files[place]}: {reason}"

    read: dict[int, bytes] = {}
    for place, path in enumerate(files):
        try:
            read[place] = path.read_bytes()
        except OSError as error:
            left_out(place, error.strerror or str(error))
    places, images = list(read), list(read.values())
    rows = embed_images(
        model, images, tracking_uri=tracking_uri, on_bad=lambda at, why: left_out(places[at], why)
    )
    for place in sorted(bad):
        say(bad[place])
    for place, row in zip(places, rows, strict=True):
        if place not in bad:
            name = str(files[place])
            # a tab or line break in a name would be one of the table
            name = name if name.isprintable() else json.dumps(name)
            print(name, *(f"{value:.6g}" for value in row), sep="\t")
    if bad:
        raise typer.Exit(1)


def export(
    model: Model,
    to: Annotated[Path, typer.Argument(metavar="OUT", help="Folder, made if absent.")],
    formats: Annotated[
        str,
        typer.Option(
            "--format", help="Comma-separated: safetensors, torch-export, or your module:function."
        ),
    ] = "safetensors,torch-export",
    tracking_uri: TrackingUri = "",
) -> None:
    """Write a trained encoder as files that other programs read.

    Example: simclr-ray export runs/cifar10_cpu-1a2b3c4d encoder
    """
    loading("torch")
    from simclr_ray.inference.export import export_encoder

    names = export_encoder(model, to, permitted_names(formats), tracking_uri=tracking_uri)
    out.print(f"wrote {', '.join(names)} into {to}", markup=False, soft_wrap=True)
