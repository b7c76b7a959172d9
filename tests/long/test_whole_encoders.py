"""Whole encoders of timm and torchvision: two processes train what one does, to 1e-9 in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from simclr_ray.config.experiment import Experiment
from simclr_ray.distributed.spawn import spawn
from tests.distributed.encoder_ranks import distances, experiment, state_of, train_steps

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

TOLERANCE = 1e-9
DROP_PATH = {"drop_path_rate": 0.1}
ENCODERS: dict[str, tuple[dict[str, Any], int]] = {
    "resnet50 of timm": ({"name": "timm", "model": "resnet50"}, 64),
    "resnet50 of torchvision": ({"name": "torchvision", "model": "resnet50"}, 64),
    "ViT-S/16": (
        {
            "name": "timm",
            "model": "vit_small_patch16_224",
            "options": DROP_PATH,
            "freeze_patch_embedding": True,
        },
        64,
    ),
    "ConvNeXt-T": ({"name": "timm", "model": "convnext_tiny", "options": DROP_PATH}, 64),
    "swin_t": ({"name": "torchvision", "model": "swin_t"}, 64),  # stochastic depth 0.2 of its own
}


def case(name: str) -> Experiment:
    encoder, size = ENCODERS[name]
    return experiment(encoder, size, 6)


@pytest.mark.parametrize("name", ENCODERS)
def test_two_steps_on_two_workers_are_those_on_one(name: str, tmp_path: Path) -> None:
    path = tmp_path / "reference.pt"
    torch.save(state_of(*train_steps(0, case(name))[:2]), path)
    for rank in spawn(distances, 2, {name: (case(name), str(path))}):
        difference, where = rank[name]
        assert difference < TOLERANCE, where
