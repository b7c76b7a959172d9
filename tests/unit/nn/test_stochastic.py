"""Keyed dropout: each image's mask is a pure function of (seed, step, id, view, layer)."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simclr_ray.augment.philox import STREAMS, philox
from simclr_ray.errors import ConfigError
from simclr_ray.nn.losses import NTXentLoss
from simclr_ray.nn.stochastic import (
    DropoutKeys,
    KeyedDropout,
    KeyedDropPath,
    KeyedLayer,
    check_draws,
    draw_for,
    key_draws,
    keyed_layers,
    keyed_words,
)
from simclr_ray.train.gradient_cache import group_rows
from simclr_ray.train.loop import cached_step

IDS = torch.tensor([0, 1, -5, 2**40 + 3])


def ones(layer: KeyedLayer, keys: DropoutKeys, *shape: int) -> Tensor:
    """Return what a layer makes of ones."""
    draw_for([layer], keys)
    out: Tensor = layer.train()(torch.ones(len(keys.ids), *shape))
    return out


def keys_of(seed: int = 1, step: int = 2, ids: Tensor = IDS, views: int = 1) -> DropoutKeys:
    return DropoutKeys.of_views(seed, step, ids, views)


def test_words_are_those_of_the_numpy_generator() -> None:
    drawn = keyed_words(DropoutKeys.of_views(2**32 - 1, 2**32 - 2, IDS, 2), 65_535, 10)
    expected = []
    for view in (0, 1):
        for number in IDS.tolist():
            wide = number % 2**64
            counter = [wide % 2**32, wide >> 32, 0, 2**32 - 2]
            blocks = np.array([counter] * 3, np.uint64).T
            blocks[2] = range(3)
            key = (2**32 - 1, STREAMS["layers"] | view << 8 | 65_535 << 16)
            expected.append(philox(blocks, key).T.reshape(-1)[:10])
    assert drawn.tolist() == np.stack(expected).astype(np.int64).tolist()


@pytest.mark.parametrize(
    "layer",
    [
        KeyedDropout(0.3, 0),
        KeyedDropout(0.3, 0, channels=True),
        KeyedDropPath(0.3, 0),
        KeyedDropPath(0.3, 0, scaled=False),
    ],
    ids=["dropout", "channels", "drop path", "unscaled"],
)
def test_an_image_keeps_its_mask_in_any_batch_and_the_rest_changes_it(layer: KeyedLayer) -> None:
    many = torch.arange(500)
    whole = ones(layer, keys_of(ids=many), 6, 2, 2)
    some = torch.tensor([400, 3, 77])
    assert torch.equal(ones(layer, keys_of(ids=some), 6, 2, 2), whole[some])
    a, b = ones(layer, keys_of(ids=many, views=2), 6, 2, 2).chunk(2)
    assert torch.equal(a, whole)
    other = copy.deepcopy(layer)
    other.layer = 1
    others = [
        b,
        ones(layer, keys_of(ids=many, step=3), 6, 2, 2),
        ones(other, keys_of(ids=many), 6, 2, 2),
    ]
    others.append(ones(layer, keys_of(ids=many, seed=5), 6, 2, 2))
    for changed in others:  # as unlike as independent draws are: 0.42 of them
        assert 0.3 < (changed != whole).float().mean() < 0.55
    kept = whole != 0
    assert kept.float().mean() == pytest.approx(0.7, abs=0.05)  # 500 draws: 2.4 deviations
    scale = 1.0 if getattr(layer, "scaled", True) is False else 1 / 0.7
    assert torch.allclose(whole[kept], torch.tensor(scale))
    assert torch.equal(layer.eval()(torch.ones(3, 2)), torch.ones(3, 2))


def test_numbers_channels_and_paths_are_dropped_as_a_whole_or_one_by_one() -> None:
    many = keys_of(ids=torch.arange(2000))
    single = ones(KeyedDropout(0.5, 0), many, 4, 3)
    assert (single != 0).float().mean() == pytest.approx(0.5, abs=0.01)
    pairs = (single.flatten(1) != 0).float()
    correlation = torch.corrcoef(pairs.T) - torch.eye(12)
    assert correlation.abs().max() < 0.1  # 2,000 draws: 4.5 deviations
    channels = ones(KeyedDropout(0.5, 0, channels=True), many, 4, 3)
    assert torch.equal(channels, channels[:, :, :1].expand(-1, -1, 3))
    assert not torch.equal(channels[:, 0], channels[:, 1])
    path = ones(KeyedDropPath(0.5, 0), many, 4, 3)
    assert torch.equal(path, path[:, :1, :1].expand(-1, 4, 3))
    assert not ones(KeyedDropout(1.0, 0), many, 4).any()


def test_the_batch_mode_of_stochastic_depth_draws_once_a_view() -> None:
    layer = KeyedDropPath(0.5, 0, whole_batch=True)
    seen = set()
    for step in range(40):
        a, b = ones(layer, keys_of(step=step, views=2), 3).chunk(2)
        assert all((v == v[0, 0]).all() for v in (a, b))
        seen.add((bool(a[0, 0]), bool(b[0, 0])))
    assert len(seen) == 4


def test_windows_of_an_image_share_its_rows() -> None:
    layer = KeyedDropPath(0.5, 0)
    draw_for([layer], keys_of(ids=torch.arange(50)))
    out = layer.train()(torch.ones(200, 2))
    assert torch.equal(out, out[::4].repeat_interleave(4, 0))
    with pytest.raises(RuntimeError, match="51 rows"):
        layer(torch.ones(51, 2))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Dropout2d(0.3),
        nn.ReLU(),
        torchvision.ops.StochasticDepth(0.3, "row"),
        nn.Flatten(),
        nn.Dropout(0.0),
        nn.Linear(8 * 36, 6),
        nn.Dropout(0.4),
    ).double()


def test_layers_are_replaced_in_place_and_what_drops_nothing_stays() -> None:
    model = network()
    key_draws(model)
    kinds = [type(m).__name__ for m in model]  # type: ignore[attr-defined] # a Sequential
    assert kinds[1::2] == ["KeyedDropout", "KeyedDropPath", "Dropout", "KeyedDropout"]
    assert [m.layer for m in model.modules() if isinstance(m, KeyedLayer)] == [0, 1, 2]
    assert keyed_layers(model)
    assert not keyed_layers(nn.Sequential(nn.Dropout(0.0)))
    images = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    torch.manual_seed(1)  # without rows, as a user's own loop has it
    first = model(images)
    assert not torch.equal(first, model(images))
    check_draws(model, images)


def test_gradient_caching_gives_the_gradient_of_one_pass_with_dropout_on() -> None:
    ours, num = network(), 12
    key_draws(ours)
    reference = copy.deepcopy(ours)
    views = torch.rand(2, num, 3, 8, 8, dtype=torch.float64)
    loss = NTXentLoss(0.2)

    def forward(model: nn.Module, some: slice) -> tuple[Tensor, Tensor]:
        draw_for(keyed_layers(model), DropoutKeys.of_views(3, 4, torch.arange(num)[some], 2))
        z1, z2 = model(torch.cat([views[0, some], views[1, some]])).chunk(2)
        return z1, z2

    groups = group_rows(num, 0, 3)
    value = cached_step(ours, lambda _, some: forward(ours, some), loss, groups).loss
    expected = loss(*forward(reference, slice(None)))
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    for p, q in zip(ours.parameters(), reference.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-14)


class _Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class _Transposed(nn.Module):
    """Passes rows to a dropout in another order than that of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(x.flatten(2).transpose(0, 1)).transpose(0, 1).flatten(1)
        return out


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (_Functional(), r"0 \(_Functional\) draws random numbers of its own"),
        (nn.AlphaDropout(0.5), r"0 \(AlphaDropout\) draws"),
        (_Transposed(), "not one image after the other"),
    ],
    ids=["functional", "alpha", "order"],
)
def test_draws_that_would_depend_on_the_workers_are_refused(layer: Any, told: str) -> None:
    model = nn.Sequential(layer, nn.Flatten())
    key_draws(model)
    with pytest.raises(ConfigError, match=told):
        check_draws(model, torch.rand(4, 4, 2, 2))
    model.eval()
    assert model(torch.rand(4, 4, 2, 2)).shape == (4, 16)


