"""What `simclr-ray doctor --cluster` has found, kept by the cluster itself for as long as it lives.

Ray's GCS keeps it, so every job of the cluster reads it, and a new cluster knows nothing.
"""

from __future__ import annotations

from typing import Final

import ray
from ray.experimental import internal_kv

from simclr_ray.distributed.ray_cluster import NAMESPACE, is_local

KEY: Final = "doctor"
NEVER: Final = "not run"


def keep(result: str) -> None:
    """Keep what was found on the cluster at hand, in place of what was found before."""
    internal_kv._internal_kv_put(KEY, result, overwrite=True, namespace=NAMESPACE)


def cluster_result() -> str | None:
    """Return what was found on the cluster at hand; None where a run starts its own."""
    if not ray.is_initialized() or is_local():
        return None
    kept = internal_kv._internal_kv_get(KEY, namespace=NAMESPACE)
    return kept.decode() if kept else NEVER
