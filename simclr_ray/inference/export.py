"""An encoder as files, from wherever it is: a run, a checkpoint, or the model registry."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from simclr_ray.config import nearest
from simclr_ray.config.imports import IMPORT_PATH, import_object
from simclr_ray.errors import CheckpointError, ConfigError, ConfigIssue
from simclr_ray.inference.encoder import Classifier
from simclr_ray.inference.encoder_files import (
    CARD,
    CLASSIFIER_PROGRAM,
    CLASSIFIER_WEIGHTS,
    load_folder,
    read_card,
    write_encoder,
)
from simclr_ray.inference.encoder_folder import encoder_folder
from simclr_ray.inference.export_formats import (
    FORMATS,
    SAFETENSORS,
    ExportFormat,
    write_checked,
)
from simclr_ray.inference.export_others import OTHERS
from simclr_ray.storage.filesystem import check_makeable

ALL_FORMATS: Final[Sequence[ExportFormat]] = (*FORMATS, *OTHERS)
OWN_FILES: Final = (
    CARD, CLASSIFIER_WEIGHTS, CLASSIFIER_PROGRAM, *(chosen.file for chosen in ALL_FORMATS),
)  # fmt: skip
FORMAT_NAMES: Final = tuple(chosen.name for chosen in FORMATS)

log = logging.getLogger(__name__)


def export_encoder(
    where: str | Path, out: Path, formats: Sequence[str] = FORMAT_NAMES, *, tracking_uri: str = ""
) -> list[str]:
    """Write the encoder at `where` into `out`, and return the names of its files.

    Args:
        where: Same as `encoder_folder`.
        out: A folder, made if absent. Other formats of an earlier export stay where it was of the
            same encoder; else they are removed, and that is logged.
        formats: Names of `ALL_FORMATS`, or import paths as `formats_named` takes them; weights are
            written in any case.
        tracking_uri: Same as `encoder_folder`.

    Raises:
        ConfigError: A format is unknown or not for this architecture, `out` holds something else,
            or there is no encoder.
        CheckpointError: The checkpoint is not whole, or a file computes otherwise.
        TrackingError: There is no such model, or the store cannot be reached.
    """
    chosen = formats_named(formats)
    files = {*OWN_FILES, *(each.file for each in chosen)}
    if out.is_file():
        raise ConfigError.of(str(out), "is a file; the encoder's files need a folder")
    if out.resolve() == Path(where).resolve():
        raise ConfigError.of(str(out), "is where the encoder lies; choose another")
    _check_replaceable(out, files)
    with (
        tempfile.TemporaryDirectory() as scratch,
        encoder_folder(where, Path(scratch), tracking_uri) as folder,
    ):
        check_makeable(out)
        staged = Path(scratch) / "staged"
        _copy_or_write(folder, staged, chosen)
        written = sorted(path.name for path in staged.iterdir())
        out.mkdir(parents=True, exist_ok=True)
        for name in files:
            _remove(_half(out / name))
        if not _is_same_encoder(out, staged):
            _remove_others(out, files - {CARD}, written)
        # the card first, which says of what a kill leaves here that it is an export
        for name in sorted(written, key=lambda name: name != CARD):
            _place(staged / name, out / name)
    return written


def _check_replaceable(out: Path, files: Collection[str]) -> None:
    """Raise `ConfigError` where a folder holds what no earlier export has written."""
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    halves = {_half(out / name).name for name in files}
    names = [name for name in names if name not in halves]
    others = [name for name in names if name not in files]
    if others:
        problem = f"holds {others[0]}, which is no file of an encoder; choose another folder"
        raise ConfigError.of(str(out), problem)
    try:
        if names:
            read_card(out)
    except CheckpointError as error:
        problem = f"holds {names[0]}, and no {CARD} of an earlier export; choose another folder"
        raise ConfigError.of(str(out), problem) from error


def _is_same_encoder(out: Path, staged: Path) -> bool:
    """Return whether an earlier export was of the same weights, settings and classifier."""
    if not (out / CARD).is_file():
        return False
    cards = (read_card(folder)._replace(versions={}) for folder in (out, staged))
    return next(cards) == next(cards)


def _remove_others(out: Path, files: Collection[str], written: Collection[str]) -> None:
    """Remove the files of an export of another encoder; what is not written anew is said."""
    present = sorted(name for name in files if (out / name).exists())
    for name in present:
        _remove(out / name)
    gone = [name for name in present if name not in written]
    if gone:
        log.warning("%s: removed %s, which were of another encoder", out, ", ".join(gone))


def _place(path: Path, target: Path) -> None:
    """Move a file or folder to a place, on whatever disk: it is there whole or not at all."""
    half = _half(target)
    shutil.move(path, half)
    if target.is_dir():
        shutil.rmtree(target)
    half.replace(target)


def _half(path: Path) -> Path:
    """Return what a file is called until it is whole."""
    return path.with_name(f".{path.name}.tmp")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _copy_or_write(folder: Path, out: Path, formats: Sequence[ExportFormat]) -> None:
    """Write an encoder into `out`: copies where `folder` has a format's file, the others anew.

    Raises:
        ConfigError: A format is not for this architecture; nothing is written.
    """
    encoder = load_folder(folder)
    issues = [ConfigIssue(f"--to {each.name}", each.problem(encoder)) for each in formats]
    if any(issue.problem for issue in issues):
        raise ConfigError([issue for issue in issues if issue.problem])
    own = [each for each in formats if each in FORMATS]
    if (folder / CARD).is_file():
        out.mkdir()
        names = (CARD, CLASSIFIER_WEIGHTS, CLASSIFIER_PROGRAM, *(each.file for each in own))
        for name in names:
            if (folder / name).is_file():
                shutil.copy(folder / name, out / name)
    else:
        write_encoder(out, encoder, own)
    for each in formats:
        if not (out / each.file).exists():
            write_checked(each, out / each.file, encoder)
    alone = [each.name for each in formats if each not in FORMATS]
    if isinstance(encoder, Classifier) and alone:
        log.warning(
            "without the classifier, which lies in %s: %s", CLASSIFIER_PROGRAM, ", ".join(alone)
        )


def formats_named(names: Sequence[str]) -> list[ExportFormat]:
    """Return formats by their names, `SAFETENSORS` first: an encoder is read back from its weights.

    A name may be the import path of a function without arguments that returns an `ExportFormat`.

    Raises:
        ConfigError: There is no format of a name, or its code is not permitted or returns none.
    """
    format_of = {chosen.name: chosen for chosen in ALL_FORMATS}
    wrong = [
        ConfigIssue(
            "--to", f"got {name!r}; allowed: {', '.join(format_of)}{nearest(name, format_of)}"
        )
        for name in names
        if name not in format_of and not IMPORT_PATH.fullmatch(name)
    ]
    if wrong:
        raise ConfigError(wrong)
    chosen = [format_of[name] if name in format_of else _imported(name) for name in names]
    return list(dict.fromkeys([SAFETENSORS, *chosen]))


def _imported(path: str) -> ExportFormat:
    try:
        made = import_object(path)()
    except TypeError as error:
        raise ConfigError.of(path, f"called without arguments: {error}") from error
    if not isinstance(made, ExportFormat):
        problem = f"returned {type(made).__name__}; expected an ExportFormat"
        raise ConfigError.of(path, problem)
    if Path(made.file).name != made.file or made.file in {each.file for each in ALL_FORMATS}:
        problem = f"writes {made.file!r}; expected the name of a file that no other format has"
        raise ConfigError.of(path, problem)
    return made