class TwoBranches(nn.Module):
    """One layer in two branches, as a block of torchvision's Swin has it."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = KeyedDropPath(0.5, layer=3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.drop(x), self.drop(x)])


def test_a_layer_in_two_branches_draws_for_each() -> None:
    block, x = TwoBranches(), torch.ones(4000, 1, requires_grad=True)
    draw_for(keyed_layers(block), keys_of(ids=torch.arange(4000)))
    first, second = block(x)
    both = ((first > 0) & (second > 0)).float().mean().item()
    assert abs(both - 0.25) < 0.03  # 0.5, were they one draw
    draw_for(keyed_layers(block), keys_of(ids=torch.arange(4000)))
    again = block(x)
    assert torch.equal(torch.stack([first, second]), again)
    alone = KeyedDropPath(0.5, layer=3)
    draw_for([alone], keys_of(ids=torch.arange(4000)))
    assert torch.equal(alone(x), first)  # one use is what it was


def test_a_layer_in_two_branches_draws_the_same_when_it_is_run_again() -> None:
    block, x = TwoBranches(), torch.rand(200, 1, requires_grad=True)
    weight = torch.rand(2, 200, 1)
    gradients: list[Tensor] = []
    for recompute in (False, True):
        draw_for(keyed_layers(block), keys_of(ids=torch.arange(200)))
        out = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        gradients += torch.autograd.grad((out * weight).sum(), x)
    assert torch.equal(*gradients)
