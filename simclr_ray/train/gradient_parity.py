"""Check that R processes compute the gradient of one; `simclr-ray doctor` runs it.

The real encoder, head, global batch norm, loss and optimizer take three steps on one global batch,
once in this process and once shared by R gloo processes, unevenly where R does not divide it. In
float64 the two differ by rounding alone, so a missing term, a wrong factor or statistics of the
own rank only cannot hide. Two things make the check see what it must see: batch norm gammas and
betas are random (at the usual start half of the gradients are exactly zero), and the images'
brightness and contrast grow with their place in the batch, so that ranks hold unequal data.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor, nn

from simclr_ray.config.experiment import DataConfig, Experiment, MLPHeadConfig, ResNetConfig
from simclr_ray.distributed import collectives
from simclr_ray.distributed.spawn import spawn
from simclr_ray.nn.batchnorm import GlobalBatchNorm
from simclr_ray.nn.build import SimCLRModel, build_loss, build_model
from simclr_ray.optim import build_optimizer

IMAGES: Final = 10  # 3, 3 and 4 over three ranks
SIDE_PX: Final = 8
RATES: Final = (0.1, 0.3, 0.2)  # the rate moves, since LARS keeps it inside the momentum buffer
CPU: Final = torch.device("cpu")
SEED: Final = 200_205_709  # the paper: arXiv:2002.05709

NamedTensors = dict[str, Tensor]
StepResult = dict[str, NamedTensors]  # of `loss`, `gradients`, `statistics` and `weights`


class Worst(NamedTuple):
    """The largest relative difference of a group of tensors, and whose it is."""

    difference: float
    name: str


class ParityReport(NamedTuple):
    """How far R processes are from one; each figure is relative, the largest over the ranks.

    A tensor's difference is |x_R - x_1| / |x_1| in the Euclidean norm. `least_gradient` is the
    smallest norm of a parameter's gradient: where it is zero, a check has seen nothing.
    """

    loss: Worst
    gradients: Worst
    statistics: Worst
    weights: Worst
    least_gradient: float
    float32_gradient: float  # of all parameters' gradients as one vector

    def worst(self) -> Worst:
        """Return the largest of the float64 differences."""
        return max(self.loss, self.gradients, self.statistics, self.weights)


class Parity(NamedTuple):
    """What `doctor` shows: the largest float64 difference, where it is, and what it took."""

    max_relative_difference: float
    worst: str
    seconds: float


def gradient_parity(num_workers: int) -> Parity:
    """Return how far `num_workers` gloo processes are from one, in float64; below 1e-9 is sound.

    Starts fresh processes on this machine. Call it outside any process group.

    Raises:
        ValueError: more workers than images in the check's batch, or fewer than one.
        RuntimeError: a process group is up, or a worker failed.
    """
    start = time.perf_counter()
    worst = compare_processes(num_workers).worst()
    return Parity(worst.difference, worst.name, time.perf_counter() - start)


def compare_processes(num_workers: int) -> ParityReport:
    """Return every figure of the check for `num_workers` processes. Same as `gradient_parity`."""
    if not 1 <= num_workers <= IMAGES:
        raise ValueError(f"num_workers must lie in [1, {IMAGES}], not {num_workers}")
    if collectives.is_distributed():
        raise RuntimeError("the reference must be computed outside any process group")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.pt"
        torch.save({p: take_steps(p) for p in ("float64", "float32")}, path)
        alone = num_workers == 1  # which needs no group, and no minute to start one
        ranks = (
            [_compare_rank(0, str(path))] if alone else spawn(_compare_rank, num_workers, str(path))
        )
    return ParityReport(
        loss=max(r.loss for r in ranks),
        gradients=max(r.gradients for r in ranks),
        statistics=max(r.statistics for r in ranks),
        weights=max(r.weights for r in ranks),
        least_gradient=min(r.least_gradient for r in ranks),
        float32_gradient=max(r.float32_gradient for r in ranks),
    )


def take_steps(
    precision: Literal["float64", "float32"],
    device: torch.device = CPU,
    images: int = IMAGES,
) -> StepResult:
    """Return loss and gradients of the first step, statistics and weights after the last.

    Collective: each rank takes its share of the batch; all get the same. Alone, it is the whole.

    Args:
        precision: Of all numbers.
        device: Where it is computed; what is returned lies on the CPU.
        images: Of the global batch, one a rank at least.
    """
    dtype = torch.float64 if precision == "float64" else torch.float32
    experiment = _experiment(precision, images)
    model = build_model(experiment).to(dtype)
    _randomise_batch_norm(model)
    model.to(device)
    optimizer = build_optimizer(model, experiment.optimizer)
    loss_fn = build_loss(experiment)
    first, last = collectives.partition(images, collectives.rank(), collectives.world_size())
    views = _global_views(images).to(device, dtype)[:, first:last].flatten(0, 1)  # [2n, 3, S, S]
    parallel = collectives.data_parallel(model)
    outcome: StepResult = {}
    for rate in RATES:
        optimizer.zero_grad()
        z1, z2 = parallel(views).z.chunk(2)
        loss = loss_fn(z1, z2)
        loss.backward()
        if not outcome:
            mean = collectives.all_reduce_sum(loss.detach().clone()) / collectives.world_size()
            outcome["loss"] = {"loss": mean}
            outcome["gradients"] = _gradients(model)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    outcome["statistics"] = dict(model.named_buffers())
    outcome["weights"] = {n: p.detach() for n, p in model.named_parameters()}
    return {kind: {n: t.cpu() for n, t in named.items()} for kind, named in outcome.items()}


def worst_difference(own: StepResult, reference: StepResult) -> Worst:
    """Return the largest relative difference of two results, and whose it is."""
    return max(_worst(kind, own[kind], reference[kind]) for kind in own)


def _experiment(precision: Literal["float64", "float32"], images: int) -> Experiment:
    return Experiment(
        name="gradient_parity",
        seed=SEED,
        data=DataConfig(train="generated"),
        encoder=ResNetConfig(depth=18, width=0.125, stem="cifar"),
        head=MLPHeadConfig(layers=3, dim=16),
        batch_size=images,
        precision=precision,
    )


def _global_views(images: int) -> Tensor:
    """Return float64 views `[2, N, 3, S, S]`, ever brighter and higher in contrast along N."""
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(2, images, 3, SIDE_PX, SIDE_PX, generator=generator, dtype=torch.float64)
    place = torch.linspace(0, 1, images, dtype=torch.float64)[:, None, None, None]
    return place + (0.2 + place) * noise


def _randomise_batch_norm(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, GlobalBatchNorm):
                continue
            for parameter in module.parameters(recurse=False):
                size = 0.5 + torch.rand(len(parameter), generator=generator)
                sign = torch.randint(0, 2, (len(parameter),), generator=generator) * 2 - 1
                parameter.copy_(size * sign)


def _gradients(model: SimCLRModel) -> NamedTensors:
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            raise RuntimeError(f"{name} has no gradient")
        gradients[name] = parameter.grad.clone()
    return gradients


def _compare_rank(rank: int, path: str) -> ParityReport:
    """Return this rank's comparison with the stored reference; small, since it crosses a pipe."""
    del rank  # the process group knows it
    reference: dict[str, StepResult] = torch.load(path, weights_only=True)
    own, single = take_steps("float64"), take_steps("float32")
    worst = {kind: _worst(kind, own[kind], reference["float64"][kind]) for kind in own}
    whole = [_vector(o["gradients"]) for o in (single, reference["float32"])]
    norms = [g.norm().item() for g in reference["float64"]["gradients"].values()]
    return ParityReport(
        **worst,
        least_gradient=min(norms),
        float32_gradient=_relative(*whole),
    )


def _worst(kind: str, own: NamedTensors, reference: NamedTensors) -> Worst:
    return max(Worst(_relative(own[n], reference[n]), f"{kind}: {n}") for n in reference)


def _relative(own: Tensor, reference: Tensor) -> float:
    difference = (own - reference).norm() / reference.norm()
    return difference.item() if torch.isfinite(difference) else float("inf")


def _vector(named: NamedTensors) -> Tensor:
    return torch.cat([t.flatten().double() for t in named.values()])
