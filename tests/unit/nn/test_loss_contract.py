"""What every contrastive loss keeps: oracle, symmetries, exact gradients, half precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from simclr_ray.nn import ntxent
from simclr_ray.nn.losses import DCLLoss, NTLogisticLoss, SupConLoss, TripletLoss
from tests.reference import contrastive
from tests.reference.contrastive import CASES, Case

every_loss = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def inputs(num: int = 9, dim: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return z1, z2 [num, dim], and labels of three classes and none."""
    rng = np.random.default_rng(num)
    z1 = rng.normal(size=(num, dim))
    z2 = z1 + 0.9 * rng.normal(size=(num, dim))
    labels = rng.integers(-1, 3, size=num)
    return torch.from_numpy(z1), torch.from_numpy(z2), torch.from_numpy(labels)


def oracle(case: Case, z1: torch.Tensor, z2: torch.Tensor, labels: torch.Tensor) -> float:
    return contrastive.value(case, z1.numpy(), z2.numpy(), labels.numpy())


@every_loss
@pytest.mark.parametrize("num", [2, 9])
def test_the_value_is_the_oracles(case: Case, num: int) -> None:
    z1, z2, labels = inputs(num)
    found = case.make()(z1, z2, labels)
    assert found.item() == pytest.approx(oracle(case, z1, z2, labels), rel=1e-12, abs=1e-13)


@every_loss
def test_the_gradient_is_the_oracles_by_finite_differences(case: Case) -> None:
    z1, z2, labels = inputs()
    (z1.requires_grad_(), z2.requires_grad_())
    (3 * case.make()(z1, z2, labels)).backward()
    assert z1.grad is not None
    assert z2.grad is not None
    ours = torch.cat([z1.grad, z2.grad]).numpy()
    z = torch.cat([z1, z2]).detach()
    width = 1e-6
    by_hand: NDArray[np.float64] = np.zeros_like(ours)
    constant = case._replace(name="dcl") if case.name == "dclw" else case
    for place in np.ndindex(*ours.shape):
        ends = []
        for sign in (1, -1):
            moved = z.clone()
            moved[place] += sign * width
            ends.append(3 * oracle(constant, moved[: len(z1)], moved[len(z1) :], labels))
        by_hand[place] = (ends[0] - ends[1]) / (2 * width)
    if case.name == "dclw":  # its weights are constants, which the oracle would differentiate
        assert not np.allclose(ours, by_hand, rtol=1e-3)
        return
    np.testing.assert_allclose(ours, by_hand, rtol=1e-6, atol=1e-8)


def test_dclws_gradient_takes_its_weights_as_constants() -> None:
    z1, z2, _ = inputs()
    (z1.requires_grad_(), z2.requires_grad_())
    DCLLoss(0.2, sigma=0.5)(z1, z2).backward()
    a, b = (z.detach().clone().requires_grad_() for z in (z1, z2))
    u, v = (z / z.norm(dim=1, keepdim=True) for z in (a, b))
    positives = (u * v).sum(1)
    weights = (2 - len(a) * torch.softmax(positives / 0.5, 0)).detach()
    plain = DCLLoss(0.2)(a, b) + ((1 - weights) * positives).mean() / 0.2
    plain.backward()
    torch.testing.assert_close(z1.grad, a.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(z2.grad, b.grad, rtol=1e-10, atol=1e-12)


@every_loss
def test_swapped_views_and_another_order_of_images_change_nothing(case: Case) -> None:
    z1, z2, labels = inputs()
    loss = case.make()
    value = loss(z1, z2, labels).item()
    order = torch.from_numpy(np.random.default_rng(1).permutation(len(z1)))
    assert loss(z2, z1, labels).item() == pytest.approx(value, rel=1e-12)
    assert loss(z1[order], z2[order], labels[order]).item() == pytest.approx(value, rel=1e-12)


@every_loss
def test_tiles_smaller_than_the_batch_change_nothing(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> list[torch.Tensor]:
        z1, z2, labels = inputs()
        (z1.requires_grad_(), z2.requires_grad_())
        value = case.make()(z1, z2, labels)
        return [value.detach(), *torch.autograd.grad(value, [z1, z2])]

    whole = found()
    monkeypatch.setattr(ntxent, "TILE", 4)
    for ours, expected in zip(found(), whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


@every_loss
def test_bf16_views_give_finite_values_and_gradients_that_autocast_does_not_reach(
    case: Case,
) -> None:
    def found(*, autocast: bool) -> tuple[torch.Tensor, torch.Tensor]:
        z1, z2, labels = inputs(32)
        a, b = (z.bfloat16().requires_grad_() for z in (z1, z2))
        loss = case.make()
        if not isinstance(loss, TripletLoss) and loss.normalize:
            loss.temperature = 0.05
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(a, b, labels)
            value.backward()
        assert a.grad is not None
        return value.detach(), a.grad

    value, gradient = found(autocast=False)
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
    inside, gradient_inside = found(autocast=True)
    assert inside.item() == pytest.approx(value.item(), rel=1e-6)
    torch.testing.assert_close(gradient_inside, gradient)


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_an_anchors_gradient_is_table_2s(tau: float) -> None:
    rng = np.random.default_rng(2)
    u, positive, *negatives = rng.normal(size=(6, 4)) / 2
    negative = np.stack(negatives)

    def seen(anchor: NDArray[np.float64]) -> contrastive.Anchor:
        return contrastive.Anchor(
            float(anchor @ positive), negative @ anchor, np.empty(0), np.empty(0), 1.0
        )

    def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return 1 / (1 + np.exp(-x))

    up, un = np.exp(u @ positive / tau), np.exp(negative @ u / tau)
    z = up + un.sum()
    active = (negative @ u - u @ positive + 0.4 > 0).astype(float)
    table = {
        "ntxent": (
            contrastive.ntxent(tau),
            (1 - up / z) / tau * positive - (un / z / tau) @ negative,
        ),
        "logistic": (
            contrastive.logistic(tau),
            sigmoid(-u @ positive / tau) / tau * positive
            - (sigmoid(negative @ u / tau) / tau) @ negative / len(negative),
        ),
        "triplet": (
            contrastive.triplet(0.4),
            (active[:, None] * (positive - negative)).sum(0) / len(negative),
        ),
    }
    for term, of_negative_loss in table.values():
        ends = [[term(seen(u + sign * e)) for sign in (1e-6, -1e-6)] for e in np.eye(4)]
        by_hand = np.array([(a - b) / 2e-6 for a, b in ends])
        np.testing.assert_allclose(-by_hand, of_negative_loss, rtol=1e-6, atol=1e-8)


def test_what_makes_no_loss_is_refused() -> None:
    z1, z2, _ = inputs()
    with pytest.raises(ValueError, match="one label for each image"):
        SupConLoss()(z1, z2)
    with pytest.raises(ValueError, match="margin"):
        TripletLoss(-0.1)
    with pytest.raises(ValueError, match="no negatives"):
        NTLogisticLoss()(z1[:1], z2[:1])
