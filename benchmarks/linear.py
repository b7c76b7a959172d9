"""The linear protocol's descent by `torch.optim.SGD` against its update written out.

    python -m benchmarks.linear [--threads 1] [--rounds 10]

Paired and interleaved in one process: medians over rounds of the processor seconds of a whole fit
(a machine that others use bends them less than the clock's), and the largest relative difference
of the weights. Synthetic features with the shapes of the CIFAR-10 encoders' (512 and 2048) and of
raw pixels (3072).
Writes `benchmarks/results/linear.json`.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.record import median, store
from simclr_ray.config.experiment import LinearConfig
from simclr_ray.evaluation.linear import MOMENTUM, descend, peak_rate

SHAPES = ((10_000, 512), (10_000, 2048), (10_000, 3072))
CLASSES, EPOCHS = 10, 4
Fit = Callable[[Tensor, Tensor, int, LinearConfig, int], tuple[Tensor, Tensor]]


def written_out(
    rows: Tensor, labels: Tensor, num_classes: int, config: LinearConfig, seed: int
) -> tuple[Tensor, Tensor]:
    """Return weight and bias by Nesterov's update in two lines, as it was before."""
    num_batches = math.ceil(len(rows) / config.batch_size)
    total, peak = config.epochs * num_batches, peak_rate(len(rows), config)
    order = torch.Generator().manual_seed(seed)
    values = [rows.new_zeros(num_classes, rows.shape[1]), rows.new_zeros(num_classes)]
    velocities = [torch.zeros_like(value) for value in values]
    for epoch in range(config.epochs):
        shuffled = torch.randperm(len(rows), generator=order)
        for index, batch in enumerate(shuffled.tensor_split(num_batches)):
            rate = peak * 0.5 * (1 + math.cos(math.pi * (epoch * num_batches + index) / total))
            x, y = rows[batch], labels[batch]
            error = torch.softmax(torch.addmm(values[1], x, values[0].T), 1)
            error[torch.arange(len(y)), y] -= 1
            error /= len(y)
            for value, velocity, gradient in zip(
                values, velocities, (error.T @ x, error.sum(0)), strict=True
            ):
                velocity.mul_(MOMENTUM).add_(gradient)
                value.sub_(gradient.add(velocity, alpha=MOMENTUM), alpha=rate)
    return values[0], values[1]


def compared(num_rows: int, num_features: int, rounds: int) -> dict[str, object]:
    """Return seconds of both forms and how far their results differ."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (num_rows,), generator=generator)
    centres = torch.randn(CLASSES, num_features, generator=generator)
    rows = torch.randn(num_rows, num_features, generator=generator) + 0.1 * centres[labels]
    config = LinearConfig(epochs=EPOCHS)
    forms: dict[str, Fit] = {"written out": written_out, "torch.optim.SGD": descend}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    fits: dict[str, tuple[Tensor, Tensor]] = {}
    for turn in range(rounds + 1):  # the first one warms up
        for name in sorted(forms, reverse=bool(turn % 2)):
            began = time.process_time()
            fits[name] = forms[name](rows, labels, CLASSES, config, 0)
            if turn:
                seconds[name].append(time.process_time() - began)
    old, new = (torch.cat([w, b[:, None]], 1) for w, b in fits.values())
    right = [float((rows @ w.T + b).argmax(1).eq(labels).float().mean()) for w, b in fits.values()]
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    return {
        "processor_seconds": {name: median(values) for name, values in seconds.items()},
        "sgd_over_written_out": median(ratios, 3),
        "largest_relative_difference": float((old - new).abs().max() / old.abs().max()),
        "accuracy_difference": abs(right[0] - right[1]),
    }


def main() -> None:
    """Measure every shape, print it and store it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for num_rows, num_features in SHAPES:
        results[f"{num_rows} x {num_features}"] = compared(num_rows, num_features, args.rounds)
        print(num_rows, num_features, results[f"{num_rows} x {num_features}"])
    command = " ".join(["python -m benchmarks.linear", *sys.argv[1:]])
    store("linear", {"command": command, "epochs": EPOCHS, "results": results})


if __name__ == "__main__":
    main()
