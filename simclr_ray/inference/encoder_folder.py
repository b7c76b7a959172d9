"""Finds the encoder that a path, a URI or a `models:` address names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from simclr_ray.errors import ConfigError
from simclr_ray.inference.encoder_files import CARD, ENCODER_FOLDER
from simclr_ray.inference.registry import fetch_model
from simclr_ray.inference.version_files import with_dropped_weights
from simclr_ray.nn.pretrained import is_checkpoint, open_checkpoint
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.tracking.store import store_uri

OPTION = "RUN_OR_MODEL"


@contextmanager
def encoder_folder(where: str | Path, scratch: Path, tracking_uri: str = "") -> Iterator[Path]:
    """Give a local folder that is a checkpoint or holds an encoder's files, for `load_folder`.

    Args:
        where: A run folder or a checkpoint, by path or URI; a folder with `encoder.json`;
            `models:/name@alias`, `models:/name/3` or `models:/name/latest`.
        scratch: An existing folder for what is downloaded; it has to outlive the block.
        tracking_uri: Store of the registry; empty: $MLFLOW_TRACKING_URI, else SQLite in `runs`.

    Raises:
        ConfigError: There is no encoder, or no checkpoint that verifies.
        TrackingError: There is no such model, or the store cannot be reached.
    """
    if str(where).startswith("models:"):
        part = f"artifacts/{ENCODER_FOLDER}"
        fetched = fetch_model(str(where), scratch, uri=store_uri(tracking_uri), part=part)
        yield with_dropped_weights(fetched, scratch)
        return
    if (Path(where) / CARD).is_file():
        yield with_dropped_weights(Path(where), scratch)
        return
    folder = RunFolder.at(str(where))
    # A run's `encoder/` is of the checkpoint that was registered: training may have gone on.
    if is_checkpoint(str(where)) or folder.checkpoints():
        with open_checkpoint(str(where), OPTION) as (_, here):
            yield here
    elif CARD in folder.names(ENCODER_FOLDER):
        with folder.fetched(ENCODER_FOLDER) as here:
            yield here
    else:
        problem = f"{where} holds no {CARD} and no checkpoint, and is no models:/name@alias either"
        raise ConfigError.of(OPTION, problem)
