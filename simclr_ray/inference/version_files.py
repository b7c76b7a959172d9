"""Which of an encoder's files a registered version carries: each weight goes up once.

`model.safetensors` and `encoder.pt2` hold the same numbers. The program has to be there, since a
version runs without this package; the weights are written again from it when a version is fetched,
byte for byte, and checked by the hash in `encoder.json` as ever.
"""

from __future__ import annotations

import os
import shutil
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


def with_dropped_weights(folder: Path, scratch: Path) -> Path:
    """Return a folder that has the weights too which `drop_repeated_weights` removed.

    That is `folder` itself where none lacks, as in versions of before, or what it has in a copy:
    a version may lie where nobody but who downloaded it writes.

    Args:
        folder: The files of a version, however they were fetched.
        scratch: An existing folder for the copy.

    Raises:
        CheckpointError: A program cannot be read.
    """
    dropped = [pair for pair in _pairs(folder) if not pair[0].is_file()]
    if not dropped:
        return folder
    whole = Path(tempfile.mkdtemp(dir=scratch)) / folder.name
    shutil.copytree(folder, whole, copy_function=_link)
    for weights, program in dropped:
        write_weights(whole / weights.name, program_weights(program))
    return whole


def _link(source: str, target: str) -> None:
    """Give a file a second name, or copy it to another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _pairs(folder: Path) -> Iterator[tuple[Path, Path]]:
    return (
        (folder / weights, folder / program)
        for weights, program in SAME
        if (folder / program).is_file()
    )
