"""What each rank of `test_encoders` runs: steps of the loop on its share of a global batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.batch import Batch
from simclr_ray.distributed import collectives
from simclr_ray.nn.batchnorm import GlobalBatchNorm
from simclr_ray.nn.build import build_loss, build_model
from simclr_ray.nn.precision import prepare_model
from simclr_ray.optim import build_optimizer
from simclr_ray.train import loop

STEPS, RATE = 2, 1e-3


ADAMW = {"name": "adamw", "weight_decay": 0.1, "clip_norm": 0.5}
LARS = {"name": "lars", "weight_decay": 1e-4, "clip_norm": 0.5}


def experiment(encoder: dict[str, Any], size: int, batch_size: int, **changes: Any) -> Experiment:
    """Return an experiment in float64, its gradients clipped: AdamW, but LARS for convolutions."""
    tree = {
        "name": "parity",
        "seed": 11,
        "data": {"train": "generated"},
        "augment": {"size": size},
        "encoder": encoder,
        "head": {"name": "mlp", "dim": 8, "hidden": 16},
        "optimizer": LARS if {"resnet50", "mobilenetv3_small_050"} & {encoder["model"]} else ADAMW,
        "precision": "float64",
        "batch_size": batch_size,
    }
    return cfg.validate(Experiment, tree | changes)


def batches(experiment: Experiment, first: int, last: int, steps: range) -> list[Batch]:
    """Return rows [first, last) of the global batches, ever brighter along the batch."""
    size, num = experiment.augment.size, experiment.batch_size
    place = torch.linspace(0.3, 1, num)[:, None, None, None]
    parts = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        views = torch.rand(2, num, 3, size, size, generator=generator) * place
        a, b = views.mul(255).to(torch.uint8)[:, first:last]
        ids = torch.arange(first, last) * 7 + 100 * step
        parts.append(Batch(step, a, b, ids, torch.empty(0, dtype=torch.int64)))
    return parts


def train_steps(
    rank: int, experiment: Experiment
) -> tuple[list[float], nn.Module, torch.optim.Optimizer]:
    """Return losses, model and optimizer after all steps on this rank's share."""
    model, optimizer = prepared(experiment)
    return go_on(rank, experiment, model, optimizer, range(STEPS)), model, optimizer


def prepared(experiment: Experiment) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model, nothing in it near zero, and its optimizer."""
    model = build_model(experiment)
    randomise(model)
    prepare_model(model, torch.device("cpu"), experiment.precision)
    return model, build_optimizer(model, experiment.optimizer)


def go_on(
    rank: int,
    experiment: Experiment,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
) -> list[float]:
    """Return the losses of some steps; model and optimizer move."""
    losses: list[float] = []
    first, last = collectives.partition(experiment.batch_size, rank, collectives.world_size())
    loop.train(
        collectives.data_parallel(model),
        build_loss(experiment),
        optimizer,
        batches(experiment, first, last, steps),
        loop.StepSchedule(1, STEPS + 1, 0, RATE, experiment.batch_size, log_every=1),
        loop.Callbacks(lambda m: losses.append(m.loss), lambda e, s: None, lambda s: None),
        precision=experiment.precision,
        seed=experiment.seed,
        num_groups=experiment.num_groups,
        clip_norm=experiment.optimizer.clip_norm,
    )
    return losses


def distances(rank: int, cases: dict[str, tuple[Experiment, str]]) -> dict[str, tuple[float, str]]:
    """Return for each case how far this rank's model is from a stored one, and in which tensor."""
    out = {}
    for name, (case, path) in cases.items():
        own = state_of(*train_steps(rank, case)[:2])
        reference: dict[str, Tensor] = torch.load(path, weights_only=True)
        assert own.keys() == reference.keys()
        out[name] = max((_relative(own[key], reference[key]), key) for key in own)
    return out


def state_of(losses: list[float], model: nn.Module) -> dict[str, Tensor]:
    """Return all that is compared, by name."""
    return model.state_dict() | {"losses": torch.tensor(losses, dtype=torch.float64)}


def _relative(own: Tensor, reference: Tensor) -> float:
    # by AdamW what has no gradient moves by its rounding; what moved at all has gone a rate far
    own, reference = own.double(), reference.double()  # tables of positions are integers
    difference = float((own - reference).norm() / reference.norm().clamp(min=RATE))
    return float("inf") if math.isnan(difference) else difference


def randomise(model: nn.Module) -> None:
    """Move what starts at or near zero, and would hide its branch: gammas and layer scales."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            leaf = name.rpartition(".")[2]
            norm = isinstance(model.get_submodule(name.rpartition(".")[0]), GlobalBatchNorm)
            if leaf in ("gamma", "layer_scale") or (norm and leaf == "weight"):
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
