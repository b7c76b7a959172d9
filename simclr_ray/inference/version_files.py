"""Which of an encoder's files a registered version carries: each weight goes up once.

`model.safetensors` and `encoder.pt2` hold the same numbers. The program has to be there, since a
version runs without this package; the weights are written again from it when a version is fetched,
byte for byte, and checked by the hash in `encoder.json` as ever.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from simclr_ray.inference.encoder_files import (
    CLASSIFIER_PROGRAM,
    CLASSIFIER_WEIGHTS,
    PROGRAM,
    WEIGHTS,
)
from simclr_ray.inference.export_formats import program_weights, write_weights
from simclr_ray.storage.provenance import sha256

SAME: Final = ((WEIGHTS, PROGRAM), (CLASSIFIER_WEIGHTS, CLASSIFIER_PROGRAM))


def drop_repeated_weights(folder: Path) -> None:
    """Remove the weights that the programs in a folder hold; those stay that they do not hold so.

    Args:
        folder: As `write_encoder` writes it; a copy.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        for weights, program in _pairs(folder):
            again = Path(scratch) / weights.name
            write_weights(again, program_weights(program))
            if weights.is_file() and sha256(again) == sha256(weights):
                weights.unlink()


def write_dropped_weights(folder: Path) -> None:
    """Write the weights that `drop_repeated_weights` removed; versions of before have them.

    Args:
        folder: Of a version that was fetched.

    Raises:
        CheckpointError: A program cannot be read.
    """
    for weights, program in _pairs(folder):
        if not weights.is_file():
            write_weights(weights, program_weights(program))


def _pairs(folder: Path) -> Iterator[tuple[Path, Path]]:
    return (
        (folder / weights, folder / program)
        for weights, program in SAME
        if (folder / program).is_file()
    )
