"""The finished encoder outside of training: its files, the registry version, and back.

`model.safetensors` holds the weights, `encoder.json` says what they are weights of, `encoder.pt2`
is the same network as a `torch.export` program that needs no code of ours. A classifier has its
own weights and program beside them, from features to class scores. None of them is a pickle. Which
files there are, `export_formats` says. A registry version carries them all, with `pyfunc.py` and
`augment/decode/` as plain source, so it runs with mlflow, torch, pillow, numpy and pandas alone.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from simclr_ray.augment.decode import ImageDecoder, image_decoder
from simclr_ray.errors import CheckpointError, SimclrRayError, one_line
from simclr_ray.inference.encoder import Classifier, Encoder
from simclr_ray.inference.export_formats import (
    FORMATS,
    SAFETENSORS,
    TORCH_EXPORT,
    ExportFormat,
    check_weights,
    compare,
    read_program,
    write_checked,
    write_program,
    write_weights,
)
from simclr_ray.nn import build as networks
from simclr_ray.nn.pretrained import names_in
from simclr_ray.storage import checkpoint
from simclr_ray.storage.provenance import sha256, versions_of

FORMAT_VERSION: Final = 1
CARD: Final = "encoder.json"
WEIGHTS: Final = SAFETENSORS.file
PROGRAM: Final = TORCH_EXPORT.file
CLASSIFIER_WEIGHTS: Final = "classifier.safetensors"
CLASSIFIER_PROGRAM: Final = "classifier.pt2"
ENCODER_FOLDER: Final = "encoder"
DECODE_FOLDER: Final = "decode"
REQUIREMENTS: Final = ("mlflow", "torch", "pillow", "numpy", "pandas")
# What an image may be decoded by where it is installed.
OPTIONAL_DECODERS: Final = ("imagecodecs", "pi-heif", "pydicom", "tifffile")


class ClassifierCard(NamedTuple):
    """What `encoder.json` says of a classifier.

    Attributes:
        head: config tree of the head (`experiment.head`).
        class_names: of its K classes.
        weights_sha256: of `classifier.safetensors`.
    """

    head: dict[str, Any]
    class_names: list[str]
    weights_sha256: str


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
        classifier: of a classifier, a `ClassifierCard`; absent of an encoder alone.
    """

    format: int
    encoder: dict[str, Any]
    size: int
    feature_dim: int
    weights_sha256: str
    versions: dict[str, str]
    white: float | list[float] = 0
    channels: int = 3
    classifier: dict[str, Any] | None = None

    @property
    def decoder(self) -> ImageDecoder:
        """What decodes images for the encoder."""
        return image_decoder(self.channels, self.white)

    def as_tree(self) -> dict[str, Any]:
        """Return the JSON tree of `encoder.json`."""
        return {k: v for k, v in self._asdict().items() if v is not None}


