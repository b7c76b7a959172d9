"""The formats that an encoder is exported in: one table, an entry and two functions each.

A format is written from the module in float32 and eval mode, and then read back and compared with
it, so that a file that computes something else is never handed out.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simclr_ray.config import nearest
from simclr_ray.config.imports import IMPORT_PATH, import_object
from simclr_ray.errors import CheckpointError, ConfigError, ConfigIssue

# File and module do the same float32 arithmetic with kernels that may be fused differently:
# a relative 1e-4 of the largest feature is far above rounding and far below any real fault.
TOLERANCE: Final = 1e-4
CHECKED_BATCHES: Final = (1, 3)  # the exported batch size is 2: neither is what was traced
Network = Callable[[Tensor], Tensor]


class ExportFormat(NamedTuple):
    """One format.

    Attributes:
        name: What it is asked for by.
        file: Its file in an encoder folder.
        write: Writes the file: (path, encoder, example images float32 [2, C, S, S] in [0, 1]).
        check: Returns the network of the file, to be compared with the encoder, given as second
            argument; None where the file holds no network, after a check of its own.
    """

    name: str
    file: str
    write: Callable[[Path, nn.Module, Tensor], None]
    check: Callable[[Path, nn.Module], Network | None]


def write_checked(
    chosen: ExportFormat,
    path: Path,
    encoder: nn.Module,
    size: int,
    feature_dim: int,
    channels: int = 3,
) -> None:
    """Write an encoder in a format, and check the *stored* file against it.

    Raises:
        CheckpointError: The file does not compute what the module computes, or that is no F.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        chosen.write(path, encoder, torch.rand(2, channels, size, size, generator=generator))
        stored = chosen.check(path, encoder)
    if stored is None:
        return
    for n in CHECKED_BATCHES:
        images = torch.rand(n, channels, size, size, generator=generator)
        with torch.inference_mode():
            got, want = stored(images), encoder(images)
        if want.shape != (n, feature_dim):
            raise CheckpointError(
                f"the encoder gives {tuple(want.shape)}, not ({n}, {feature_dim})"
            )
        worst = float((got - want).abs().max() / want.abs().max().clamp(min=1e-6))
        if not worst <= TOLERANCE:
            raise CheckpointError(
                f"the exported {chosen.name} differs from the module by {worst:.1e} of the largest "
                f"feature on a batch of {n}"
            )


def _write_weights(path: Path, encoder: nn.Module, example: Tensor) -> None:  # noqa: ARG001 - needs none
    save_file({k: v.contiguous().clone() for k, v in encoder.state_dict().items()}, path)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # safetensors lets nobody else read, so that no service could


def _check_weights(path: Path, encoder: nn.Module) -> None:
    stored, own = load_file(path), encoder.state_dict()
    if stored.keys() != own.keys() or any(not torch.equal(stored[k], own[k]) for k in own):
        raise CheckpointError(f"{path} does not hold the weights of the encoder")


def _write_program(path: Path, encoder: nn.Module, example: Tensor) -> None:
    """Export the module with a free batch size."""
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        # torch.export warns of its own deprecated internals, differently in each release.
        warnings.simplefilter("ignore")
        program = torch.export.export(encoder, (example,), dynamic_shapes=({0: batch},))
        program.example_inputs = None  # the only part of the file that would be a pickle
        torch.export.save(program, path)


def read_program(path: Path) -> nn.Module:
    """Return the network of an exported program, which is in eval mode for good.

    Raises:
        CheckpointError: The file is missing or broken.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(path).module()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no exported program: {error}") from error


def _check_program(path: Path, encoder: nn.Module) -> Network:  # noqa: ARG001 - compared by the caller
    return read_program(path)


SAFETENSORS: Final = ExportFormat(
    "safetensors", "model.safetensors", _write_weights, _check_weights
)
TORCH_EXPORT: Final = ExportFormat("torch-export", "encoder.pt2", _write_program, _check_program)
FORMATS: Final[Sequence[ExportFormat]] = (SAFETENSORS, TORCH_EXPORT)


def formats_named(names: Sequence[str]) -> list[ExportFormat]:
    """Return formats by their names, `SAFETENSORS` first: an encoder is read back from its weights.

    A name may be the import path of a function without arguments that returns an `ExportFormat`.

    Raises:
        ConfigError: There is no format of a name, or its code is not permitted or returns none.
    """
    format_of = {chosen.name: chosen for chosen in FORMATS}
    wrong = [
        ConfigIssue(
            "--format", f"got {name!r}; allowed: {', '.join(format_of)}{nearest(name, format_of)}"
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
        raise ConfigError([ConfigIssue(path, f"called without arguments: {error}")]) from error
    if not isinstance(made, ExportFormat):
        problem = f"returned {type(made).__name__}; expected an ExportFormat"
        raise ConfigError([ConfigIssue(path, problem)])
    if Path(made.file).name != made.file or made.file in {ours.file for ours in FORMATS}:
        problem = f"writes {made.file!r}; expected the name of a file that no other format has"
        raise ConfigError([ConfigIssue(path, problem)])
    return made
