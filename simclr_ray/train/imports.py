"""What is asked of a user's own components before Ray starts: found, hashed, and of the contract.

Each check calls the component once, on two or more images, in this process. What it finds wrong is
one line with what was expected.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from simclr_ray.augment.decode import image_decoder
from simclr_ray.augment.ops import Op
from simclr_ray.config.components import build
from simclr_ray.config.experiment import Experiment, ImportedLossConfig
from simclr_ray.config.imports import ImportConfig, imports_in, with_hashes
from simclr_ray.errors import CheckpointError, ConfigError, one_line
from simclr_ray.inference.encoder import Encoder
from simclr_ray.inference.export_formats import TORCH_EXPORT, write_checked
from simclr_ray.nn.build import build_encoder, feature_dim
from simclr_ray.nn.losses import Loss
from simclr_ray.optim import state_per_parameter
from simclr_ray.train.encoder_check import check_encoder

IMAGES: Final = 4
DIM: Final = 8


def resolve_imports(experiment: Experiment) -> Experiment:
    """Return the experiment with the sha256 of imported code filled in, each component checked.

    Raises:
        ConfigError: Code may not be imported, is not there, or breaks its contract.
    """
    if not any(imports_in(experiment)):
        return experiment
    experiment = with_hashes(experiment)
    checks: dict[str, Callable[[Experiment, Any], None]] = {
        "encoder": check_imported_encoder,
        "loss": check_loss,
        "optimizer": check_optimizer,
        "augment": check_op,
    }
    for where, node in imports_in(experiment):
        with _named(where, node):
            checks[where.partition(".")[0]](experiment, node)
    return experiment


def check_imported_encoder(experiment: Experiment, node: ImportConfig) -> None:
    """Build the encoder for each size that it will see, and try it."""
    build_encoder(node, size=experiment.evaluation_size, channels=experiment.data.channels)
    check_encoder(experiment)


def check_loss(experiment: Experiment, node: ImportedLossConfig) -> None:
    """Call the loss on a few images, and look at its value and gradient."""
    loss = build(node, Loss, global_batch_size=IMAGES)  # type: ignore[type-abstract] # by isinstance
    if loss.takes_labels != node.needs_labels:
        problem = f"returned a loss with takes_labels={loss.takes_labels}, which it does not have"
        raise ConfigError.of("", f"{problem} itself; name the class, not a function")
    generator = torch.Generator().manual_seed(0)
    dim = experiment.classifier.num_classes or DIM if experiment.classifier else DIM
    z1, z2 = (torch.randn(IMAGES, dim, generator=generator).requires_grad_() for _ in range(2))
    labels = torch.arange(IMAGES) % 2 if loss.takes_labels else None
    value: object = loss(z1, z2, labels)
    if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
        raise ConfigError.of("", f"gives {_shown(value)}; expected a float scalar")
    if value.requires_grad:
        value.backward()  # type: ignore[no-untyped-call] # torch's
    gradients = [z.grad for z in (z1, z2) if z.grad is not None]
    finite = all(torch.isfinite(t).all() for t in (value, *gradients))
    if not finite or not any(gradient.any() for gradient in gradients):
        problem = f"gives {value.item():g} for z1, z2 [{IMAGES}, {dim}] and no gradient"
        raise ConfigError.of("", f"{problem}; expected both, finite")
    metrics = loss.metrics(z1.detach(), z2.detach(), labels)
    if len(metrics) != 2:
        raise ConfigError.of("", "metrics must return BatchMetrics(top1, entropy)")


def check_optimizer(experiment: Experiment, node: ImportConfig) -> None:
    """Build the optimizer over one layer, and take a step."""
    del node  # the experiment's
    state_per_parameter(experiment.optimizer)


def check_op(experiment: Experiment, node: ImportConfig) -> None:
    """Transform a few images: the same shape and dtype, still in [0, 1]."""
    op, size = build(node, Op), experiment.augment.size  # type: ignore[type-abstract] # a protocol
    draws: object = op.num_draws(size)
    if not isinstance(draws, int) or draws < 0:
        raise ConfigError.of("", f"num_draws gives {draws!r}; expected a count")
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.random((3, experiment.data.channels, size, size), np.float32))
    out: object = op(images.clone(), rng.random((3, draws)))
    if not isinstance(out, Tensor) or out.shape != images.shape or out.dtype != images.dtype:
        expected = f"expected torch.float32 {[*images.shape]}, as it was given"
        raise ConfigError.of("", f"gives {_shown(out)}; {expected}")
    low, high = out.min().item(), out.max().item()
    if not (low >= 0 and high <= 1):
        problem = f"gives values from {low:g} to {high:g}; expected them in [0, 1]"
        raise ConfigError.of("", problem)


def export_problem(experiment: Experiment) -> str:
    """Return why the experiment's encoder cannot be exported by `torch.export`; empty: it can."""
    size, channels = experiment.evaluation_size, experiment.data.channels
    encoder = build_encoder(experiment.encoder, size=size, channels=channels).eval()
    encoder.requires_grad_(requires_grad=False)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / TORCH_EXPORT.file
            whole = Encoder(
                encoder,
                config={},
                size=size,
                feature_dim=feature_dim(encoder),
                decoder=image_decoder(channels, 0),
            )
            write_checked(TORCH_EXPORT, path, whole)
    except CheckpointError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - torch.export raises what it finds, of any kind
        return f"{type(error).__name__}: {one_line(error)[:300]}"
    return ""


@contextmanager
def _named(where: str, node: ImportConfig) -> Iterator[None]:
    """Name the key and the path in what a check raises, whatever the component itself raises."""
    try:
        yield
    except ConfigError as error:
        problems = "; ".join(issue.problem for issue in error.issues)
        shown = problems if node.path in problems else f"{node.path} {problems}"
        raise ConfigError.of(where, shown) from error
    except Exception as error:
        cause = one_line(error)[:300]
        problem = f"{node.path} raised {type(error).__name__}: {cause}"
        raise ConfigError.of(where, problem) from error


def _shown(value: Any) -> str:
    return f"{value.dtype} {[*value.shape]}" if isinstance(value, Tensor) else type(value).__name__
