"""Use a trained encoder: load it from wherever it is, and embed images with it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from simclr_ray.data.arrays import Float32s
from simclr_ray.errors import ConfigError
from simclr_ray.inference.encoder import AnyImage, Classifier, Encoder, OnBad
from simclr_ray.inference.encoder_files import load_folder
from simclr_ray.inference.encoder_folder import encoder_folder


def load_encoder(where: str | Path, *, tracking_uri: str = "") -> Encoder:
    """Return an encoder with its preprocessing, in eval mode and on the CPU.

    A `Classifier` where the run was a fine-tuning or another training of one.

    Args:
        where: a run folder, whose newest checkpoint is taken, or a checkpoint, by path or URI; a
            folder with `encoder.json` in it or, without checkpoints, in its `encoder/`; or a
            registered model: `models:/name@alias`, `models:/name/3`, `models:/name/latest`.
        tracking_uri: store of the registry; empty: $MLFLOW_TRACKING_URI, else SQLite in `runs`.

    Raises:
        ConfigError: there is no encoder, or no checkpoint that verifies.
        CheckpointError: its files are not whole.
        TrackingError: there is no such model, or the store cannot be reached.

    Example:
        >>> encoder = sr.load_encoder("models:/photos@newest").to("cuda")
        >>> encoder.embed(["a.jpg", Image.open("b.png")]).shape
        (2, 2048)
    """
    with (
        tempfile.TemporaryDirectory() as scratch,
        encoder_folder(where, Path(scratch), tracking_uri) as folder,
    ):
        return load_folder(folder)


def load_classifier(where: str | Path, *, tracking_uri: str = "") -> Classifier:
    """Return what `load_encoder` does, where it is a classifier.

    Raises:
        ConfigError: as in `load_encoder`, or it is an encoder alone.
        CheckpointError: as in `load_encoder`.
        TrackingError: as in `load_encoder`.
    """
    loaded = load_encoder(where, tracking_uri=tracking_uri)
    if not isinstance(loaded, Classifier):
        problem = "is an encoder without a classifier; `simclr-ray model finetune` trains one"
        raise ConfigError.of(str(where), problem)
    return loaded


def embed_images(
    where: str | Path,
    images: Sequence[AnyImage],
    *,
    tracking_uri: str = "",
    on_bad: OnBad | None = None,
) -> Float32s:
    """Return the embeddings of N images, float32 [N, F]: `Encoder.embed` of `load_encoder`.

    Args:
        where: as in `load_encoder`.
        images: of any kind that `Encoder.transform` takes, such as encoded bytes.
        tracking_uri: as in `load_encoder`.
        on_bad: as in `Encoder.embed`.

    Raises:
        ImageError: an image cannot be decoded and there is no `on_bad`; it names the position.
        ConfigError: as in `load_encoder`.
        CheckpointError: as in `load_encoder`.
        TrackingError: as in `load_encoder`.
    """
    return load_encoder(where, tracking_uri=tracking_uri).embed(images, on_bad=on_bad)
