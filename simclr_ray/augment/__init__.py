"""Views: what an augmented image shows is a pure function of (seed, epoch, image id, view)."""

from simclr_ray.augment.views import TwoViews, ViewPair

__all__ = ["TwoViews", "ViewPair"]
