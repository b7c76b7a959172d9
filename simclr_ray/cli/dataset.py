"""Verbs about images: prepare, inspect, preview."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simclr_ray import config as cfg
from simclr_ray.cli.arguments import ConfigSource, Overrides
from simclr_ray.cli.console import loading, out, show_pairs, show_table
from simclr_ray.config.column_keys import column_keys
from simclr_ray.config.experiment import ColumnsConfig, Experiment, PreparationConfig
from simclr_ray.config.wording import MIB, counted
from simclr_ray.errors import ConfigError
from simclr_ray.storage.filesystem import make_parent

if TYPE_CHECKING:
    from simclr_ray.data.description import Description

BAD_SHOWN, CLASSES_SHOWN, CLASSES_NAMED = 5, 40, 12


def prepare(
    what: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES",
            help="`shapes`, a folder, parquet, tar shards, or a torchvision set; paths or URIs; "
            "of splits PATH#train.",
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
    Example: simclr-ray prepare 's3://bucket/train-{0000..0146}.tar' data/train
    """
    prepare_shards(what, to, *(options or []), overwrite=overwrite)


def prepare_shards(what: str, to: str, *options: str, overwrite: bool = False) -> None:
    """Write the shards of a dataset, and show what became of its images."""
    from simclr_ray.data.image_groups import groups_text
    from simclr_ray.data.prepare import prepare as write_shards

    chosen = cfg.validate(PreparationConfig, cfg.apply_overrides({}, options))
    fields = {name: getattr(chosen, name) for name in chosen.model_fields_set}
    loading("ray")
    from simclr_ray.cli.progress import CountProgress

    with CountProgress(to, "images") as progress:
        manifest = write_shards(what, to, **fields, overwrite=overwrite, on_progress=progress)
    out.print(f"{to}: {counted(manifest.num_rows, 'image')}", markup=False)
    if manifest.sizes is not None:
        narrow, wide, low, high = manifest.sizes
        out.print(f"sizes: {narrow} to {wide} px wide, {low} to {high} px high")
    if manifest.groups is not None:
        line = groups_text(*manifest.groups)
        out.print(
            f"groups: {line}; train with data.columns.group=group", markup=False, soft_wrap=True
        )
    out.print(f"classes: {_classes_of(to)}", markup=False, soft_wrap=True)
    if manifest.rejected:
        shown = "; ".join(f"{r.name}: {r.reason}" for r in manifest.rejected[:BAD_SHOWN])
        out.print(f"left out {len(manifest.rejected)}: {shown}", markup=False, soft_wrap=True)


def _classes_of(uri: str) -> str:
    """Return the classes of a prepared set with their images, the first of them by name."""
    from simclr_ray.data.description import class_name, count_labels
    from simclr_ray.data.source import Source

    source = Source.open(uri)
    counts = count_labels(source)
    shown = [
        f"{class_name(source, label)} {count:,}"
        for label, count in list(counts.items())[:CLASSES_NAMED]
    ]
    more = len(counts) - len(shown)
    listed = ", ".join([*shown, f"{more:,} more"] if more else shown)
    num_classes = sum(label >= 0 for label in counts)
    return f"{num_classes:,} ({listed})" if counts else "none"


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES",
            help="Parquet, or a folder of images or parquet; a path or URI; of splits PATH#train.",
        ),
    ],
    columns: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ROLE=COLUMN", help="image=photo, label=class, id=key, group=visit."
        ),
    ] = None,
    *,
    channels: Annotated[
        int | None,
        typer.Option(min=1, max=16, help="Of the images, as data.channels (3): 1 is gray."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Decode all images, not a sample, and look for copies.")
    ] = False,
    duplicates: Annotated[
        bool, typer.Option(help="With all images: look for exact and near duplicates.")
    ] = True,
    against: Annotated[
        str,
        typer.Option(metavar="TEST", help="Look for the images of this dataset; implies --full."),
    ] = "",
    page: Annotated[
        str,
        typer.Option(metavar="FILE.html", help="Write one page with samples; implies --full."),
    ] = "",
    record: Annotated[
        str,
        typer.Option("--json", metavar="FILE.json", help="Write what was seen; implies --full."),
    ] = "",
) -> None:
    """Tell what a dataset holds: columns, classes, sizes, what cannot be decoded, copies.

    Without options a sample of the images is decoded, which takes seconds. Near duplicates are
    recompressed, scaled or slightly cropped copies; those that were flipped or turned are not seen.

    Example: simclr-ray inspect data/images
    Example: simclr-ray inspect s3://bucket/train image=photo label=class
    Example: simclr-ray inspect data/train --against data/test --page train.html
    Example: simclr-ray inspect data/tiles --channels 13 --full
    """
    settings = [text.removeprefix("data.columns.") for text in columns or []]
    chosen = cfg.validate(ColumnsConfig, cfg.apply_overrides({}, settings))
    for option, name, ending in (("--page", page, ".html"), ("--json", record, ".json")):
        if name and not name.endswith(ending):
            raise ConfigError.of(option, f"got {name}; it must end in {ending}")
        if name:
            make_parent(name)
    with column_keys(""):
        if not (full or against or page or record):
            from simclr_ray.data.description import describe

            _show_description(describe(path, chosen, channels), channels)
            return
        inspect_whole(
            path, chosen, against,
            channels=channels or 3, duplicates=duplicates, page=page, record=record,
        )  # fmt: skip


