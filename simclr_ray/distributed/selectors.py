"""Which nodes a run asks for by their labels, told without Ray."""

from __future__ import annotations

from collections.abc import Mapping

from simclr_ray.config.sections.running import ScalingConfig


def selectors_of(scaling: ScalingConfig) -> dict[str, dict[str, str]]:
    """Return the label selector of each kind of process, by the key that sets it."""
    return {
        "data_label_selector": scaling.data_label_selector,
        "worker_label_selector": scaling.worker_selector,
    }


def shown(selector: Mapping[str, str]) -> str:
    """Return a selector in one line."""
    return ", ".join(f"{key}: {value}" for key, value in selector.items())
