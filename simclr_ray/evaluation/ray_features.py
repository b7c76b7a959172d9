"""Features of a split through Ray Data: row groups in, what each network makes of them out.

A split need not fit one process: actors read, decode and encode a row group at a time, and only
features come back. Each image is decoded once for all networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simclr_ray.augment.decode import DEFAULT_DECODER, ImageDecoder
from simclr_ray.config.experiment import EvaluationConfig
from simclr_ray.data.source import Source
from simclr_ray.errors import ClusterError, DataError
from simclr_ray.evaluation.features import (
    BadRow,
    decoded_rows,
    extract_features,
    grouped,
    sample_rows,
)
from simclr_ray.nn.precision import Precision, best_device


class SplitFeatures(NamedTuple):
    """What networks make of a split, ordered by id."""

    features: list[Tensor]  # float32 [M, F] of each network
    labels: Tensor  # int64 [M], -1 where there is none
    ids: Tensor  # int64 [M]
    bad: list[BadRow]


class _Extractor:
    """A Ray Data actor with the networks."""

    def __init__(
        self,
        source: Source,
        networks: list[nn.Module],
        size: int,
        decoder: ImageDecoder,
        settings: tuple[int, Precision],
    ) -> None:
        self.device = best_device()
        self.source, self.size, self.decoder = source, size, decoder
        self.networks = [network.to(self.device) for network in networks]
        self.batch_size, self.precision = settings

    def __call__(self, batch: dict[str, Any]) -> dict[str, NDArray[Any]]:
        """Return ids, labels, features and reasons of the rows of one group."""
        rows = np.concatenate(batch["rows"]).astype(np.int64)
        split = decoded_rows(self.source, rows, self.size, self.decoder)
        out: dict[str, Any] = {"id": split.ids.numpy(), "label": split.labels.numpy()}
        out["reason"] = np.full(len(split.ids), "", object)
        for index, network in enumerate(self.networks):
            out[str(index)] = extract_features(
                network, split.images, self.batch_size, self.device, self.precision
            ).numpy()
        for bad in split.bad:
            out = {key: _with(value, key, bad) for key, value in out.items()}
        return out


def extract(
    source: Source,
    networks: Sequence[nn.Module],
    size: int,
    evaluation: EvaluationConfig,
    *,
    limit: int = 0,
    decoder: ImageDecoder = DEFAULT_DECODER,
    precision: Precision = "float32",
) -> SplitFeatures:
    """Return what each network makes of the rows that `load_split` would choose.

    Args:
        source: The opened split.
        networks: `[m, C, S, S]` in [0, 1] -> `[m, F]`; they pickle.
        size: Side S of the views in pixels.
        evaluation: Number of actors, their resources, and images per forward pass.
        limit: Rows at most, the same ones as `load_split`; 0 takes all.
        decoder: Of its images.
        precision: Same as `extract_features`.

    Raises:
        ClusterError: The actors ask for more than the cluster has.
        DataError: No chosen row can be decoded.
    """
    _check_cluster(evaluation)
    groups = [rows.tolist() for _, rows in grouped(source, sample_rows(source, limit))]
    planned = ray.data.from_blocks([pa.table({"rows": [rows]}) for rows in groups])
    planned.context.enable_progress_bars = False
    planned.context.print_on_execution_start = False
    encoded = planned.map_batches(
        _Extractor,
        fn_constructor_args=(
            source, list(networks), size, decoder, (evaluation.batch_size, precision),
        ),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(evaluation.actors, len(groups))),
        num_cpus=evaluation.cpus_per_actor,
        num_gpus=evaluation.gpus_per_actor,
    )  # fmt: skip
    batches = list(encoded.iter_batches(batch_size=None, batch_format="numpy"))
    columns = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    order = np.argsort(columns["id"], kind="stable")
    columns = {key: column[order] for key, column in columns.items()}
    good = columns["reason"] == ""
    reasons = zip(columns["id"][~good], columns["reason"][~good], strict=True)
    bad = [BadRow(int(row_id), str(reason)) for row_id, reason in reasons]
    if not good.any():
        raise DataError(f"{source.uri}: none of {len(good)} rows is an image: {bad[0].reason}")
    features = [
        torch.from_numpy(np.stack(columns[str(i)][good]).astype(np.float32))
        for i in range(len(networks))
    ]
    labels, ids = (torch.from_numpy(columns[key][good].copy()) for key in ("label", "id"))
    return SplitFeatures(features, labels, ids, bad)


def _check_cluster(evaluation: EvaluationConfig) -> None:
    """Fail now where Ray would wait for ever."""
    cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for what, each in (("CPU", evaluation.cpus_per_actor), ("GPU", evaluation.gpus_per_actor)):
        if evaluation.actors * each > cluster.get(what, 0.0):
            raise ClusterError(
                f"evaluation.actors={evaluation.actors} with {each:g} {what}s each are more than "
                f"the cluster's {cluster.get(what, 0.0):g}"
            )


def _with(column: NDArray[Any], key: str, bad: BadRow) -> NDArray[Any]:
    """Return a column with the entry of a row that could not be decoded."""
    if key in ("id", "label", "reason"):
        entry: Any = {"id": bad.id, "label": -1, "reason": bad.reason}[key]
        return np.append(column, np.array([entry], column.dtype))
    return np.concatenate([column, np.zeros((1, *column.shape[1:]), column.dtype)])
