"""Parts of gradient caching (Gao et al. 2021, arXiv:2101.06983); `loop.cached_step` is the step.

Group g of K holds the images at places p of the *global* batch with p mod K = g. So every group is
spread over all ranks, and batch norm's statistics are those of the same images on any number of
ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import nn


def group_rows(num_rows: int, first: int, num_groups: int) -> list[slice]:
    """Return the rows of each group on a rank that holds places [first, first + num_rows)."""
    return [slice((g - first) % num_groups, num_rows, num_groups) for g in range(num_groups)]


def averaging_over_ranks(model: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
    """Return the context in which a backward pass averages gradients over ranks, or only adds up.

    Each average is a collective over all parameters; one for each group would send K times as much.
    """
    no_sync: Callable[[], AbstractContextManager[None]] = getattr(model, "no_sync", nullcontext)
    return nullcontext() if enabled else no_sync()
