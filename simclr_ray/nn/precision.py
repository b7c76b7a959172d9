"""What dtype, device and mode a model runs in, and how images and weights get there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

Precision = Literal["float64", "float32", "bf16"]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.float32}


def best_device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gpus_seen() -> Literal["", "NVIDIA", "AMD"]:
    """Return whose GPUs torch sees on this machine; empty: none."""
    if not torch.cuda.device_count():
        return ""
    return "AMD" if torch.version.hip else "NVIDIA"


def unusable_gpu(devices: Path = Path("/dev")) -> str:
    """Return why torch sees no GPU of a machine that has some; empty: it has none, or sees them.

    An NVIDIA driver older than torch's CUDA fails without a word: the count is 0, and a week of
    training would go on on the CPU. `CUDA_VISIBLE_DEVICES` that names none hides them on purpose.
    """
    there = len(list(devices.glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip()
    is_hidden = not re.match(r"\d|GPU-|MIG-", visible)  # such as NoDevFiles, which Slurm sets
    if not there or is_hidden or torch.cuda.device_count():
        return ""
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return (
        f"torch, {built}, sees none of this machine's NVIDIA devices ({there}): its driver may be "
        "older than that asks for (`nvidia-smi` shows it)"
    )


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
