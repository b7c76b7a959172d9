"""The finished encoder outside of training: its files, the registry version, and back.

`model.safetensors` holds the weights, `encoder.json` says what they are weights of, `encoder.pt2`
is the same network as a `torch.export` program that needs no code of ours. None of them is a
pickle. Which files there are, `export_formats` says. A registry version carries them all, with
`pyfunc.py` and `augment/decode/` as plain source, so it runs with mlflow, torch, pillow, numpy
and pandas alone.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from simclr_ray.augment.decode import ImageDecoder, image_decoder
from simclr_ray.errors import CheckpointError, SimclrRayError
from simclr_ray.inference.export_formats import (
    FORMATS,
    SAFETENSORS,
    TORCH_EXPORT,
    ExportFormat,
    read_program,
    write_checked,
)
from simclr_ray.nn import build as networks
from simclr_ray.storage import checkpoint
from simclr_ray.storage.provenance import sha256, versions_of

FORMAT_VERSION: Final = 1
CARD: Final = "encoder.json"
WEIGHTS: Final = SAFETENSORS.file
PROGRAM: Final = TORCH_EXPORT.file
ENCODER_FOLDER: Final = "encoder"
DECODE_FOLDER: Final = "decode"
REQUIREMENTS: Final = ("mlflow", "torch", "pillow", "numpy", "pandas")
# What an image may be decoded by where it is installed.
OPTIONAL_DECODERS: Final = ("imagecodecs", "pi-heif", "pydicom", "tifffile")


class EncoderCard(NamedTuple):
    """What `encoder.json` says: enough to rebuild the module and to check its weights.

    Attributes:
        format: version of this layout.
        encoder: config tree of the encoder (`experiment.encoder`).
        size: side of the evaluation view in pixels, S.
        feature_dim: F.
        white: `data.white` of the images it was trained on.
        weights_sha256: of `model.safetensors`.
        versions: of the libraries that wrote it.
        channels: `data.channels` of them; of cards that do not say it, 3.
    """

    format: int
    encoder: dict[str, Any]
    size: int
    feature_dim: int
    weights_sha256: str
    versions: dict[str, str]
    white: float | list[float] = 0
    channels: int = 3

    @property
    def decoder(self) -> ImageDecoder:
        """What decodes images for the encoder."""
        return image_decoder(self.channels, self.white)


class LoadedEncoder(NamedTuple):
    """An encoder, and of its card what a user of it needs."""

    encoder: nn.Module
    config: dict[str, Any]
    size: int
    feature_dim: int
    white: float | list[float] = 0
    channels: int = 3

    @property
    def decoder(self) -> ImageDecoder:
        """What decodes images for it."""
        return image_decoder(self.channels, self.white)


def write_encoder(
    folder: Path,
    encoder: nn.Module,
    *,
    config: Mapping[str, Any],
    size: int,
    feature_dim: int,
    white: float | list[float] = 0,
    channels: int = 3,
    formats: Sequence[ExportFormat] = FORMATS,
) -> None:
    """Write the files of an encoder to `folder`, which appears whole or not at all.

    Args:
        folder: created; files of an earlier export in it are replaced.
        encoder: float [N, C, H, W] in [0, 1] -> [N, F]; it is copied to CPU, float32, eval mode.
        config: tree of its config, such as `to_tree(experiment)["encoder"]`.
        size: side S of the views that it is for.
        feature_dim: F.
        white: `data.white` of the images that it is for.
        channels: C of them.
        formats: of `export_formats`, or others; `SAFETENSORS` must be among them.

    Raises:
        CheckpointError: a file does not compute what the module computes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    frozen = (
        copy.deepcopy(encoder).to("cpu", torch.float32).eval().requires_grad_(requires_grad=False)
    )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        for chosen in formats:
            write_checked(chosen, new / chosen.file, frozen, size, feature_dim, channels)
        card = EncoderCard(
            format=FORMAT_VERSION,
            encoder=dict(config),
            size=size,
            feature_dim=feature_dim,
            weights_sha256=sha256(new / WEIGHTS),
            versions=versions_of((*REQUIREMENTS, *OPTIONAL_DECODERS, "safetensors")),
            white=white,
            channels=channels,
        )
        text = json.dumps(card._asdict(), indent=2) + "\n"
        (new / CARD).write_text(text, encoding="utf-8")
        if folder.exists():
            shutil.move(folder, Path(scratch) / "old")
        os.replace(new, folder)  # noqa: PTH105 - says that an existing folder would be an error


def write_encoder_of(folder: Path, out: Path, formats: Sequence[ExportFormat] = FORMATS) -> None:
    """Write the files of the encoder in a checkpoint to `out`, as `write_encoder` does.

    Raises:
        CheckpointError: The checkpoint is not whole, or a file computes otherwise.
    """
    loaded = load_folder(folder)
    write_encoder(
        out,
        loaded.encoder,
        config=loaded.config,
        size=loaded.size,
        feature_dim=loaded.feature_dim,
        white=loaded.white,
        channels=loaded.channels,
        formats=formats,
    )


def load_folder(folder: Path) -> LoadedEncoder:
    """Return the encoder in a folder of its files, or else of a checkpoint; on CPU, in eval mode.

    Raises:
        CheckpointError: Files or checkpoint are not whole.
    """
    if (folder / CARD).is_file():
        card = read_card(folder)
        network = read_encoder(folder)
        return LoadedEncoder(
            network, card.encoder, card.size, card.feature_dim, card.white, card.channels
        )
    kept = checkpoint.read(folder)
    tree = kept.record["experiment"]
    size = tree["evaluation"]["size"] or tree["augment"]["size"]
    channels = int(tree["data"].get("channels", 3))
    try:
        encoder = networks.encoder_from_tree(
            tree["encoder"], size=tree["augment"]["size"], channels=channels
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} names no encoder: {error}") from error
    checkpoint.restore_model(kept.tensors, encoder, prefix="model.encoder.")
    frozen = encoder.float().eval().requires_grad_(requires_grad=False)
    white, feature_dim = tree["data"].get("white", 0), networks.feature_dim(frozen)
    return LoadedEncoder(frozen, tree["encoder"], size, feature_dim, white, channels)


def read_card(folder: Path) -> EncoderCard:
    """Return the checked `encoder.json` of an encoder folder.

    Raises:
        CheckpointError: it is missing, broken, or of a later format.
    """
    path = folder / CARD
    try:
        card = EncoderCard(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} describes no encoder: {error}") from error
    if card.format != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {card.format}; this version reads {FORMAT_VERSION}"
        )
    return card


def read_encoder(folder: Path) -> nn.Module:
    """Return the encoder in `folder` in eval mode, on CPU, rebuilt from config and safetensors.

    One of imported code is its exported program instead, which runs no code of the user's.

    Raises:
        CheckpointError: a file is missing or altered, or the weights do not fit the config.
    """
    card = read_card(folder)
    if card.encoder.get("name") == "import":  # its code is the user's, and need not be here
        return read_program(folder / PROGRAM)
    path = folder / WEIGHTS
    if not path.is_file() or sha256(path) != card.weights_sha256:
        raise CheckpointError(f"{path} is not the file that {CARD} was written for")
    try:
        encoder = networks.encoder_from_tree(card.encoder, size=card.size, channels=card.channels)
        encoder.load_state_dict(load_file(path))
    except (SimclrRayError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: weights and config do not fit: {error}") from error
    return encoder.eval().requires_grad_(requires_grad=False)
