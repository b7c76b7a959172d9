"""What dtype, device and mode a model runs in, and how images and weights get there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

Precision = Literal["float64", "float32", "bf16"]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.float32}


def best_device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def as_input(images: Tensor, device: torch.device, precision: Precision) -> Tensor:
    """Return uint8 images as [0, 1] in the dtype of `precision`, channels last, on `device`."""
    moved = images.to(device, non_blocking=True)
    x = moved.to(DTYPES[precision], memory_format=torch.channels_last)
    return x.mul_(1 / 255)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Return the autocast context of `precision`."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in eval mode, and put each of its modules back into the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def prepare_model(model: nn.Module, device: torch.device, precision: Precision) -> None:
    """Move `model` in place to `device`, in the dtype and memory format that `train` feeds it."""
    model.to(device=device, dtype=DTYPES[precision]).to(memory_format=torch.channels_last)
