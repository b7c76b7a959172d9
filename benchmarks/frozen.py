"""How long the classifier of a frozen encoder takes to fit, its penalty chosen.

    python -m benchmarks.frozen [--threads 1]

Processor seconds of `sweep_logistic_regression` (45 penalties), once, on drawn features: normal
around a centre for each class, below zero cut off as by a last ReLU. The encoder's pass is not in
them.
Writes `benchmarks/results/frozen.json`.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from benchmarks.record import store
from simclr_ray.evaluation.logistic_regression import sweep_logistic_regression

SHAPES = ((100, 512, 10), (1000, 2048, 10), (13_000, 2048, 100))  # images, features, classes
NOISE = 3.0  # its deviation; that of the centres is 1


def seconds_of(num_images: int, num_features: int, num_classes: int) -> dict[str, float]:
    """Return the processor time of the fit, and the penalty that it chooses."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(num_images) % num_classes
    centres = torch.randn(num_classes, num_features, generator=draws)
    noise = NOISE * torch.randn(num_images, num_features, generator=draws)
    features = (noise + centres[labels]).relu()
    began = time.process_time()
    chosen = sweep_logistic_regression(features, labels, num_classes)
    return {"processor_seconds": round(time.process_time() - began, 1), "l2": chosen.l2}


def main() -> None:
    """Measure every shape, print it and store it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    seconds_of(100, 16, 2)  # the first call of the solver loads what it needs
    results = {}
    for shape in SHAPES:
        results[" x ".join(map(str, shape))] = seconds_of(*shape)
        print(shape, results[" x ".join(map(str, shape))])
    command = " ".join(["python -m benchmarks.frozen", *sys.argv[1:]])
    store("frozen", {"command": command, "results": results})


if __name__ == "__main__":
    main()
