"""The finished encoder outside of training: three files, the registry version, and back.

`model.safetensors` holds the weights, `encoder.json` says what they are weights of, `encoder.pt2`
is the same network as a `torch.export` program that needs no code of ours. None of them is a
pickle. A registry version carries all three, with `embedder.py` and `data/decode.py` as plain
source, so it runs with mlflow, torch, pillow, numpy and pandas alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from simclr_ray import checkpoint
from simclr_ray import model as networks
from simclr_ray.data import decode
from simclr_ray.errors import CheckpointError, SimclrRayError
from simclr_ray.machine import code_commit
from simclr_ray.mlflow_store import ModelParts, RegisteredEncoder, store_uri
from simclr_ray.registry import fetch_model, register_model
from simclr_ray.tracking import TrackedRun

FORMAT_VERSION: Final = 1
WEIGHTS: Final = "model.safetensors"
CARD: Final = "encoder.json"
PROGRAM: Final = "encoder.pt2"
ENCODER_FOLDER: Final = "encoder"
REQUIREMENTS: Final = ("mlflow", "torch", "pillow", "numpy", "pandas")

# Program and module do the same float32 arithmetic with kernels that may be fused differently:
# a relative 1e-4 of the largest feature is far above rounding and far below any real fault.
PROGRAM_TOLERANCE: Final = 1e-4
CHECKED_BATCHES: Final = (1, 3)  # the exported batch size is 2: neither is what was traced
BATCH_SIZE: Final = 256


class EncoderCard(NamedTuple):
    """What `encoder.json` says: enough to rebuild the module and to judge its weights.

    Attributes:
        format: version of this layout.
        encoder: config tree of the encoder (`experiment.encoder`).
        size: side of the evaluation view in pixels, S.
        feature_dim: F.
        weights_sha256: of `model.safetensors`.
        versions: of the libraries that wrote it.
    """

    format: int
    encoder: dict[str, Any]
    size: int
    feature_dim: int
    weights_sha256: str
    versions: dict[str, str]


def write_encoder(
    folder: Path, encoder: nn.Module, *, config: Mapping[str, Any], size: int, feature_dim: int
) -> None:
    """Write the three files of an encoder to `folder`, which appears whole or not at all.

    Args:
        folder: created; files of an earlier export in it are replaced.
        encoder: float [N, 3, H, W] in [0, 1] -> [N, F]; it is copied to CPU, float32, eval mode.
        config: tree of its config, such as `to_tree(experiment)["encoder"]`.
        size: side S of the views that it is for.
        feature_dim: F.

    Raises:
        CheckpointError: the exported program does not compute what the module computes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    frozen = (
        copy.deepcopy(encoder).to("cpu", torch.float32).eval().requires_grad_(requires_grad=False)
    )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        weights = {k: v.contiguous().clone() for k, v in frozen.state_dict().items()}
        save_file(weights, new / WEIGHTS)
        _write_program(new / PROGRAM, frozen, size, feature_dim)
        card = EncoderCard(
            format=FORMAT_VERSION,
            encoder=dict(config),
            size=size,
            feature_dim=feature_dim,
            weights_sha256=_sha256(new / WEIGHTS),
            versions={name: metadata.version(name) for name in (*REQUIREMENTS, "safetensors")},
        )
        text = json.dumps(card._asdict(), indent=2) + "\n"
        (new / CARD).write_text(text, encoding="utf-8")
        if folder.exists():
            shutil.move(folder, Path(scratch) / "old")
        os.replace(new, folder)  # noqa: PTH105 - says that an existing folder would be an error


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

    Raises:
        CheckpointError: a file is missing or altered, or the weights do not fit the config.
    """
    card = read_card(folder)
    path = folder / WEIGHTS
    if not path.is_file() or _sha256(path) != card.weights_sha256:
        raise CheckpointError(f"{path} is not the file that {CARD} was written for")
    try:
        encoder = networks.encoder_from_tree(card.encoder, size=card.size)
        encoder.load_state_dict(load_file(path))
    except (SimclrRayError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: weights and config do not fit: {error}") from error
    return encoder.eval().requires_grad_(requires_grad=False)


def load_encoder(where: str | Path, *, tracking_uri: str = "") -> nn.Module:
    """Return an encoder in eval mode, [N, 3, H, W] in [0, 1] -> [N, F].

    Args:
        where: a checkpoint, a folder with `encoder.json` in it or in its `encoder/`, or a
            registered model:
            `models:/name@alias`, `models:/name/3`, `models:/name/latest`.
        tracking_uri: store of the registry; empty: $MLFLOW_TRACKING_URI, else SQLite in `runs`.

    Raises:
        CheckpointError: there is no whole encoder.
        TrackingError: there is no such model, or the store cannot be reached.
    """
    if (Path(where) / checkpoint.RECORD).is_file():
        return _checkpoint_encoder(Path(where))
    with tempfile.TemporaryDirectory() as scratch:
        return read_encoder(_encoder_folder(where, Path(scratch), tracking_uri))


def _checkpoint_encoder(folder: Path) -> nn.Module:
    kept = checkpoint.read(folder)
    tree = kept.record["experiment"]
    encoder = networks.encoder_from_tree(tree["encoder"], size=tree["augment"]["size"])
    checkpoint.restore_model(kept.tensors, encoder, prefix="model.encoder.")
    return encoder.float().eval().requires_grad_(requires_grad=False)


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
    with tempfile.TemporaryDirectory() as scratch:
        folder = _encoder_folder(where, Path(scratch), tracking_uri)
        card, encoder = read_card(folder), read_encoder(folder)
    embeddings = np.full((len(images), card.feature_dim), np.nan, dtype=np.float32)  # [N, F]
    for start in range(0, len(images), BATCH_SIZE):
        views: dict[int, npt.NDArray[np.uint8]] = {}
        for place in range(start, min(start + BATCH_SIZE, len(images))):
            try:
                views[place] = decode.evaluation_view(decode.decode_image(images[place]), card.size)
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


def register(
    folder: Path,
    run: TrackedRun,
    *,
    name: str,
    alias: str,
    example: bytes,
    tags: Mapping[str, str | int | float],
) -> RegisteredEncoder:
    """Make the encoder in `folder` a new version of the registered model `name`.

    The same weights and checkpoint of a run are one version, however often they are registered.

    Args:
        folder: written by `write_encoder`; travels in the version, for `load_encoder`.
        run: the run that the version belongs to.
        name: registered model, created where it does not exist.
        alias: moved to the new version at the very end.
        example: one encoded image, kept as the input example.
        tags: lineage and scores, such as `dataset_fingerprint`, `experiment_digest`, `seed`,
            `knn_top1`; `weights_sha256` is added, and `code_commit` in a git checkout.

    Raises:
        CheckpointError: `folder` is no whole encoder.
        ImageError: `example` cannot be decoded.
        TrackingError: the alias is reserved, or the registry refuses or cannot be reached.
    """
    card = read_card(folder)
    read_encoder(folder)
    decode.decode_image(example)
    commit = code_commit()
    all_tags = {key: str(value) for key, value in tags.items()}
    all_tags["weights_sha256"] = card.weights_sha256
    if commit:
        all_tags.setdefault("code_commit", commit)
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch) / ENCODER_FOLDER  # MLflow names an artifact by its last path part
        shutil.copytree(folder, staged)
        parts = ModelParts(
            code=Path(__file__).with_name("embedder.py"),
            artifacts={"encoder": staged, "decode": Path(decode.__file__)},
            requirements=pinned_requirements(),
            example=example,
            feature_dim=card.feature_dim,
            metadata={"encoder": card._asdict(), "tags": all_tags},
        )
        return register_model(
            run,
            name,
            parts,
            alias=alias,
            tags=all_tags,
            same=[key for key in ("weights_sha256", "checkpoint") if key in all_tags],
        )


def pinned_requirements() -> list[str]:
    """Return `name==version` of what a registered model needs, as installed here.

    Local parts such as `+cpu` or `+cu130` are dropped: the package index knows no such versions.
    """
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS]


def _encoder_folder(where: str | Path, scratch: Path, tracking_uri: str) -> Path:
    """Return the folder that holds `encoder.json`, downloaded to `scratch` if need be."""
    if str(where).startswith("models:"):
        uri = store_uri(tracking_uri)
        return fetch_model(str(where), scratch, uri=uri, part=f"artifacts/{ENCODER_FOLDER}")
    found = [f for f in (Path(where), Path(where) / ENCODER_FOLDER) if (f / CARD).is_file()]
    if not found:
        raise CheckpointError(f"{where} holds no {CARD}, and is no models:/name@alias either")
    return found[0]


def _write_program(path: Path, encoder: nn.Module, size: int, feature_dim: int) -> None:
    """Export the module with a free batch size, and check the *stored* program against it."""
    generator = torch.Generator().manual_seed(0)
    example = torch.rand(2, 3, size, size, generator=generator)
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings(), torch.no_grad():
        # torch.export warns of its own deprecated internals, differently in each release.
        warnings.simplefilter("ignore")
        program = torch.export.export(encoder, (example,), dynamic_shapes=({0: batch},))
        program.example_inputs = None  # the only part of the file that would be a pickle
        torch.export.save(program, path)
        stored = torch.export.load(path).module()
    for n in CHECKED_BATCHES:
        images = torch.rand(n, 3, size, size, generator=generator)
        with torch.inference_mode():
            got, want = stored(images), encoder(images)
        if want.shape != (n, feature_dim):
            raise CheckpointError(
                f"the encoder gives {tuple(want.shape)}, not ({n}, {feature_dim})"
            )
        worst = float((got - want).abs().max() / want.abs().max().clamp(min=1e-6))
        if not worst <= PROGRAM_TOLERANCE:
            raise CheckpointError(
                f"the exported program differs from the module by {worst:.1e} of the largest "
                f"feature on a batch of {n}"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
