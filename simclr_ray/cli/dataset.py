"""Verbs about images: prepare, inspect, preview."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simclr_ray import config as cfg
from simclr_ray.cli.arguments import ConfigSource, Overrides
from simclr_ray.cli.console import loading, out, show_pairs, show_table
from simclr_ray.config.experiment import ColumnsConfig, Experiment, PreparationConfig
from simclr_ray.config.wording import counted
from simclr_ray.errors import ConfigError, ConfigIssue

if TYPE_CHECKING:
    from simclr_ray.data.description import Description

MIB = 2**20
BAD_SHOWN, CLASSES_SHOWN = 5, 40


def prepare(
    what: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES", help="`shapes`, a folder, a parquet path, or a torchvision dataset."
        ),
    ],
    to: Annotated[
        str, typer.Argument(metavar="OUT", help="Folder for the shards; made if absent.")
    ],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help=f"Keys: {', '.join(PreparationConfig.model_fields)}."
        ),
    ] = None,
    overwrite: Annotated[  # noqa: FBT002 - typer makes it a flag
        bool, typer.Option("--overwrite", help="Start over where OUT holds other shards.")
    ] = False,
) -> None:
    """Turn images into parquet shards that training reads.

    Example: simclr-ray prepare ~/images data/images
    Example: simclr-ray prepare shapes data/shapes num_images=12000
    """
    prepare_shards(what, to, *(options or []), overwrite=overwrite)


def prepare_shards(what: str, to: str, *options: str, overwrite: bool = False) -> None:
    """Write the shards of a dataset, and show what became of its images."""
    from simclr_ray.data.prepare import prepare as write_shards

    chosen = cfg.validate(PreparationConfig, cfg.apply_overrides({}, options))
    fields = {name: getattr(chosen, name) for name in type(chosen).model_fields}
    loading("ray")
    from simclr_ray.cli.progress import ShardProgress

    with ShardProgress(to) as progress:
        manifest = write_shards(what, to, **fields, overwrite=overwrite, on_progress=progress)
    out.print(f"{to}: {counted(manifest.num_rows, 'image')}", markup=False)
    if manifest.rejected:
        shown = "; ".join(f"{r.name}: {r.reason}" for r in manifest.rejected[:BAD_SHOWN])
        out.print(f"left out {len(manifest.rejected)}: {shown}", markup=False, soft_wrap=True)


def inspect(
    path: Annotated[
        str,
        typer.Argument(metavar="IMAGES", help="A parquet file, or a folder or URI of them."),
    ],
    columns: Annotated[
        list[str] | None,
        typer.Argument(metavar="ROLE=COLUMN", help="image=photo, label=class, id=key."),
    ] = None,
) -> None:
    """Tell what a parquet dataset holds, and try to decode a sample of its images.

    Example: simclr-ray inspect data/images
    Example: simclr-ray inspect s3://bucket/train image=photo label=class
    """
    from simclr_ray.data.description import describe

    given = [text.removeprefix("data.columns.") for text in columns or []]
    description = describe(path, cfg.validate(ColumnsConfig, cfg.apply_overrides({}, given)))
    _show_description(description)


def _show_description(description: Description) -> None:
    from simclr_ray.data.description import class_name

    source, roles = description.source, description.source.columns
    used = {roles.image: "image"}
    used |= {roles.label: "label"} if source.has_labels else {}
    used |= {roles.id: "id"} if source.has_ids else {}
    rows = {
        "dataset": source.uri,
        "rows": f"{source.num_rows:,} in {counted(len(source.files), 'file')}, "
        f"{counted(len(source.row_groups), 'row group')}, {description.num_bytes / MIB:,.1f} MiB",
        "fingerprint": source.fingerprint,
    }
    for name, kind in description.columns.items():
        role = f" ({used[name]})" if name in used else ""
        rows[f"column {name}"] = f"{kind}{role}"
    if description.sizes:
        widths, heights = zip(*description.sizes, strict=True)
        rows["sizes"] = (
            f"{min(widths)} to {max(widths)} px wide, {min(heights)} to {max(heights)} px high, "
            f"most often {'x'.join(map(str, Counter(description.sizes).most_common(1)[0][0]))}"
        )
    bad = f"{len(description.bad)} of {counted(description.num_sampled, 'image')} of a sample"
    rows["undecodable"] = bad
    for row in description.bad[:BAD_SHOWN]:
        rows[f"row {row.row}"] = row.reason
    show_pairs(rows)
    if description.labels:
        classes = [
            [str(label), class_name(source, label), f"{n:,}"]
            for label, n in description.labels.items()
        ]
        more = len(classes) - CLASSES_SHOWN
        last = [["", f"{more} more", ""]] if more > 0 else []
        title = counted(
            len([label for label in description.labels if label >= 0]), "class", "classes"
        )
        show_table(title, ["label", "class", "images"], [*classes[:CLASSES_SHOWN], *last])


def preview(
    source: ConfigSource,
    overrides: Overrides = None,
    image: Annotated[Path, typer.Option("--out", help="PNG to write.")] = Path("views.png"),
) -> None:
    """Draw what the views of a config show: originals with their crops, and both views."""
    if image.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError([ConfigIssue("--out", f"got {image}; it must end in .png, .svg or .pdf")])
    experiment = Experiment.load(source, *(overrides or []))
    loading("torch", "matplotlib")
    from simclr_ray.data.source import Source
    from simclr_ray.train.figures import draw_views

    data = experiment.data
    train = Source.open(data.train, data.columns, data.limit)
    image.parent.mkdir(parents=True, exist_ok=True)
    draw_views(experiment, train, image)
    out.print(f"wrote {image}", markup=False)
