"""Verbs that use a trained encoder: embed, predict, export."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, cast

import typer

from simclr_ray import config as cfg
from simclr_ray.cli.arguments import TrackingUri, permitted_names
from simclr_ray.cli.console import loading, out, say
from simclr_ray.config.column_keys import column_keys
from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.config.wording import counted
from simclr_ray.errors import ConfigError, ConfigIssue, DataError

Model = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_MODEL", help="A run folder, an encoder's files, or models:/name@alias."
    ),
]


ImageFiles = Annotated[
    list[Path], typer.Argument(metavar="IMAGE", help="Image files, or folders of them.")
]
ROLE: Final = re.compile(r"(?:data\.columns\.)?([a-z]+=.*)")
DTYPES: Final = ("float32", "float16")


def embed(
    model: Model,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES",
            help="Image files; with --out also parquet or a folder, by path or URI, and "
            "image=COLUMN id=COLUMN.",
        ),
    ],
    to: Annotated[
        str, typer.Option("--out", metavar="OUT.parquet", help="Write them as parquet.")
    ] = "",
    keep: Annotated[str, typer.Option(help="Comma-separated columns to hand on.")] = "",
    dtype: Annotated[
        str, typer.Option(help="Of the numbers: float32 (also empty) or float16.")
    ] = "",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 256,
    *,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start over where OUT holds other embeddings.")
    ] = False,
    tracking_uri: TrackingUri = "",
) -> None:
    """Embed images: print a line each, or write a dataset's embeddings as parquet.

    Printed are the path and F numbers, tab-separated; files that cannot be read, are no images or
    get numbers that are not finite are named on stderr and left out. OUT has a row an image, in
    order: path, id or row, `embedding`, and `error` where there is none. The exit code is 1 where
    an image has none, 2 where all have. What was ended goes on where it stood.

    Example: simclr-ray embed models:/photos@newest a.jpg b.jpg
    Example: simclr-ray embed runs/photos-1a2b3c4d ~/photos --out photos.parquet
    Example: simclr-ray embed runs/photos-1a2b3c4d s3://b/train --out train.parquet --keep label
    """
    if to:
        _embed_rows(
            model, images, to,
            keep=[name for name in keep.split(",") if name], dtype=dtype or DTYPES[0],
            batch_size=batch_size,
            overwrite=overwrite, tracking_uri=tracking_uri,
        )  # fmt: skip
        return
    options = {"--keep": keep, "--dtype": dtype, "--overwrite": overwrite}
    if named := [option for option, value in options.items() if value]:
        raise ConfigError([ConfigIssue(option, "is for --out OUT.parquet") for option in named])
    for name in images:
        if "://" in name or name.endswith(".parquet") or Path(name).is_dir():
            problem = "is no image file; --out OUT.parquet embeds a dataset"
            raise ConfigError.of(name, problem)
    loading("torch")
    from simclr_ray.inference.embed import load_encoder

    files = [Path(name) for name in images]
    encoder = load_encoder(model, tracking_uri=tracking_uri)
    with left_out(files) as leave_out:
        rows = encoder.embed(files, batch_size=batch_size, on_bad=leave_out)
        for file, row in zip(files, rows, strict=True):
            if not math.isnan(row[0]):
                print(shown(file), *(f"{value:.6g}" for value in row), sep="\t")


def _embed_rows(
    model: str,
    images: list[str],
    to: str,
    *,
    keep: list[str],
    dtype: str,
    batch_size: int,
    overwrite: bool,
    tracking_uri: str,
) -> None:
    """Write the embeddings of a dataset, and say what was left out."""
    where: list[str] = []
    roles: list[str] = []
    for name in images:
        role = None if Path(name).exists() else ROLE.fullmatch(name)
        (roles if role else where).append(role[1] if role else name)
    if dtype not in DTYPES:
        raise ConfigError.of("--dtype", f"got {dtype!r}; {' or '.join(DTYPES)}")
    if not to.partition("?")[0].endswith(".parquet"):
        raise ConfigError.of("--out", f"got {to}; it must end in .parquet")
    if not where:
        raise ConfigError.of("IMAGES", "are missing")
    datasets = [name for name in where if _is_dataset(name)]
    if len(where) > 1 and datasets:
        problem = "is a dataset, and one is embedded at a time; or give image files alone"
        raise ConfigError.of(datasets[0], problem)
    columns = cfg.validate(ColumnsConfig, cfg.apply_overrides({}, roles))
    loading("torch", "ray")
    from simclr_ray.cli.progress import CountProgress
    from simclr_ray.inference.embed_rows import embed_rows

    with column_keys(""), CountProgress(to, "images") as progress:
        made = embed_rows(
            model, datasets[0] if datasets else where, to,
            columns=columns, keep=keep, dtype=cast("Any", dtype), batch_size=batch_size,
            tracking_uri=tracking_uri, overwrite=overwrite, on_progress=progress,
        )  # fmt: skip
    out.print(f"{to}: {counted(made.num_rows, 'row')}", markup=False, soft_wrap=True)
    if made.num_bad:
        shown = "; ".join(f"{name}: {reason}" for name, reason in made.first_bad)
        rows = counted(made.num_bad, "row")
        say(f"without an embedding {rows}: {shown}")
        raise typer.Exit(1)


def _is_dataset(name: str) -> bool:
    """Return whether a path is parquet or a folder; what is not there is not one image file."""
    return name.endswith(".parquet") or not Path(name).is_file()


def predict(model: Model, files: ImageFiles, tracking_uri: TrackingUri = "") -> None:
    """Print the class of each image: its path, the class, and how probable it is, tab-separated.

    MODEL is a fine-tuned classifier. Of a folder all images below it are taken. Files that cannot
    be read or are no images are named on stderr and left out; the exit code is then 1, and 2 where
    all are.

    Example: simclr-ray predict runs/cifar10_cpu-tuned-10pct-1a2b3c4d photos/*.jpg
    """
    loading("torch")
    from simclr_ray.inference.embed import load_classifier

    files = files_of(files)
    classifier = load_classifier(model, tracking_uri=tracking_uri)
    with left_out(files) as leave_out:
        rows = classifier.predict_proba(files, on_bad=leave_out)
        for file, row in zip(files, rows, strict=True):
            if not math.isnan(row[0]):
                name = classifier.class_names[row.argmax()]
                print(shown(file), shown(name), f"{row.max():.4f}", sep="\t")


def files_of(named: Sequence[Path]) -> list[Path]:
    """Return files, and in place of a folder the images below it, sorted by name.

    Raises:
        DataError: There are none.
    """
    from simclr_ray.data.listing import list_images
    from simclr_ray.storage.filesystem import filesystem

    files: list[Path] = []
    for path in named:
        if not path.is_dir():
            files.append(path)
            continue
        fs, root = filesystem(str(path))
        listing = list_images(fs, root, str(path))
        if not listing.files:
            raise DataError(f"{path} has no images in it")
        listing.say(str(path))
        below = sorted(Path(file.path).relative_to(root) for file in listing.files)
        files += [path / name for name in below]
    return files


@contextmanager
def left_out(files: Sequence[Path]) -> Iterator[Callable[[int, str], None]]:
    """Give what names a file that is left out; the verb ends with 1 then, with 2 where all are."""
    reasons: list[str] = []

    def leave_out(place: int, reason: str) -> None:
        reasons.append(f"{files[place]}: {reason}")
        if len(files) > 1:
            say(f"left out: {reasons[-1]}")

    yield leave_out
    if len(reasons) == len(files) == 1:
        raise DataError(reasons[0])
    if len(reasons) == len(files):
        raise DataError(f"none of {len(files)} files could be used: {reasons[0]}")
    if reasons:
        raise typer.Exit(1)


def shown(named: Path | str) -> str:
    """Return a name for a table; a tab or line break in it would be one of the table."""
    name = str(named)
    return name if name.isprintable() else json.dumps(name)


def export(
    model: Model,
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder, made if absent.")],
    to: Annotated[
        str,
        typer.Option(
            help="Comma-separated: safetensors, torch-export, torchvision, timm, huggingface, "
            "onnx, or your module:function."
        ),
    ] = "safetensors,torch-export",
    tracking_uri: TrackingUri = "",
) -> None:
    """Write a trained encoder as files that other programs read.

    Each is read back and compared with the encoder. All take what `Encoder.transform` makes. Files
    of an earlier export stay where it was of the same encoder, and are removed where it was not.

    Example: simclr-ray export runs/cifar10_cpu-1a2b3c4d encoder --to onnx
    """
    loading("torch")
    from simclr_ray.inference.export import export_encoder

    names = export_encoder(model, folder, permitted_names(to), tracking_uri=tracking_uri)
    out.print(f"wrote {', '.join(names)} into {folder}", markup=False, soft_wrap=True)
