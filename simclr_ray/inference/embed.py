"""Use a trained encoder: load it from wherever it is, and embed images with it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from simclr_ray.augment import decode
from simclr_ray.errors import CheckpointError
from simclr_ray.inference.encoder_files import CARD, ENCODER_FOLDER, read_card, read_encoder
from simclr_ray.inference.registry import fetch_model
from simclr_ray.nn import build as networks
from simclr_ray.nn.pretrained import open_checkpoint
from simclr_ray.storage import checkpoint
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.tracking.store import store_uri

BATCH_SIZE: Final = 256


def load_encoder(where: str | Path, *, tracking_uri: str = "") -> nn.Module:
    """Return an encoder in eval mode, [N, 3, H, W] in [0, 1] -> [N, F].

    Args:
        where: a run folder, a checkpoint, a folder with `encoder.json` in it or in its
            `encoder/`, or a registered model:
            `models:/name@alias`, `models:/name/3`, `models:/name/latest`.
        tracking_uri: store of the registry; empty: $MLFLOW_TRACKING_URI, else SQLite in `runs`.

    Raises:
        CheckpointError: there is no whole encoder.
        TrackingError: there is no such model, or the store cannot be reached.
    """
    return _loaded(where, tracking_uri).encoder


class _Loaded(NamedTuple):
    encoder: nn.Module
    size: int  # side of the view that it embeds
    feature_dim: int


def _loaded(where: str | Path, tracking_uri: str) -> _Loaded:
    """Return the encoder at `where`: its files if there are any, else that of a checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        files = _encoder_folder(where, Path(scratch), tracking_uri)
        if files is not None:
            card = read_card(files)
            return _Loaded(read_encoder(files), card.size, card.feature_dim)
        if not _holds_checkpoints(where):
            raise CheckpointError(
                f"{where} holds no {CARD} and no checkpoint, and is no models:/name@alias either"
            )
        with open_checkpoint(str(where), "RUN") as (_, folder):
            return _checkpoint_encoder(folder)


def _holds_checkpoints(where: str | Path) -> bool:
    if (Path(where) / checkpoint.RECORD).is_file():
        return True
    return not Path(where).is_file() and bool(RunFolder.at(str(where)).checkpoints())


def _checkpoint_encoder(folder: Path) -> _Loaded:
    kept = checkpoint.read(folder)
    tree = kept.record["experiment"]
    encoder = networks.encoder_from_tree(tree["encoder"], size=tree["augment"]["size"])
    checkpoint.restore_model(kept.tensors, encoder, prefix="model.encoder.")
    frozen = encoder.float().eval().requires_grad_(requires_grad=False)
    size = tree["evaluation"]["size"] or tree["augment"]["size"]
    return _Loaded(frozen, size, networks.feature_dim(encoder))


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
        CheckpointError: as in `load_encoder`.
        TrackingError: as in `load_encoder`.
    """
    encoder, size, feature_dim = _loaded(where, tracking_uri)
    embeddings = np.full((len(images), feature_dim), np.nan, dtype=np.float32)  # [N, F]
    for start in range(0, len(images), BATCH_SIZE):
        views: dict[int, npt.NDArray[np.uint8]] = {}
        for place in range(start, min(start + BATCH_SIZE, len(images))):
            try:
                views[place] = decode.evaluation_view(decode.decode_image(images[place]), size)
            except decode.ImageError as error:
                if on_bad is None:
                    raise decode.ImageError(f"image {place}: {error}") from error
                on_bad(place, str(error))
        if not views:
            continue
        stacked = torch.from_numpy(np.stack(list(views.values())))
        batch = stacked.permute(0, 3, 1, 2).float().div(255)  # [n, 3, S, S]
        with torch.inference_mode():
            embeddings[list(views)] = encoder(batch.contiguous()).numpy()
    return embeddings


def _encoder_folder(where: str | Path, scratch: Path, tracking_uri: str) -> Path | None:
    """Return the folder that holds `encoder.json`, downloaded to `scratch` if need be, or None."""
    if str(where).startswith("models:"):
        uri = store_uri(tracking_uri)
        return fetch_model(str(where), scratch, uri=uri, part=f"artifacts/{ENCODER_FOLDER}")
    folders = [f for f in (Path(where), Path(where) / ENCODER_FOLDER) if (f / CARD).is_file()]
    return folders[0] if folders else None
