"""Use a trained encoder: load it from wherever it is, and embed images with it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from simclr_ray.augment import decode
from simclr_ray.inference.encoder_files import LoadedEncoder, load_folder
from simclr_ray.inference.encoder_folder import encoder_folder

BATCH_SIZE: Final = 256


def load_encoder(where: str | Path, *, tracking_uri: str = "") -> nn.Module:
    """Return an encoder in eval mode, [N, C, H, W] in [0, 1] -> [N, F].

    Args:
        where: a run folder, whose newest checkpoint is taken, or a checkpoint, by path or URI; a
            folder with `encoder.json` in it or, without checkpoints, in its `encoder/`; or a
            registered model: `models:/name@alias`, `models:/name/3`, `models:/name/latest`.
        tracking_uri: store of the registry; empty: $MLFLOW_TRACKING_URI, else SQLite in `runs`.

    Raises:
        ConfigError: there is no encoder, or no checkpoint that verifies.
        CheckpointError: its files are not whole.
        TrackingError: there is no such model, or the store cannot be reached.
    """
    return _loaded(where, tracking_uri).encoder


def _loaded(where: str | Path, tracking_uri: str) -> LoadedEncoder:
    with (
        tempfile.TemporaryDirectory() as scratch,
        encoder_folder(where, Path(scratch), tracking_uri) as folder,
    ):
        return load_folder(folder)


def embed_images(
    where: str | Path,
    images: Sequence[bytes],
    *,
    tracking_uri: str = "",
    on_bad: Callable[[int, str], None] | None = None,
) -> npt.NDArray[np.float32]:
    """Return the embeddings of N encoded images, float32 [N, F], by the evaluation view.

    Args:
        where: as in `load_encoder`.
        images: encoded images (JPEG, PNG, WebP, ...).
        tracking_uri: as in `load_encoder`.
        on_bad: is told position and reason of an image that cannot be decoded; its row is NaN.

    Raises:
        ImageError: an image cannot be decoded and there is no `on_bad`; it names the position.
        ConfigError: as in `load_encoder`.
        CheckpointError: as in `load_encoder`.
        TrackingError: as in `load_encoder`.
    """
    loaded = _loaded(where, tracking_uri)
    encoder, size, decoder = loaded.encoder, loaded.size, loaded.decoder
    embeddings = np.full((len(images), loaded.feature_dim), np.nan, dtype=np.float32)  # [N, F]
    for start in range(0, len(images), BATCH_SIZE):
        views: dict[int, npt.NDArray[np.uint8]] = {}
        for place in range(start, min(start + BATCH_SIZE, len(images))):
            try:
                views[place] = decode.evaluation_view(decoder.decode(images[place]), size)
            except decode.ImageError as error:
                if on_bad is None:
                    raise decode.ImageError(f"image {place}: {error}") from error
                on_bad(place, str(error))
        if not views:
            continue
        stacked = torch.from_numpy(np.stack(list(views.values())))
        batch = stacked.permute(0, 3, 1, 2).float().div(255)  # [n, C, S, S]
        with torch.inference_mode():
            embeddings[list(views)] = encoder(batch.contiguous()).numpy()
    return embeddings
