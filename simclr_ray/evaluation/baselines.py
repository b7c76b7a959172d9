"""Scores of the rows that no training changes: the untrained encoder's and raw pixels', kept.

Runs that differ only in how they are trained have the same two, which are two thirds of the work
after training. They lie in the user's cache, an entry by the digest of all that decides them; what
cannot be read, or is of other code, another machine or other images, is computed again.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.imports import imports_in
from simclr_ray.config.protocols import DEFAULT_PROTOCOLS, PROTOCOLS
from simclr_ray.data.source import Source
from simclr_ray.evaluation.encoded_splits import evaluated_rows
from simclr_ray.evaluation.evaluate import (
    evaluate_experiment,
    evaluate_trained,
    score_networks,
    untrained_encoder,
)
from simclr_ray.evaluation.scores import PIXELS, UNTRAINED, RawPixelEncoder, Score
from simclr_ray.nn.precision import best_device
from simclr_ray.storage.filesystem import cache_folder, filesystem, write_text_whole
from simclr_ray.storage.provenance import code_digest, versions_of

# Of an experiment, what neither the first weights nor the splits depend on.
LEFT_OUT: Final = frozenset(
    {
        "name", "head", "loss", "optimizer", "schedule", "epochs", "compress_gradients",
        "checkpoint", "health", "tracking", "registry", "storage",
    }
)  # fmt: skip
LIBRARIES: Final = ("torch", "torchvision", "timm", "numpy", "scipy", "pillow", "pyarrow")
# Beginnings of the variables by which libraries choose how they compute.
VARIABLES: Final = (
    "ATEN_", "CUBLAS_", "CUDA_", "DNNL_", "KMP_", "MKL_", "OMP_", "ONEDNN_", "OPENBLAS_",
    "SIMCLR_RAY_NATIVE", "TORCH_",
)  # fmt: skip

log = logging.getLogger(__name__)


def score_run(
    experiment: Experiment, folder: Path, protocols: Sequence[str] = DEFAULT_PROTOCOLS
) -> list[Score]:
    """Return what `evaluate_experiment` does, the baselines' rows from the cache where they are.

    Args:
        experiment: Its splits and settings.
        folder: A checkpoint.
        protocols: Names of `config.protocols`, or import paths.

    Raises:
        CheckpointError: The checkpoint is not whole.
        ConfigError: A protocol is unknown.
        ClusterError: `evaluation.actors` ask for more than the cluster has.
        DataError: A split cannot be read.
    """
    entry = _entry(experiment, protocols)
    if (kept := _read(entry)) is not None:
        return [evaluate_trained(experiment, folder, protocols), *kept]
    trained, *baselines = evaluate_experiment(experiment, folder, protocols)
    _write(entry, baselines)
    return [trained, *baselines]


def baseline_scores(
    experiment: Experiment, protocols: Sequence[str] = DEFAULT_PROTOCOLS
) -> list[Score]:
    """Return the rows of the untrained encoder and of raw pixels, from the cache where they are.

    Raises:
        ConfigError: A protocol is unknown.
        ClusterError: `evaluation.actors` ask for more than the cluster has.
        DataError: A split cannot be read.
    """
    entry = _entry(experiment, protocols)
    kept = _read(entry)
    if kept is None:
        networks = {UNTRAINED: untrained_encoder(experiment), PIXELS: RawPixelEncoder()}
        kept = score_networks(experiment, networks, protocols)
        _write(entry, kept)
    return kept


def baseline_digest(experiment: Experiment, protocols: Sequence[str]) -> str:
    """Return a digest of all that decides the baselines' scores; empty: they are not to be kept.

    That is so where code of others has a part in them, or other nodes compute them.

    Raises:
        DataError: A split cannot be read.
    """
    own = {protocol.name for protocol in PROTOCOLS}
    if any(imports_in(experiment)) or not own.issuperset(protocols):
        return ""
    if evaluated_rows(experiment).by_actors:
        return ""
    data = experiment.data
    tree = {k: v for k, v in cfg.to_tree(experiment).items() if k not in LEFT_OUT}
    splits = {"train": data.train, "eval_train": data.eval_train, "test": data.test}
    limits = {"train": data.limit}
    return cfg.digest_of(
        {
            "experiment": tree,
            "protocols": list(protocols),
            "images": {
                role: Source.open(uri, data.columns, limits.get(role, 0)).fingerprint
                for role, uri in splits.items()
                if uri
            },
            "code": code_digest(),
            "libraries": versions_of(LIBRARIES),
            "machine": _machine(),
        }
    )


def _machine() -> dict[str, Any]:
    """Return what the last bits of a sum depend on."""
    device = best_device()
    return {
        "node": platform.node(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)},
    }


def _entry(experiment: Experiment, protocols: Sequence[str]) -> Path | None:
    digest = baseline_digest(experiment, protocols)
    return cache_folder("baselines") / f"{digest}.json" if digest else None


def _read(entry: Path | None) -> list[Score] | None:
    """Return the rows of an entry; None: there is none that can be read."""
    if entry is None:
        return None
    try:
        rows = [Score.from_tree(row) for row in json.loads(entry.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return rows if [row.name for row in rows] == [UNTRAINED, PIXELS] else None


def _write(entry: Path | None, rows: Sequence[Score]) -> None:
    """Store rows whole or not at all: two processes may write the same."""
    if entry is None:
        return
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        fs, path = filesystem(str(entry))
        write_text_whole(fs, path, json.dumps([row.as_tree() for row in rows]))
    except OSError as error:  # a cache that cannot be written costs time alone
        log.debug("%s was not written: %s", entry, error)
