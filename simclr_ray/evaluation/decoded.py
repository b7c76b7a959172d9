"""Decoded evaluation views that a process keeps for the next run that it makes.

Off unless a process asks for it: one that evaluates once would hold them for nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from simclr_ray.evaluation.features import Split


class DecodedSplits:
    """The splits that were used last, as many as fit."""

    def __init__(self) -> None:
        self._most = 0
        self._splits: OrderedDict[Hashable, Split] = OrderedDict()

    @property
    def most(self) -> int:
        """Return how many bytes are kept at most."""
        return self._most

    def keep(self, most_bytes: int) -> None:
        """Keep splits from now on, of so many bytes together; 0: none."""
        self._most = most_bytes
        self._drop()

    def get(self, key: Hashable, make: Callable[[], Split]) -> Split:
        """Return the split of a key, made where it is not kept. Nobody writes to its tensors."""
        if key in self._splits:
            self._splits.move_to_end(key)
            return self._splits[key]
        made = make()
        if _bytes_of(made) <= self._most:
            self._splits[key] = made
            self._drop()
        return made

    def _drop(self) -> None:
        while self._splits and sum(map(_bytes_of, self._splits.values())) > self._most:
            self._splits.popitem(last=False)


def _bytes_of(split: Split) -> int:
    return sum(tensor.nbytes for tensor in (split.images, split.labels, split.ids))


DECODED: Final = DecodedSplits()  # of this process
