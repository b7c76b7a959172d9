"""NT-Xent against golden values, the NumPy oracle, and the symmetries of eq. 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from simclr_ray.nn import ntxent as core
from simclr_ray.nn.losses import ContrastiveLoss, NTXentLoss, SupConLoss, contrastive_metrics
from tests.reference import ntxent


def random_views(seed: int, num: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    z1 = rng.normal(size=(num, dim))
    return torch.from_numpy(z1), torch.from_numpy(z1 + 0.7 * rng.normal(size=(num, dim)))


@pytest.mark.parametrize("golden", ntxent.GOLDEN, ids=str)
def test_loss_accuracy_and_entropy_equal_the_golden_values(golden: ntxent.Golden) -> None:
    z1, z2 = (torch.from_numpy(z) for z in ntxent.golden_views())
    loss = NTXentLoss(golden.temperature, normalize=golden.normalize)(z1, z2)
    logged = contrastive_metrics(z1, z2, golden.temperature, normalize=golden.normalize)
    assert loss.item() == pytest.approx(golden.loss, abs=1e-6)  # the table has six decimals
    assert logged.top1.item() == golden.accuracy
    assert logged.entropy.item() == pytest.approx(golden.entropy, abs=1e-6)


@pytest.mark.parametrize(("temperature", "loss"), [(0.1, 9.1e-5), (0.5, 0.239545), (1, 0.551445)])
def test_two_perfect_pairs_give_the_toy_values(temperature: float, loss: float) -> None:
    z = torch.eye(2, dtype=torch.float64)
    assert NTXentLoss(temperature)(z, z).item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
@pytest.mark.parametrize(("num", "dim"), [(1, 3), (2, 1), (7, 5), (33, 16)])
def test_value_and_gradient_equal_the_numpy_oracle(
    num: int, dim: int, temperature: float, normalize: bool
) -> None:
    z1, z2 = (z.requires_grad_() for z in random_views(num, num, dim))
    loss = NTXentLoss(temperature, normalize=normalize)(z1, z2)
    loss.backward()
    arrays = z1.detach().numpy(), z2.detach().numpy()
    expected, d1, d2 = ntxent.ntxent(*arrays, temperature, normalize=normalize)
    assert loss.item() == pytest.approx(expected, rel=1e-11, abs=1e-12)
    for ours, oracle in ((z1.grad, d1), (z2.grad, d2)):
        assert ours is not None
        np.testing.assert_allclose(ours.numpy(), oracle, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("temperature", "normalize"), [(0.1, True), (0.02, True), (1.0, False)])
def test_tiles_smaller_than_the_batch_change_nothing(
    monkeypatch: pytest.MonkeyPatch, temperature: float, normalize: bool
) -> None:
    monkeypatch.setattr(core, "TILE", 3)
    z1, z2 = (z.requires_grad_() for z in random_views(3, 9, 5))
    loss = NTXentLoss(temperature, normalize=normalize)(z1, z2)
    loss.backward()
    arrays = z1.detach().numpy(), z2.detach().numpy()
    expected, d1, d2 = ntxent.ntxent(*arrays, temperature, normalize=normalize)
    assert loss.item() == pytest.approx(expected, rel=1e-11)
    for ours, oracle in ((z1.grad, d1), (z2.grad, d2)):
        assert ours is not None
        np.testing.assert_allclose(ours.numpy(), oracle, rtol=1e-9, atol=1e-12)
    logged = contrastive_metrics(z1, z2, 0.1)
    by_hand = ntxent.contrastive_accuracy_entropy(*arrays, 0.1)
    assert [v.item() for v in logged] == pytest.approx(by_hand, rel=1e-12)


def test_swapping_the_views_and_permuting_the_images_change_nothing() -> None:
    z1, z2 = random_views(4, 12, 6)
    order = torch.from_numpy(np.random.default_rng(5).permutation(12))
    loss = NTXentLoss(0.1)
    value = loss(z1, z2).item()
    assert loss(z2, z1).item() == pytest.approx(value, rel=1e-13)
    assert loss(z1[order], z2[order]).item() == pytest.approx(value, rel=1e-13)


def test_the_length_of_z_does_not_matter_when_normalised() -> None:
    z1, z2 = random_views(6, 8, 4)
    loss = NTXentLoss(0.5)
    assert loss(3 * z1, 0.01 * z2).item() == pytest.approx(loss(z1, z2).item(), rel=1e-12)


@pytest.mark.parametrize("num", [2, 7, 256])
def test_rows_that_are_all_equal_give_ln_of_2n_less_1(num: int) -> None:
    z = torch.ones(num, 5, dtype=torch.float64)
    assert NTXentLoss(0.1)(z, z).item() == pytest.approx(math.log(2 * num - 1), rel=1e-12)


def test_autocast_does_not_reach_inside() -> None:
    z1, z2 = (z.float().requires_grad_() for z in random_views(7, 64, 16))
    outside = NTXentLoss(0.05)(z1, z2)
    outside.backward()
    assert z1.grad is not None
    gradient = z1.grad.clone()
    z1.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = NTXentLoss(0.05)(z1, z2)
        logged = contrastive_metrics(z1, z2, 0.05)
        inside.backward()
    assert inside.dtype == torch.float32
    assert inside.item() == pytest.approx(outside.item(), rel=1e-6)
    torch.testing.assert_close(z1.grad, gradient, rtol=1e-6, atol=1e-9)
    assert logged == contrastive_metrics(z1, z2, 0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_stays_finite_at_a_small_temperature(dtype: torch.dtype) -> None:
    z1, z2 = (z.to(dtype).requires_grad_() for z in random_views(8, 32, 8))
    loss = NTXentLoss(0.05)(z1, z2)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert z1.grad is not None
    assert torch.isfinite(z1.grad).all()
    in_float32 = NTXentLoss(0.05)(z1.detach().float(), z2.detach().float())
    assert loss.item() == pytest.approx(in_float32.item(), rel=1e-6)


def test_a_row_of_zeros_gives_finite_gradients() -> None:
    z1, z2 = random_views(9, 4, 3)
    z1[0] = 0
    z1.requires_grad_()
    NTXentLoss(0.1)(z1, z2).backward()
    assert z1.grad is not None
    assert torch.isfinite(z1.grad).all()


def test_the_gradient_passes_gradcheck_with_an_upstream_factor() -> None:
    views = [z.requires_grad_() for z in random_views(10, 5, 4)]
    assert torch.autograd.gradcheck(lambda a, b: 3 * NTXentLoss(0.3)(a, b), views)


def test_wrong_shapes_and_temperatures_are_refused() -> None:
    z1, z2 = random_views(11, 4, 3)
    with pytest.raises(ValueError, match=r"\[n, D\]"):
        NTXentLoss()(z1, z2[:3])
    with pytest.raises(ValueError, match=r"\[n, D\]"):
        NTXentLoss()(z1[0], z2[0])
    with pytest.raises(ValueError, match="temperature"):
        NTXentLoss(0.0)


@pytest.mark.parametrize("length", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("temperature", [0.1, 1e-3])
@pytest.mark.parametrize("build", [NTXentLoss, SupConLoss, partial(NTXentLoss, negatives="other")])
def test_products_without_a_bound_keep_their_digits_in_float32(
    build: Callable[..., ContrastiveLoss], temperature: float, length: float
) -> None:
    """Below 0, or with a gradient that is not finite, is where float32 products ended."""
    loss = build(temperature, normalize=False)
    labels = torch.full((64,), -1) if loss.takes_labels else None
    wide = [z * length for z in random_views(5, 64, 32)]
    z1, z2 = (z.float().requires_grad_() for z in wide)
    value = loss(z1, z2, labels)
    assert value.dtype == torch.float32
    value.backward()
    exact = [z.detach().double().requires_grad_() for z in (z1, z2)]
    expected = loss(*exact, labels)
    expected.backward()
    assert value.item() >= 0
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, oracle in zip((z1.grad, z2.grad), (z.grad for z in exact), strict=True):
        assert ours is not None
        assert oracle is not None
        assert ours.isfinite().all()
        torch.testing.assert_close(
            ours.double(), oracle, rtol=1e-5, atol=1e-5 * oracle.abs().max().item()
        )


@pytest.mark.parametrize("normalize", [True, False])
def test_partners_alike_and_far_from_the_others_lose_nothing(normalize: bool) -> None:
    z = 40 * torch.eye(16, 32) + 0.01 * random_views(6, 16, 32)[0].float()
    for images in (1, 16):
        value = NTXentLoss(0.01, normalize=normalize)(z[:images], z[:images]).item()
        assert 0 <= value < 1e-6
