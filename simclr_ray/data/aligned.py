"""Datasets with one numbering of their classes, so that their labels can be compared."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from simclr_ray.config.logging import warn_once
from simclr_ray.config.wording import counted
from simclr_ray.data.arrays import Int64s
from simclr_ray.data.classes import (
    NO_LABEL,
    SHOWN,
    class_keys,
    distinct_labels,
    number_classes,
    renumber,
)
from simclr_ray.data.source import Source
from simclr_ray.errors import DataError

log = logging.getLogger(__name__)


def align_labels(*sources: Source) -> tuple[Source, ...]:
    """Return the datasets with labels that count the classes of the first, then of the others.

    Classes are the same by name where every dataset has names, whatever their numbers; else by
    number, and that is said, as are classes that only one has. Labels that number no gaps, alike
    in all, stay what they are. Reads label columns, no image.

    Raises:
        DataError: A dataset has no labels; one holds text, and another numbers without names; or
            another has no class of the first.
    """
    labels = [source.labels() for source in sources]
    columns = [source.label for source in sources if source.label]
    keys = [class_keys(column, own) for column, own in zip(columns, labels, strict=True)]
    named = [bool(column.names) for column in columns]
    if not all(named):  # by number, also of those that have names
        if texts := [s.uri for s, column in zip(sources, columns, strict=True) if column.is_text]:
            numbers = sources[named.index(False)].uri
            raise DataError(
                f"{texts[0]} holds names of classes and {numbers} numbers without names: which is "
                "which is not known; give both names (class_names in the metadata, or text)"
            )
        keys = [{label: str(label) for label in own} for own in keys]
    for source, own in zip(sources[1:], keys[1:], strict=True):
        if set(own.values()).isdisjoint(keys[0].values()):
            raise DataError(
                f"{source.shown_uri} has no class of {sources[0].shown_uri}: {_some(own)} there, "
                f"{_some(keys[0])} here, so that no score could be right"
            )
    classes, notes = number_classes(keys, named, [source.uri for source in sources])
    if notes:
        warn_once(log, notes)
    renumbered = map(renumber, columns, keys, [classes] * len(keys))
    return tuple(
        replace(source, label=label) for source, label in zip(sources, renumbered, strict=True)
    )


def _some(keys: Mapping[int, str]) -> str:
    names = list(keys.values())
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def map_to_classifier(source: Source, names: Sequence[str], num_classes: int) -> Source:
    """Return labelled images with the labels by which a classifier counts its classes.

    Args:
        source: The images.
        names: Of the classifier's classes: names, or the numbers that occurred, as text; empty: its
            labels are numbers without gaps.
        num_classes: K.

    Classes of the classifier that no image has are said.

    Raises:
        DataError: The images have a class that the classifier does not know, names where it has
            numbers alone or other names, or no labels.
    """
    labels, column = source.labels(), source.label
    assert column is not None
    present = distinct_labels(labels)
    by_name = bool(column.names) and not set(names).isdisjoint(column.names)
    both_named = not _are_numbers(column.names) and not _are_numbers(names)
    if not by_name and (column.is_text or both_named):
        raise DataError(f"{source.shown_uri} has none of the classes that the classifier knows")
    if not by_name and (names or column.names):
        warn_once(log, f"{source.shown_uri}: labels are compared with the classifier's as numbers")
    classes = _classes(names, num_classes, by_name=by_name)
    keys = {label: column.names[label] if by_name else str(label) for label in present}
    names_there = set(classes)
    unknown = [key for key in keys.values() if key not in names_there]
    if unknown:
        shown = counted(len(unknown), "class", "classes")
        raise DataError(
            f"{source.shown_uri} has {shown} that the classifier does not know: "
            f"{', '.join(unknown[:5])}"
        )
    untested = sorted(names_there.difference(keys.values()), key=classes.index) if by_name else []
    if untested:
        warn_once(log, f"{source.shown_uri} has no image of {_some(dict(enumerate(untested)))}")
    return replace(source, label=renumber(column, keys, classes))


def labels_for_classifier(source: Source, names: Sequence[str]) -> tuple[Int64s, list[str]]:
    """Return the labels by which a classifier counts its classes, and the classes it does not have.

    By name where the images have names, else by number. Labels are int64 [rows], -1 where it does
    not have the class, or there is no label.

    Args:
        source: Labelled images.
        names: Of all K classes: names, or numbers as text.
    """
    labels, column = source.labels(), source.label
    assert column is not None
    present = distinct_labels(labels)
    is_numbered = _are_numbers(names)
    is_other = is_numbered and set(names).isdisjoint(column.names)  # names here, numbers there
    by_name = bool(column.names) and (column.is_text or not is_other)
    if not by_name and (column.names or not is_numbered):
        warn_once(log, f"{source.shown_uri}: labels are compared with the classifier's as numbers")
    keys = [column.names[label] if by_name else str(label) for label in present]
    number = {key: place for place, key in enumerate(_classes(names, len(names), by_name=by_name))}
    before = np.array([NO_LABEL, *present])
    after = np.array([NO_LABEL, *(number.get(key, NO_LABEL) for key in keys)])
    return after[np.searchsorted(before, labels)], [key for key in keys if key not in number]


def _classes(names: Sequence[str], num_classes: int, *, by_name: bool) -> Sequence[str]:
    """Return what a classifier's K classes are called where labels are named so, or numbered."""
    if names and (by_name or _are_numbers(names)):
        return names
    return [str(place) for place in range(num_classes)]  # a number is the place among the names


def _are_numbers(names: Sequence[str]) -> bool:
    return all(name.isdigit() for name in names)
