"""What a GPU computes beside the CPU: loss, batch norm, views, an update; alone and as two ranks.

    python -m benchmarks.gpu_parity [--device cuda]

Errors are ‖actual − expected‖ / ‖expected‖, expected in float64 on the CPU (the update's in
float32, as it is made there). Views are bytes: the largest difference in gray levels, and the share
of bytes that differ. Two ranks share the one GPU over gloo, with 256 and 257 images: batch norm and
loss of the global batch against one process. Writes `benchmarks/results/gpu_parity.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.record import store
from simclr_ray.augment import TwoViews
from simclr_ray.augment.pipeline import Crop, Pipelines, Stage
from simclr_ray.config.components import variants
from simclr_ray.config.sections.views import AnyStageConfig
from simclr_ray.distributed import collectives
from simclr_ray.distributed.spawn import spawn
from simclr_ray.nn.batchnorm import GlobalBatchNorm
from simclr_ray.nn.losses import DCLLoss, Loss, NTLogisticLoss, NTXentLoss, SupConLoss, TripletLoss
from simclr_ray.nn.resnet import ResNet
from simclr_ray.optim import LARS

CPU = torch.device("cpu")
N, DIM, RANKS = 513, 128, 2
SIZES = ((32, 32, 32), (32, 40, 48), (96, 130, 110), (224, 256, 256))
STAGES = {n: c for n, c in variants(AnyStageConfig).items() if n not in ("crop", "import")}
LOSSES: dict[str, Callable[[], Loss]] = {
    "ntxent": lambda: NTXentLoss(0.1),
    "ntxent, tau 0.02": lambda: NTXentLoss(0.02),  # exponents without one shift for all rows
    "dcl": lambda: DCLLoss(0.1),
    "supcon": lambda: SupConLoss(0.1),
    "ntlogistic": lambda: NTLogisticLoss(0.1),  # mined forms pick others where two nearly tie
    "triplet": lambda: TripletLoss(0.8),
}


def main() -> None:
    """Compare, print, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    errors = {**parity(device), "ranks": attempt(partial(ranks, device))}
    print(json.dumps(errors, indent=1))
    if device.type == "cuda":
        store("gpu_parity", {"command": "python -m benchmarks.gpu_parity", "seed": 0, **errors})


def parity(device: torch.device) -> dict[str, Any]:
    """Return the differences between `device` and the CPU, by part."""
    return {
        "loss": {name: attempt(partial(losses, make(), device)) for name, make in LOSSES.items()},
        "batch_norm": {
            "float32": attempt(partial(batch_norm, device, torch.float32)),
            "bf16": attempt(partial(batch_norm, device, torch.bfloat16)),
        },
        "encoder": attempt(partial(encoder, device)),
        "lars": attempt(partial(update, device)),
        "views": {
            f"{size} px of {height} x {width}": attempt(
                partial(views, TwoViews.simclr(size), height, width, device)
            )
            for size, height, width in SIZES
        },
        "stages": {
            name: attempt(partial(views, pipeline(name), 32, 32, device)) for name in STAGES
        },
    }


def attempt(part: Callable[[], Any]) -> Any:
    """Return what a part finds, or what it fails with: the others are compared all the same."""
    try:
        return part()
    except Exception as error:  # noqa: BLE001 - reported
        return f"{type(error).__name__}: {str(error)[:300]}"


def losses(loss: Loss, device: torch.device) -> dict[str, float]:
    """Return the errors of a loss and of its gradient."""
    z, labels = projections()

    def turn(z: Tensor) -> tuple[float, Tensor]:
        z = z.detach().requires_grad_()
        value = loss(z[0], z[1], labels.to(z.device))
        value.backward()
        assert z.grad is not None
        return value.item(), z.grad

    (expected, gradient), (value, actual) = turn(z.double()), turn(z.to(device))
    return {"value": abs(value / expected - 1), "gradient": relative(actual, gradient)}


def batch_norm(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Return the errors of batch norm while training, forward and backward."""
    x, upstream = feature_maps()
    x, upstream = x.to(dtype), upstream.to(dtype)
    expected = normalised(x.double(), upstream.double())
    actual = normalised(x.to(device), upstream.to(device))
    return {name: relative(actual[name], expected[name]) for name in expected}


def normalised(x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Return what a step of batch norm gives."""
    norm = GlobalBatchNorm(x.shape[1]).to(x.device)
    norm.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, x.shape[1]))
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    y = norm(x)
    y.backward(upstream.to(memory_format=torch.channels_last))
    assert x.grad is not None
    assert norm.weight.grad is not None
    assert norm.bias is not None
    assert norm.bias.grad is not None
    return {
        "output": y.detach(),
        "gradient": x.grad,
        "weight_gradient": norm.weight.grad,
        "bias_gradient": norm.bias.grad,
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
    }


