"""Probes find what features hold, and find nothing where there is nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from simclr_ray.config.experiment import LinearConfig
from simclr_ray.data.shapes import render
from simclr_ray.evaluation.features import Split
from simclr_ray.evaluation.probes import TARGETS, probe, probe_class, transformed
from simclr_ray.nn.build import SimCLRModel


class Small(nn.Module):
    """The image itself, smaller."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 8).flatten(1)


def images(num: int, seed: int) -> torch.Tensor:
    """Return shapes, brighter below than above: they have an upright."""
    images = [torch.from_numpy(render(i, seed).pixels.copy()) for i in range(num)]
    stacked = torch.stack(images).permute(0, 3, 1, 2).float()
    return (stacked * torch.linspace(0.3, 1, stacked.shape[2])[:, None]).byte()


def test_answers_have_their_chances_and_what_was_done_is_what_is_said() -> None:
    drawn = images(400, 0)
    for target in TARGETS:
        rng = np.random.default_rng(1)
        moved, answers = transformed(target, drawn, rng)
        counts = np.bincount(answers.numpy(), minlength=len(target.chances)) / 400
        np.testing.assert_allclose(counts, target.chances, atol=0.08)
        same = (moved == drawn).flatten(1).all(1)
        assert same[answers == 0].all()
        assert same[answers > 0].float().mean() < 0.2  # a gray or symmetric one may stay


@pytest.mark.slow
def test_what_a_feature_cannot_tell_is_chance_and_what_it_can_is_not() -> None:
    torch.manual_seed(0)
    model = SimCLRModel(Small(), nn.Sequential(nn.Unflatten(1, (3, 64)), _Turnless()))
    found = {p.target: p for p in probe(model, images(1500, 0), images(600, 1))}
    for name in ("color vs grayscale", "orig. vs Sobel filtered"):
        assert found[name].h > found[name].chance + 0.1
    assert found["orig. vs Sobel filtered"].z > 0.6
    assert found["rotation"].h > 0.4
    assert found["rotation"].z < 0.34  # sums over the image do not turn
    assert found["color vs grayscale"].chance == 0.8


def test_the_class_is_read_off_what_holds_it_and_off_nothing_else() -> None:
    labels = torch.arange(300) % 3
    drawn = images(300, 0) // 4 + (60 * labels[:, None, None, None]).byte()  # told by brightness
    split = Split(drawn, labels, torch.arange(300), [])
    config = LinearConfig(epochs=40, batch_size=64)
    turnless = SimCLRModel(Small(), nn.Sequential(nn.Unflatten(1, (3, 64)), _Turnless()))
    found = probe_class(turnless, split.at(labels < 2), split.at(labels < 2), config)
    assert (found.target, found.chance) == ("class", 0.5)
    assert found.h > 0.95
    assert found.z > 0.95  # the mean of a channel is brightness
    blind = SimCLRModel(Small(), _Blind())
    found = probe_class(blind, split, split, config)
    assert found.h > 0.9
    assert found.z == pytest.approx(found.chance, abs=0.01) == pytest.approx(1 / 3, abs=0.01)


class _Blind(nn.Module):
    """The same for every image."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(h), 4) * self.scale


class _Turnless(nn.Module):
    """Of [N, 3, 64] cells, mean and spread of each channel: quarter turns only permute cells."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        return self.scale * torch.cat([cells.mean(2), cells.std(2)], 1)