def inspect_whole(
    path: str,
    columns: ColumnsConfig,
    against: str,
    *,
    channels: int,
    duplicates: bool,
    page: str,
    record: str,
) -> None:
    """Look at every image of a dataset; show what was seen, and write page and record."""
    from simclr_ray.cli.progress import StageProgress
    from simclr_ray.data.description import describe_columns
    from simclr_ray.data.inspection import inspect_all
    from simclr_ray.data.inspection_page import facts, write_page, write_record
    from simclr_ray.data.source import Source

    description = describe_columns(path, columns)
    other = Source.open(against, columns) if against else None
    with StageProgress() as progress:
        seen = inspect_all(
            description.source,
            against=other,
            names=(path, against),
            duplicates=duplicates,
            channels=channels,
            on_progress=progress,
        )
    show_pairs(_dataset_rows(description) | {"dataset": path} | facts(seen))
    _show_classes(description)
    for target, write in ((page, write_page), (record, write_record)):
        if target:
            write(seen, target)
            out.print(f"wrote {target}", markup=False)


def _dataset_rows(description: Description) -> dict[str, str]:
    from simclr_ray.data.slices import joined_groups

    source, roles = description.source, description.source.columns
    used = {roles.image: "image"}
    used |= {roles.label: "label"} if source.has_labels else {}
    used |= {roles.id: "id"} if source.has_ids else {}
    rows = {
        "dataset": source.uri,
        "rows": f"{source.num_rows:,} in {counted(len(source.files), 'file')}, "
        f"{counted(len(joined_groups(source.row_groups)), 'row group')}, "
        f"{description.num_bytes / MIB:,.1f} MiB",
        "fingerprint": source.fingerprint,
    }
    if description.groups:
        rows["groups"] = description.groups
        used[roles.group] = "group"
    for name, kind in description.columns.items():
        role = f" ({used[name]})" if name in used else ""
        rows[f"column {name}"] = f"{kind}{role}"
    return rows


def _values(description: Description, channels: int | None) -> dict[str, str]:
    """Return channels and bits of a sample in words."""
    from simclr_ray.data.description import channels_in_words, deep_in_words

    rows, counts = {}, description.channels
    if any(num != 3 for num in counts) and not channels:
        other = {num: images for num, images in counts.items() if num != 3}
        rows["channels"] = f"of a sample {channels_in_words(other)}"
    elif 3 in counts:
        kinds = {"gray": description.num_gray, "in color": counts[3] - description.num_gray}
        named = [f"{counted(num, 'image')} {kind}" for kind, num in kinds.items() if num]
        rows["channels"] = f"of a sample {' and '.join(named)}"
    dark = ", nearly black: data.white=auto, or a number, says what is white"
    return rows | deep_in_words(description.deep, dark)


def _show_description(description: Description, channels: int | None) -> None:
    """Show what a sample holds.

    Args:
        description: Of the dataset.
        channels: That were asked for, if any were.
    """
    rows = _dataset_rows(description)
    if description.sizes:
        widths, heights = zip(*description.sizes, strict=True)
        rows["sizes"] = (
            f"{min(widths)} to {max(widths)} px wide, {min(heights)} to {max(heights)} px high, "
            f"most often {'x'.join(map(str, Counter(description.sizes).most_common(1)[0][0]))}"
        )
    rows |= _values(description, channels)
    bad = f"{len(description.bad)} of {counted(description.num_sampled, 'image')} of a sample"
    rows["undecodable"] = bad
    for row in description.bad[:BAD_SHOWN]:
        rows[f"row {row.row}"] = row.reason
    show_pairs(rows)
    _show_classes(description)


def _show_classes(description: Description) -> None:
    from simclr_ray.data.description import class_name

    if not description.labels:
        return
    classes = [
        [str(label), class_name(description.source, label), f"{n:,}"]
        for label, n in description.labels.items()
    ]
    more = len(classes) - CLASSES_SHOWN
    last = [["", f"{more} more", ""]] if more > 0 else []
    title = counted(len([label for label in description.labels if label >= 0]), "class", "classes")
    show_table(title, ["label", "class", "images"], [*classes[:CLASSES_SHOWN], *last])


def preview(
    source: ConfigSource,
    overrides: Overrides = None,
    image: Annotated[Path, typer.Option("--out", help="PNG to write.")] = Path("views.png"),
) -> None:
    """Draw what the views of a config show: originals with their crops, and both views."""
    if image.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError.of("--out", f"got {image}; it must end in .png, .svg or .pdf")
    experiment = Experiment.load(source, *(overrides or []))
    loading("torch", "matplotlib")
    from simclr_ray.data.decoding import resolve_white
    from simclr_ray.data.image_groups import open_grouped
    from simclr_ray.data.sample import Sample
    from simclr_ray.train.figures import draw_views

    data = experiment.data
    train = open_grouped(data.train, data.columns, data.limit)
    data = resolve_white(data, Sample(train))  # as a run's would be
    experiment = experiment.model_copy(update={"data": data})
    image.parent.mkdir(parents=True, exist_ok=True)
    draw_views(experiment, train, image)
    out.print(f"wrote {image}", markup=False)