def encoder(device: torch.device) -> dict[str, float]:
    """Return the errors of ResNet-18's h and of its gradient, float32 without TF32."""
    torch.manual_seed(0)
    images, upstream = torch.rand(16, 3, 32, 32), torch.randn(16, 512)
    network = ResNet(18, 1.0, "cifar")
    weights = {name: value.clone() for name, value in network.state_dict().items()}

    def turn(where: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        network.to(CPU, torch.float32).load_state_dict(weights)
        network.to(where, dtype).zero_grad()
        h = network(images.to(where, dtype))
        h.backward(upstream.to(where, dtype))
        gradients = [p.grad.flatten().cpu() for p in network.parameters() if p.grad is not None]
        return h.detach(), torch.cat(gradients)

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        (h, gradient), (expected_h, expected) = (
            turn(device, torch.float32),
            turn(CPU, torch.float64),
        )
    finally:
        torch.backends.cudnn.allow_tf32 = before
    return {"features": relative(h, expected_h), "gradient": relative(gradient, expected)}


def update(device: torch.device) -> float:
    """Return the error of weights after three steps of LARS."""

    def turn(where: torch.device) -> Tensor:
        torch.manual_seed(0)
        w = [torch.randn(64, 3, 3, 3), torch.randn(128, 64), torch.zeros(32)]
        g = [torch.randn_like(x) for x in w]
        w = [x.to(where).requires_grad_() for x in w]
        optimizer = LARS(w, 2.0, weight_decay=1e-4)
        for _ in range(3):
            for x, gradient in zip(w, g, strict=True):
                x.grad = gradient.to(where)
            optimizer.step()
        return torch.cat([x.detach().flatten().cpu() for x in w])

    return relative(turn(device), turn(CPU))


def views(
    of: TwoViews | Pipelines, height: int, width: int, device: torch.device
) -> dict[str, float]:
    """Return how far views of random images differ."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, 3, height, width), dtype=torch.uint8, generator=generator)
    pairs = [torch.cat(of(pixels.to(where), np.arange(64), 1)).cpu() for where in (CPU, device)]
    difference = (pairs[0].int() - pairs[1].int()).abs()
    return {
        "largest_gray_levels": float(difference.max()),
        "share_of_bytes": float((difference > 0).double().mean()),
    }


def pipeline(name: str) -> Pipelines:
    """Return a crop and then one transformation, or not, by chance."""
    stages = [Stage("crop", Crop()), Stage(name, STAGES[name]().load()(), 0.5)]
    return Pipelines(32, [], stages, stages)


def ranks(device: torch.device) -> dict[str, float]:
    """Return the errors of loss and batch norm over two ranks against one process."""
    z, _ = projections()
    x, upstream = feature_maps()
    z = z.double().requires_grad_()
    value = NTXentLoss(0.1)(z[0], z[1])
    value.backward()
    assert z.grad is not None
    whole = normalised(x.double(), upstream.double())
    shares = spawn(_rank, RANKS, device.type)
    parts = [{name: torch.from_numpy(a) for name, a in share.items()} for share in shares]
    actual = {name: torch.cat([p[name] for p in parts]) for name in ("output", "gradient")}
    z_gradient = torch.cat([p["z_gradient"] for p in parts], dim=1)
    return {
        "loss": abs(sum(float(p["loss"]) for p in parts) / RANKS / value.item() - 1),
        "loss_gradient": relative(z_gradient / RANKS, z.grad),
        "batch_norm": relative(actual["output"], whole["output"]),
        "batch_norm_gradient": relative(actual["gradient"], whole["gradient"]),
        "weight_gradient": relative(
            parts[0]["weight_gradient"] + parts[1]["weight_gradient"], whole["weight_gradient"]
        ),
        "running_var": relative(parts[1]["running_var"], whole["running_var"]),
    }


def _rank(rank: int, kind: str) -> dict[str, NDArray[Any]]:
    """Return a rank's share of everything."""
    z, _ = projections()
    x, upstream = feature_maps()
    rows = slice(*collectives.partition(N, rank, RANKS))
    mine = z[:, rows].to(kind).requires_grad_()
    value = NTXentLoss(0.1, global_batch_size=N)(mine[0], mine[1])
    value.backward()
    assert mine.grad is not None
    norm = normalised(x[rows].to(kind), upstream[rows].to(kind))
    actual = {"loss": value.detach(), "z_gradient": mine.grad, **norm}
    return {name: tensor.detach().cpu().numpy() for name, tensor in actual.items()}


def projections() -> tuple[Tensor, Tensor]:
    """Return z of both views, float32 [2, N, D], partners alike, and labels [N]."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(N, DIM, generator=generator)
    b = 0.3 * a + torch.randn(N, DIM, generator=generator)
    return torch.stack([a, b]), torch.randint(0, 10, (N,), generator=generator)


def feature_maps() -> tuple[Tensor, Tensor]:
    """Return x and a gradient of y, float32 [N, 32, 8, 8], channels of unlike means."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 32, 8, 8, generator=generator) + torch.arange(32.0)[:, None, None]
    return x, torch.randn(N, 32, 8, 8, generator=generator)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return ‖actual − expected‖ / ‖expected‖."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return float((actual - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
