"""Datasets with one numbering of their classes, so that their labels can be compared."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from simclr_ray.config.logging import warn_once
from simclr_ray.config.wording import counted
from simclr_ray.data.classes import keys_of, occurring, one_numbering, renumber
from simclr_ray.data.source import Source
from simclr_ray.errors import DataError

log = logging.getLogger(__name__)


def align_labels(*sources: Source) -> tuple[Source, ...]:
    """Return the datasets with labels that count the classes of the first, then of the others.

    Classes are the same by name where every dataset has names, whatever their numbers; else by
    number, and that is said, as are classes that only one has. Labels that number no gaps, alike
    in all, stay what they are. Reads label columns, no image.

    Raises:
        DataError: A dataset has no labels; or one holds text, and another numbers without names.
    """
    labels = [source.labels() for source in sources]
    columns = [source.label for source in sources if source.label]
    keys = [keys_of(column, own) for column, own in zip(columns, labels, strict=True)]
    named = [bool(column.names) for column in columns]
    if not all(named):  # by number, also of those that have names
        if texts := [s.uri for s, column in zip(sources, columns, strict=True) if column.is_text]:
            numbers = sources[named.index(False)].uri
            raise DataError(
                f"{texts[0]} holds names of classes and {numbers} numbers without names: which is "
                "which is not known; give both names (class_names in the metadata, or text)"
            )
        keys = [{label: str(label) for label in own} for own in keys]
    classes, said = one_numbering(keys, named, [source.uri for source in sources])
    if said:
        warn_once(log, said)
    renumbered = map(renumber, columns, keys, [classes] * len(keys))
    return tuple(
        replace(source, label=label) for source, label in zip(sources, renumbered, strict=True)
    )


def of_classifier(source: Source, names: Sequence[str], num_classes: int) -> Source:
    """Return labelled images with the labels by which a classifier counts its classes.

    Args:
        source: The images.
        names: Of the classifier's classes; empty: it has numbers alone.
        num_classes: K.

    Raises:
        DataError: The images have a class that the classifier does not know, or no labels.
    """
    labels, column = source.labels(), source.label
    assert column is not None
    present = occurring(labels)
    keys = {label: column.names[label] if column.names else str(label) for label in present}
    if names and (column.names or set(keys.values()) <= set(names)):
        unknown = [key for key in keys.values() if key not in names]
        if not unknown:
            return replace(source, label=renumber(column, keys, names))
        shown = f"{counted(len(unknown), 'class', 'classes')} that the classifier does not know"
        raise DataError(f"{source.uri} has {shown}: {', '.join(unknown[:5])}")
    if names or column.names:
        nameless = source.uri if names else "the classifier"
        warn_once(log, f"{nameless} has no names of classes: labels are compared as numbers")
    if present and present[-1] >= num_classes:
        raise DataError(
            f"{source.uri} has label {present[-1]}; the classifier knows 0 to {num_classes - 1}"
        )
    return source
