"""Encoded image in, two uint8 views out: a pure function of (seed, epoch, id, view).

Names are loaded when first used: `augment.decode` is for readers of files, who need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simclr_ray.augment.views import TwoViews, ViewPair

__all__ = ["TwoViews", "ViewPair"]


def __getattr__(name: str) -> object:
    """Return a public name, importing torch on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from simclr_ray.augment import views

    return getattr(views, name)


def __dir__() -> list[str]:
    """Return the names that are there, those not loaded yet included."""
    return sorted({*globals(), *__all__})
