"""What was seen of a dataset, as one HTML file with images in it, and as a JSON tree."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from simclr_ray.augment.decode import channels_in, shown_as_rgb
from simclr_ray.config.wording import counted
from simclr_ray.data.classes import NO_LABEL
from simclr_ray.data.contact_sheet import (
    THUMBNAIL_SIDE,
    Section,
    Thumbnail,
    thumbnail_of,
    write_sheet,
)
from simclr_ray.data.description import channels_in_words, class_name, deep_in_words
from simclr_ray.data.inspection import Copies, ImageScan, Inspection
from simclr_ray.storage.filesystem import filesystem, write_text_whole

SAMPLES, GROUPS_SHOWN, MEMBERS_SHOWN, MATCHES_SHOWN, REASONS_SHOWN = 48, 60, 4, 60, 20
CLASSES_SHOWN, NAMES_SHOWN = 200, 5


def write_page(inspection: Inspection, path: str) -> None:
    """Write one HTML file that needs nothing else; `path` may be a URI.

    Raises:
        DataError: An image cannot be read again.
        OSError: The file cannot be written.
    """
    scan = inspection.scan
    write_sheet(
        path,
        scan.name,
        _sections(inspection),
        facts(inspection),
        reasons=_reasons(scan),
        classes=_classes(scan),
    )


def write_record(inspection: Inspection, path: str) -> None:
    """Write what was seen as JSON; `path` may be a URI.

    Raises:
        OSError: The file cannot be written.
    """
    fs, target = filesystem(path)
    write_text_whole(fs, target, json.dumps(as_tree(inspection), indent=2) + "\n")


def as_tree(inspection: Inspection) -> dict[str, Any]:
    """Return what was seen as a tree for JSON: every group and match, each row with id and name."""
    scan, leaks = inspection.scan, inspection.leaks
    labels, counts = np.unique(scan.labels, return_counts=True)
    return {
        "dataset": scan.name,
        "fingerprint": scan.source.fingerprint,
        "num_rows": scan.source.num_rows,
        "num_usable": len(scan.usable),
        "unusable": {r: [_row(scan, row) for row in rows] for r, rows in scan.unusable.items()},
        "sizes": _sizes(scan),
        "channels": [channel._asdict() for channel in scan.channels],
        "classes": [
            {"label": label, "name": class_name(scan.source, label), "images": count}
            for label, count in zip(labels.tolist(), counts.tolist(), strict=True)
            if scan.source.has_labels
        ],
        "deep": [seen._asdict() for seen in inspection.deep],
        "num_one_color": inspection.num_flat,
        "num_with_more_lookalikes": inspection.num_crowded,
        "same_pixels": [_group(scan, copies) for copies in inspection.same_pixels],
        "near": [_group(scan, copies) for copies in inspection.near],
        "against": leaks
        and {
            "dataset": leaks.other.name,
            "num_rows": leaks.other.source.num_rows,
            "num_usable": len(leaks.other.usable),
            "matches": [
                {
                    "other": _row(leaks.other, match.other),
                    "here": _row(scan, match.row),
                    "misfit": match.misfit,
                }
                for match in leaks.matches
            ],
        },
    }


def facts(inspection: Inspection) -> dict[str, str]:
    """Return what was seen in words, name -> value, in the order in which it is shown."""
    scan = inspection.scan
    num_rows, num_bad = scan.source.num_rows, scan.source.num_rows - len(scan.usable)
    rows = {"images": f"{num_rows:,}, all of them looked at"}
    rows["unusable"] = f"{num_bad:,}" + (f": {_in_words(scan.unusable)}" if num_bad else "")
    num_of = Counter({channels_in(reason): len(rows) for reason, rows in scan.unusable.items()})
    del num_of[0]
    if num_of:
        rows["channels"] = channels_in_words(dict(num_of.most_common()))
    sizes = _sizes(scan)
    if sizes:
        rows["sizes"] = (
            f"{sizes['width'][0]} to {sizes['width'][2]} px wide, {sizes['height'][0]} to "
            f"{sizes['height'][2]} px high, median {sizes['width'][1]:g} and "
            f"{sizes['height'][1]:g}, most often {sizes['most_often']}"
        )
    for channel in scan.channels:
        rows[channel.name] = (
            f"{channel.least} to {channel.most}, mean {channel.mean:.1f}, std {channel.std:.1f}"
        )
    white = scan.decoder.white
    shown = f"[{', '.join(f'{w:g}' for w in white)}]" if isinstance(white, tuple) else f"{white:g}"
    dark = f", nearly black: shown and compared with data.white={shown}"
    rows |= deep_in_words(inspection.deep, dark)
    if inspection.num_flat:
        rows["one color"] = f"{counted(inspection.num_flat, 'image')}, compared by pixels alone"
    if inspection.duplicates:
        none = "" if len(scan.usable) else "no image that could be compared"
        rows["exact duplicates"] = none or _in_groups(inspection.same_pixels)
        rows["near duplicates"] = none or _in_groups(inspection.near)
    if inspection.num_crowded:
        crowded = counted(inspection.num_crowded, "image")
        rows["many look-alikes"] = f"{crowded}, of which the 16 most alike were compared"
    if inspection.leaks:
        rows["against"] = inspection.leaks.other.name
        rows["of it found here"] = _leaked(inspection)
    return rows


def _in_words(unusable: Mapping[str, Sequence[int]]) -> str:
    """Return the most frequent reasons with their counts, and how many rows have others."""
    counts = sorted(((len(rows), reason) for reason, rows in unusable.items()), reverse=True)
    shown = [f"{count:,} x {reason}" for count, reason in counts[:NAMES_SHOWN]]
    others = sum(count for count, _ in counts[NAMES_SHOWN:])
    return "; ".join([*shown, f"{others:,} for other reasons"] if others else shown)


def _leaked(inspection: Inspection) -> str:
    leaks = inspection.leaks
    assert leaks is not None
    num_same = sum(match.misfit == 0 for match in leaks.matches)
    text = (
        f"{len(leaks.matches):,} of {counted(leaks.other.source.num_rows, 'image')}: "
        f"{num_same:,} by the same pixels, {len(leaks.matches) - num_same:,} nearly"
    )
    if leaks.other.source.fingerprint == inspection.scan.source.fingerprint:
        return f"{text}; it is the same dataset"
    return text


def _in_groups(groups: Sequence[Copies]) -> str:
    if not groups:
        return "none"
    beyond = sum(len(group.rows) - 1 for group in groups)
    text = f"{counted(beyond, 'image')} beyond the first of {counted(len(groups), 'group')}"
    same_bytes = sum(group.same_bytes for group in groups)
    text += f", {same_bytes:,} of them byte by byte" if same_bytes else ""
    differ = sum(group.labels_differ for group in groups)
    return text + (f"; {counted(differ, 'group')} of more than one class" if differ else "")


def _sizes(scan: ImageScan) -> dict[str, Any]:
    """Return least, median and largest width and height, and the size that is most frequent."""
    if not len(scan.usable):
        return {}
    sizes = scan.sizes[scan.usable]
    kinds, counts = np.unique(sizes, axis=0, return_counts=True)
    width, height = ([int(side.min()), float(np.median(side)), int(side.max())] for side in sizes.T)
    most_often = "x".join(map(str, kinds[counts.argmax()].tolist()))
    return {"width": width, "height": height, "most_often": most_often}


def _row(scan: ImageScan, row: int) -> dict[str, Any]:
    path = scan.paths[row] if scan.paths else None
    return {"row": row, "id": int(scan.ids[row])} | ({"path": path} if path else {})


def _group(scan: ImageScan, copies: Copies) -> dict[str, Any]:
    return copies._asdict() | {"rows": [_row(scan, row) for row in copies.rows]}


def _reasons(scan: ImageScan) -> list[tuple[str, int, str]]:
    """Return reason, count and the first names of the rows that cannot be used."""
    rows = [
        (reason, len(rows), ", ".join(scan.name_of(row) for row in rows[:NAMES_SHOWN]))
        for reason, rows in sorted(scan.unusable.items(), key=lambda item: -len(item[1]))
    ]
    more = sum(count for _, count, _ in rows[REASONS_SHOWN:])
    return rows[:REASONS_SHOWN] + ([("other reasons", more, "")] if more else [])


def _classes(scan: ImageScan) -> list[tuple[str, str, int]]:
    if not scan.source.has_labels:
        return []
    labels, counts = np.unique(scan.labels, return_counts=True)
    rows = [
        (str(label), class_name(scan.source, label), count)
        for label, count in zip(labels.tolist(), counts.tolist(), strict=True)
    ]
    more = len(rows) - CLASSES_SHOWN
    return rows[:CLASSES_SHOWN] + ([("", f"{more} more", 0)] if more > 0 else [])


def _sections(inspection: Inspection) -> list[Section]:
    scan, leaks = inspection.scan, inspection.leaks
    usable = scan.usable
    places = np.unique(np.linspace(0, len(usable) - 1, SAMPLES).round().astype(int))
    samples = usable[places].tolist() if len(usable) else []
    same = _shown(inspection.same_pixels)
    near = _shown(inspection.near)
    wanted = {*samples, *(row for group in (*same, *near) for row in group.rows[:MEMBERS_SHOWN])}
    matches = sorted(leaks.matches, key=lambda match: match.misfit)[:MATCHES_SHOWN] if leaks else []
    wanted |= {match.row for match in matches}
    here = _thumbnails(scan, wanted)
    there = _thumbnails(leaks.other, {match.other for match in matches}) if leaks else {}
    title = f"Images of {leaks.other.name} that are here" if leaks else ""
    return [
        Section(
            "Samples", f"{len(samples)} of {len(usable):,}", [("", [here[r] for r in samples])]
        ),
        _groups("Exact duplicates", inspection.same_pixels, same, here),
        _groups("Near duplicates", inspection.near, near, here),
        Section(
            title,
            f"{len(matches)} of {len(leaks.matches):,}, left theirs, right ours" if leaks else "",
            [(f"misfit {m.misfit:.3f}", [there[m.other], here[m.row]]) for m in matches],
        ),
    ]


def _shown(groups: Sequence[Copies]) -> list[Copies]:
    """Return the groups that the page shows: those of several classes first, then the largest."""
    return sorted(groups, key=lambda g: (not g.labels_differ, -len(g.rows)))[:GROUPS_SHOWN]


def _groups(
    title: str, groups: Sequence[Copies], shown: Sequence[Copies], of: dict[int, Thumbnail]
) -> Section:
    rows = []
    for group in shown:
        says = counted(len(group.rows), "image") + (
            f", misfit {group.misfit:.3f}" if group.misfit else ""
        )
        says += ", same bytes" if group.same_bytes else ""
        says += ", more than one class" if group.labels_differ else ""
        rows.append((says, [of[row] for row in group.rows[:MEMBERS_SHOWN]]))
    return Section(title, f"{len(shown)} of {counted(len(groups), 'group')}", rows)


def _thumbnails(scan: ImageScan, rows: Iterable[int]) -> dict[int, Thumbnail]:
    """Return the images of some rows, read again from where they lie, one row group at a time."""
    wanted = np.array(sorted(rows), np.int64)
    owner = scan.source.groups_of(wanted)
    out: dict[int, Thumbnail] = {}
    for index in np.unique(owner):
        some = wanted[owner == index]
        for row, image in zip(some.tolist(), scan.source.read_rows(some).images, strict=True):
            label = int(scan.labels[row])
            of_class = class_name(scan.source, label) if label != NO_LABEL else ""
            width, height = scan.sizes[row]
            note = f"{width}x{height} {of_class}".strip()
            out[row] = Thumbnail(
                scan.name_of(row),
                note,
                thumbnail_of(shown_as_rgb(scan.decoder.decode_small(image or b"", THUMBNAIL_SIDE))),
            )
    return out