def write_encoder(
    folder: Path, encoder: Encoder, formats: Sequence[ExportFormat] = FORMATS
) -> None:
    """Write the files of an encoder to `folder`, which appears whole or not at all.

    Args:
        folder: created; files of an earlier export in it are replaced.
        encoder: it is copied to CPU, float32, eval mode.
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
            write_checked(chosen, new / chosen.file, frozen)
        white = encoder.decoder.white
        card = EncoderCard(
            format=FORMAT_VERSION,
            encoder=encoder.config,
            size=encoder.size,
            feature_dim=encoder.feature_dim,
            weights_sha256=sha256(new / WEIGHTS),
            versions=versions_of((*REQUIREMENTS, *OPTIONAL_DECODERS, "safetensors")),
            white=list(white) if isinstance(white, tuple) else white,
            channels=encoder.channels,
            classifier=_write_classifier(new, frozen) if isinstance(frozen, Classifier) else None,
        )
        text = json.dumps(card.as_tree(), indent=2) + "\n"
        (new / CARD).write_text(text, encoding="utf-8")
        if folder.exists():
            shutil.move(folder, Path(scratch) / "old")
        os.replace(new, folder)  # noqa: PTH105 - says that an existing folder would be an error


def _write_classifier(folder: Path, classifier: Classifier) -> dict[str, Any]:
    """Write the files of a classifier, [n, F] -> [n, K], and return its card."""
    names = classifier.class_names
    head, weights, program = (
        classifier.head, folder / CLASSIFIER_WEIGHTS, folder / CLASSIFIER_PROGRAM
    )  # fmt: skip
    write_weights(weights, head.state_dict())
    check_weights(weights, head)
    write_program(program, head, torch.zeros(2, classifier.feature_dim))
    compare("classifier", read_program(program), head, (classifier.feature_dim,), len(names))
    digest = sha256(weights)
    return ClassifierCard(classifier.head_config, list(names), digest)._asdict()


def write_encoder_of(folder: Path, out: Path, formats: Sequence[ExportFormat] = FORMATS) -> None:
    """Write the files of the encoder in a checkpoint to `out`, as `write_encoder` does.

    Raises:
        CheckpointError: The checkpoint is not whole, or a file computes otherwise.
    """
    write_encoder(out, load_folder(folder), formats)


def load_folder(folder: Path) -> Encoder:
    """Return the encoder in a folder of its files, or else of a checkpoint; on CPU, in eval mode.

    A `Classifier` where it was trained as one.

    Raises:
        CheckpointError: Files or checkpoint are not whole.
    """
    return _of_files(folder) if (folder / CARD).is_file() else _of_checkpoint(folder)


def _of_files(folder: Path) -> Encoder:
    card = read_card(folder)
    encoder = Encoder(
        read_encoder(folder),
        config=card.encoder,
        size=card.size,
        feature_dim=card.feature_dim,
        decoder=card.decoder,
    )
    if card.classifier is None:
        return encoder.eval()
    classifier = ClassifierCard(**card.classifier)
    return Classifier(
        encoder,
        head=_read_classifier(folder, classifier, card.feature_dim),
        head_config=classifier.head,
        class_names=classifier.class_names,
    ).eval()


def _read_classifier(folder: Path, card: ClassifierCard, feature_dim: int) -> nn.Module:
    """Return the head in a folder of files, in eval mode."""
    path = folder / CLASSIFIER_WEIGHTS
    if not path.is_file() or sha256(path) != card.weights_sha256:
        raise CheckpointError(f"{path} is not the file that {CARD} was written for")
    try:
        head = networks.classifier_from_tree(card.head, feature_dim)
        head.load_state_dict(load_file(path))
    except (SimclrRayError, SafetensorError, RuntimeError) as error:
        problem = f"weights and config do not fit: {one_line(error)}"
        raise CheckpointError(f"{folder}: {problem}") from error
    return head.eval().requires_grad_(requires_grad=False)


def _of_checkpoint(folder: Path) -> Encoder:
    kept = checkpoint.read(folder)
    tree = kept.record["experiment"]
    channels = int(tree["data"].get("channels", 3))
    try:
        encoder = networks.encoder_from_tree(
            tree["encoder"], size=tree["augment"]["size"], channels=channels
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} names no encoder: {error}") from error
    checkpoint.restore_model(kept.tensors, encoder, prefix="model.encoder.")
    frozen = encoder.float().requires_grad_(requires_grad=False)
    whole = Encoder(
        frozen,
        config=tree["encoder"],
        size=tree["evaluation"]["size"] or tree["augment"]["size"],
        feature_dim=networks.feature_dim(frozen),
        decoder=image_decoder(channels, tree["data"].get("white", 0)),
    )
    head_config = tree.get("head", {})
    if head_config.get("name") != "classifier":
        return whole.eval()
    head = networks.classifier_from_tree(head_config, whole.feature_dim)
    checkpoint.restore_model(kept.tensors, head, prefix="model.head.")
    names = names_in(kept.record, head_config["num_classes"], folder)
    return Classifier(
        whole,
        head=head.float().requires_grad_(requires_grad=False),
        head_config=head_config,
        class_names=[*names, *map(str, range(len(names), head_config["num_classes"]))],
    ).eval()


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


def class_names_of(card: EncoderCard) -> list[str]:
    """Return the classes that the encoder's classifier tells apart; none without one."""
    return ClassifierCard(**card.classifier).class_names if card.classifier else []


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
        problem = f"weights and config do not fit: {one_line(error)}"
        raise CheckpointError(f"{folder}: {problem}") from error
    return encoder.eval().requires_grad_(requires_grad=False)
