"""What a parquet dataset holds, told before anything is trained on it. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from simclr_ray.augment.decode import ImageDecoder, ImageError, image_shape
from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.config.wording import counted
from simclr_ray.data.classes import NO_LABEL
from simclr_ray.data.decoding import ValueRange, read_deep_ranges
from simclr_ray.data.footer import read_footers
from simclr_ray.data.image_groups import groups_line, open_grouped
from simclr_ray.data.listing import list_parquet
from simclr_ray.data.partitions import with_fields
from simclr_ray.data.sample import Sample
from simclr_ray.data.source import Source
from simclr_ray.errors import DataError
from simclr_ray.storage.filesystem import filesystem


class UnusableSample(NamedTuple):
    """A row of the sample whose image cannot be used."""

    row: int  # its position in the dataset
    reason: str


class Description(NamedTuple):
    """What a dataset holds."""

    source: Source
    columns: dict[str, str]  # name -> type
    num_bytes: int  # of the files
    labels: dict[int, int]  # label -> rows, -1 where there is none; empty without labels
    num_sampled: int
    sizes: list[tuple[int, int]]  # width and height of the sampled images
    bad: list[UnusableSample]
    channels: dict[int, int]  # of the images -> how many of the sample; gray and color are 3
    num_gray: int = 0  # of those
    deep: Sequence[ValueRange] = ()  # values of those of 9 to 16 bits
    groups: str = ""  # of images of one thing: how many, or why they cannot serve as they lie


def describe(
    uri: str, columns: ColumnsConfig | None = None, channels: int | None = None
) -> Description:
    """Return what the dataset at `uri` holds; some images of up to four row groups are decoded.

    Args:
        uri: Folder or file.
        columns: Which column is what.
        channels: That images must have, as `data.channels`; None: images of any number count.

    Raises:
        DataError: As `Source.open`.
    """
    description = describe_columns(uri, columns)
    return _decoded(description, channels)


def describe_columns(uri: str, columns: ColumnsConfig | None = None) -> Description:
    """Return what the dataset at `uri` holds; no image is decoded.

    Raises:
        DataError: As `Source.open`.
    """
    columns = columns or ColumnsConfig()
    source = Source.open(uri, columns)
    files, root = filesystem(source.uri)  # of a folder of images, its list
    listed = list_parquet(files, root, source.uri, columns).files
    (first,) = read_footers(files, listed[:1])
    groups = ""
    if source.columns.group:
        try:
            groups = groups_line(open_grouped(uri, columns))
        except DataError as error:
            groups = str(error)
    return Description(
        source,
        {
            field.name: str(field.type)
            for field in with_fields(first.schema, source.folder_values[0])
        },
        sum(file.size for file in listed),
        count_labels(source),
        num_sampled=0,
        sizes=[],
        bad=[],
        channels={},
        groups=groups,
    )


def count_labels(source: Source) -> dict[int, int]:
    """Return how many rows each label has, -1 where there is none; empty without labels."""
    labels = Counter(source.labels().tolist()) if source.has_labels else Counter[int]()
    return dict(sorted(labels.items()))


def class_name(source: Source, label: int) -> str:
    """Return the name of a class, or its number where the files name none."""
    if label == NO_LABEL:
        return "no label"
    has_name = label < len(source.class_names)
    return source.class_names[label] if has_name else str(label)


def channels_in_words(num_of: Mapping[int, int]) -> str:
    """Return how many images have which number of channels, and what takes most of them.

    Args:
        num_of: Channels -> images.
    """
    shown = " and ".join(
        f"{counted(images, 'image')} of {counted(num, 'channel')}" for num, images in num_of.items()
    )
    most = max(num_of, key=num_of.__getitem__)
    return f"{shown}: --channels {most} looks at them, data.channels={most} trains on them"


def deep_in_words(deep: Sequence[ValueRange], dark: str) -> dict[str, str]:
    """Return the values of images of 9 to 16 bits in words, by what they are values of.

    Args:
        deep: Of all channels, or of each.
        dark: What is added where values use a part of their range.
    """
    return {
        f"more than 8 bits{f' of channel {number}' if len(deep) > 1 else ''}": (
            f"{seen}{dark if seen.is_dark else ''}"
        )
        for number, seen in enumerate(deep, start=1)
    }


def _decoded(description: Description, channels: int | None) -> Description:
    """Return the description with what a sample holds, and rows that cannot be used."""
    sizes: list[tuple[int, int]] = []
    bad: list[UnusableSample] = []
    num_of = Counter[int]()
    num_sampled = num_gray = 0
    sample = Sample(description.source)
    for first_row, images in sample:
        num_sampled += len(images)
        for row, image in enumerate(images, start=first_row):
            try:
                (height, width, num), is_gray = _look_at(image or b"", channels)
            except ImageError as error:
                bad.append(UnusableSample(row, str(error)))
            else:
                sizes.append((width, height))
                num_of[num] += 1
                num_gray += is_gray
    return description._replace(
        num_sampled=num_sampled,
        sizes=sizes,
        bad=bad,
        channels=dict(num_of.most_common()),
        num_gray=num_gray,
        deep=read_deep_ranges(sample, ImageDecoder().max_pixels, channels or 3),
    )


def _look_at(encoded: bytes, channels: int | None) -> tuple[tuple[int, ...], bool]:
    """Return the shape [H, W, C] of an image, and whether it is gray where it may be color.

    Raises:
        ImageError: It cannot be used.
    """
    try:
        pixels = ImageDecoder(channels=channels or 3).decode(encoded)
    except ImageError:
        if channels:
            raise
        return image_shape(encoded), False
    return pixels.shape, pixels.shape[2] == 3 and bool((pixels == pixels[:, :, :1]).all())
