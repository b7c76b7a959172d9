"""Transformations stay on the device of their images, seen without one: by fake tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from simclr_ray.augment.ops import Solarize
from simclr_ray.augment.pipeline import Crop, Pipelines, Stage
from simclr_ray.config.components import variants
from simclr_ray.config.sections.views import AnyStageConfig

SIDE = 65  # above the side whose weights are kept in a table, where a fake one would stay
# jitter, color, equalize and autoaugment ask their tensors for values, which fake ones lack
STILL = ("flip", "rotate", "cutout", "grayscale", "noise", "blur", "sobel", "solarize")


@pytest.mark.parametrize("name", STILL)
def test_a_transformation_mixes_no_devices(name: str) -> None:
    op = variants(AnyStageConfig)[name]().load()()
    draws = np.random.default_rng(0).random((6, op.num_draws(SIDE)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(6, 3, SIDE, SIDE, device="cuda")
        assert op(images, draws).device.type == "cuda"


def test_a_stage_taken_by_chance_mixes_no_devices() -> None:
    stages = [Stage("crop", Crop()), Stage("solarize", Solarize(), 0.5)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(6, 3, SIDE, SIDE, dtype=torch.uint8, device="cuda")
        views = Pipelines(SIDE, [], stages, stages)(images, np.arange(6), 0)
        assert {view.device.type for view in views} == {"cuda"}
