"""What an export format is, and the two that every encoder has: weights and a program.

A format is written from the encoder in float32 and eval mode, and then read back and compared with
it, so that a file that computes something else is never handed out. Those of other libraries lie in
`export_others`; `export` has the table of all.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simclr_ray.errors import CheckpointError, one_line
from simclr_ray.inference.encoder import Encoder

# File and module do the same float32 arithmetic with kernels that may be fused differently:
# a relative 1e-4 of the largest feature is far above rounding and far below any real fault.
TOLERANCE: Final = 1e-4
CHECKED_BATCHES: Final = (1, 3)  # the exported batch size is 2: neither is what was traced
Network = Callable[[Tensor], Tensor]


def any_encoder(encoder: Encoder) -> str:  # noqa: ARG001 - as of all
    """Return no reason against an encoder."""
    return ""


class ExportFormat(NamedTuple):
    """One format.

    Attributes:
        name: What it is asked for by.
        file: Its file, or its folder, in an encoder folder.
        write: Writes it: (path, encoder, example images float32 [2, C, S, S] in [0, 1]).
        check: Returns the network of the file, to be compared with the encoder, given as second
            argument; None where the file holds no network, after a check of its own.
        problem: Why an encoder cannot be written so; empty: it can.
    """

    name: str
    file: str
    write: Callable[[Path, Encoder, Tensor], None]
    check: Callable[[Path, Encoder], Network | None]
    problem: Callable[[Encoder], str] = any_encoder


def write_checked(chosen: ExportFormat, path: Path, encoder: Encoder) -> None:
    """Write an encoder in a format, and check the *stored* file against it.

    Raises:
        CheckpointError: The file does not compute what the encoder computes, or that is no F.
    """
    shape = (encoder.channels, encoder.size, encoder.size)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        chosen.write(path, encoder, torch.rand(2, *shape, generator=generator))
        stored = chosen.check(path, encoder)
    if stored is not None:
        compare(chosen.name, stored, encoder, shape, encoder.feature_dim)


def compare(
    name: str, stored: Network, network: Network, shape: tuple[int, ...], width: int
) -> None:
    """Raise `CheckpointError` where two networks, [n, *shape] -> [n, width], differ."""
    generator = torch.Generator().manual_seed(1)
    for n in CHECKED_BATCHES:
        inputs = torch.rand(n, *shape, generator=generator)
        with torch.inference_mode():
            got, want = stored(inputs), network(inputs)
        if want.shape != (n, width):
            raise CheckpointError(f"the network gives {tuple(want.shape)}, not ({n}, {width})")
        worst = float((got - want).abs().max() / want.abs().max().clamp(min=1e-6))
        if not worst <= TOLERANCE:
            raise CheckpointError(
                f"the exported {name} differs from the module by {worst:.1e} of the largest "
                f"feature on a batch of {n}"
            )


def write_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors that everybody may read, as other files."""
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path)
    permit_reading(path)


def permit_reading(path: Path) -> None:
    """Give a file the usual mode: safetensors lets nobody else read, so that no service could."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def check_weights(path: Path, network: nn.Module) -> None:
    """Raise `CheckpointError` where a file of safetensors does not hold a network's weights."""
    stored, own = load_file(path), network.state_dict()
    if stored.keys() != own.keys() or any(not torch.equal(stored[k], own[k]) for k in own):
        raise CheckpointError(f"{path} does not hold the weights of the encoder")


def write_program(path: Path, network: nn.Module, example: Tensor) -> None:
    """Export a network with a free batch size, as `torch.export` does."""
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        # torch.export warns of its own deprecated internals, differently in each release.
        warnings.simplefilter("ignore")
        program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
        program.example_inputs = None  # the only part of the file that would be a pickle
        torch.export.save(program, path)


def program_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of an exported program by the names that its network had for them.

    Raises:
        CheckpointError: The file is missing or broken.
    """
    return dict(_loaded(path).state_dict)


# torch keeps what it reads in a global, and asserts that nobody else is reading
_ONE_AT_A_TIME = threading.Lock()


def _loaded(path: Path) -> torch.export.ExportedProgram:
    try:
        with _ONE_AT_A_TIME, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no exported program: {one_line(error)}") from error


def read_program(path: Path) -> nn.Module:
    """Return the network of an exported program, which is in eval mode for good.

    Raises:
        CheckpointError: The file is missing or broken.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = _loaded(path).module()
    # which would refuse `eval()`, also of a module that holds it; what it computes stays as it is
    for name in ("train", "eval"):
        if name in vars(network):
            delattr(network, name)
    return network


SAFETENSORS: Final = ExportFormat(
    "safetensors",
    "model.safetensors",
    lambda path, encoder, _: write_weights(path, encoder.network.state_dict()),
    lambda path, encoder: check_weights(path, encoder.network),
)
TORCH_EXPORT: Final = ExportFormat(
    "torch-export",
    "encoder.pt2",
    lambda path, encoder, example: write_program(path, encoder.network, example),
    lambda path, _: read_program(path),
)
FORMATS: Final[Sequence[ExportFormat]] = (SAFETENSORS, TORCH_EXPORT)
