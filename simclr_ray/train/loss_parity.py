"""Does a loss of your own hold the contract of `nn.losses` on several processes?

The loss of one global batch, in this process and shared by R gloo processes, unevenly where R does
not divide it. In float64 both differ by rounding alone. Averaged over ranks the value must be that
of one process, and each rank's gradient R times that of one process for its own rows, since
data-parallel training averages gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import torch

from simclr_ray import config as cfg
from simclr_ray.config.components import build
from simclr_ray.config.experiment import ImportedLossConfig
from simclr_ray.distributed import collectives
from simclr_ray.distributed.spawn import spawn
from simclr_ray.errors import RunError, last_line
from simclr_ray.nn.losses import Loss

IMAGES: Final = 10  # 3, 3 and 4 over three ranks
DIM: Final = 16
CLASSES: Final = 3
SEED: Final = 200_205_709  # the paper: arXiv:2002.05709
BOUND: Final = 1e-9  # float64; rounding alone gives some 1e-15


class LossOutput(NamedTuple):
    """What a loss gives on a rank; together, on one."""

    value: float
    gradient: list[float]  # [n, 2, D], of both views; no tensor, since it crosses a pipe


class LossParity(NamedTuple):
    """How far R processes are from one: |x_R − x_1| / |x_1| each."""

    value: float
    gradient: float

    @property
    def holds(self) -> bool:
        """Whether both are rounding alone."""
        return max(self.value, self.gradient) <= BOUND


def loss_parity(path: str, options: Mapping[str, Any], num_workers: int = 2) -> LossParity:
    """Return how far an imported loss on `num_workers` gloo processes is from one process.

    Starts fresh processes on this machine. Call it outside any process group.

    Args:
        path: Import path of the loss, permitted before (`config.imports.allow`).
        options: What it is called with, beside `global_batch_size`.
        num_workers: R, at most `IMAGES`.

    Raises:
        ConfigError: The path cannot be imported, or gives no loss.
        RunError: The loss itself fails, here or on a rank.
    """
    if not 1 <= num_workers <= IMAGES:
        raise ValueError(f"num_workers must lie in [1, {IMAGES}], not {num_workers}")
    config = cfg.validate(ImportedLossConfig, {"path": path, "options": dict(options)})
    build(config, Loss, global_batch_size=IMAGES)  # type: ignore[type-abstract] # fails here
    try:
        alone = apply_loss(0, config)
        ranks = spawn(apply_loss, num_workers, config)
    except Exception as error:
        raise RunError(f"{path} failed: {last_line(error)}") from error
    mean = sum(rank.value for rank in ranks) / num_workers
    gradient = [value / num_workers for rank in ranks for value in rank.gradient]
    return LossParity(
        value=_relative([mean], [alone.value]),
        gradient=_relative(gradient, alone.gradient),
    )


def apply_loss(rank: int, config: ImportedLossConfig) -> LossOutput:
    """Return value and gradient of this rank's share of the batch. Collective."""
    del rank  # the process group knows it
    loss = build(config, Loss, global_batch_size=IMAGES)  # type: ignore[type-abstract] # by isinstance
    generator = torch.Generator().manual_seed(SEED)
    place = torch.linspace(0.5, 2, IMAGES, dtype=torch.float64)[:, None, None]  # unequal ranks
    noise = torch.randn(IMAGES, 2, DIM, dtype=torch.float64, generator=generator)
    first, last = collectives.partition(IMAGES, collectives.rank(), collectives.world_size())
    z = (place * noise)[first:last].requires_grad_()
    labels = (torch.arange(IMAGES) % CLASSES)[first:last] if loss.takes_labels else None
    z1, z2 = z.unbind(1)
    value = loss(z1, z1 if loss.one_view else z2, labels)
    value.backward()
    gradient = torch.zeros_like(z) if z.grad is None else z.grad
    return LossOutput(value.item(), gradient.flatten().tolist())


def _relative(own: list[float], reference: list[float]) -> float:
    one, other = (torch.tensor(values, dtype=torch.float64) for values in (own, reference))
    difference = (one - other).norm() / other.norm()
    return difference.item() if torch.isfinite(difference) else float("inf")
