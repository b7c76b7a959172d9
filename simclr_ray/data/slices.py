"""Row groups of a list of files in slices, and slices joined again."""

from __future__ import annotations

from collections.abc import Sequence

from simclr_ray.data.footer import RowGroup

GROUP_ROWS = 256  # of a list of paths: a reader holds the images of some groups


def cut_groups(groups: Sequence[RowGroup], most: int = GROUP_ROWS) -> tuple[RowGroup, ...]:
    """Return row groups of names in slices: whoever reads one holds the images of all its rows.

    Others write a list as one row group, of a million names as like as not.
    """
    return tuple(
        slice_of(group, at, min(most, group.num_rows - at))
        for group in groups
        for at in range(0, group.num_rows, most)
    )


def slice_of(group: RowGroup, at: int, num_rows: int) -> RowGroup:
    """Return some rows of a row group, from its row `at` on."""
    return group._replace(
        first_row=group.first_row + at, num_rows=num_rows, offset=group.offset + at
    )


def joined_groups(groups: Sequence[RowGroup]) -> tuple[RowGroup, ...]:
    """Return the row groups that slices are of; those that are whole stay as they are."""
    wholes: list[RowGroup] = []
    for group in groups:
        if wholes and wholes[-1][:2] == group[:2]:
            wholes[-1] = wholes[-1]._replace(num_rows=wholes[-1].num_rows + group.num_rows)
        else:
            wholes.append(group)
    return tuple(wholes)
