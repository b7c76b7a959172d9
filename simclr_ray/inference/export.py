"""An encoder as files, from wherever it is: a run, a checkpoint, or the model registry."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from simclr_ray.errors import ConfigError, ConfigIssue
from simclr_ray.inference.encoder_files import CARD, load_folder, write_encoder_of
from simclr_ray.inference.encoder_folder import encoder_folder
from simclr_ray.inference.export_formats import FORMATS, ExportFormat, formats_named, write_checked
from simclr_ray.storage.filesystem import check_makeable

FORMAT_NAMES: Final = tuple(chosen.name for chosen in FORMATS)


def export_encoder(
    where: str, out: Path, formats: Sequence[str] = FORMAT_NAMES, *, tracking_uri: str = ""
) -> list[str]:
    """Write the encoder at `where` into `out`, and return the names of its files.

    Args:
        where: Same as `encoder_folder`.
        out: A folder, made if absent; files of an earlier export are replaced.
        formats: Names of `export_formats.FORMATS`, or import paths as `formats_named` takes them;
            weights are written in any case.
        tracking_uri: Same as `encoder_folder`.

    Raises:
        ConfigError: A format is unknown, `out` holds something else, or there is no encoder.
        CheckpointError: The checkpoint is not whole, or a file computes otherwise.
        TrackingError: There is no such model, or the store cannot be reached.
    """
    chosen = formats_named(formats)
    wanted = [CARD, *(each.file for each in chosen)]
    ours = {CARD, *(each.file for each in FORMATS), *wanted}
    if out.is_file():
        raise ConfigError([ConfigIssue(str(out), "is a file; the encoder's files need a folder")])
    if out.resolve() == Path(where).resolve():
        raise ConfigError([ConfigIssue(str(out), "is where the encoder lies; choose another")])
    others = sorted(p.name for p in out.iterdir() if p.name not in ours) if out.is_dir() else []
    if others:
        problem = f"holds {others[0]}, which is no file of an encoder; choose another folder"
        raise ConfigError([ConfigIssue(str(out), problem)])
    with (
        tempfile.TemporaryDirectory() as scratch,
        encoder_folder(where, Path(scratch), tracking_uri) as folder,
    ):
        check_makeable(out)
        staged = Path(scratch) / "staged"
        if (folder / CARD).is_file():
            _copy_or_write(folder, staged, chosen)
        else:
            write_encoder_of(folder, staged, chosen)
        out.mkdir(parents=True, exist_ok=True)
        for name in ours:
            (out / name).unlink(missing_ok=True)
        for name in wanted:
            shutil.copy(staged / name, out / name)
    return wanted


def _copy_or_write(files: Path, out: Path, formats: Sequence[ExportFormat]) -> None:
    """Write an encoder's files into `out`: copies where `files` has them, the others anew."""
    out.mkdir()
    copied = [each for each in formats if each in FORMATS and (files / each.file).is_file()]
    for name in (CARD, *(each.file for each in copied)):
        shutil.copy(files / name, out / name)
    others = [each for each in formats if each not in copied]
    if not others:
        return
    loaded = load_folder(files)  # once for all of them
    for each in others:
        write_checked(each, out / each.file, loaded.encoder, loaded.size, loaded.feature_dim)
