"""Cross entropy over ranks' shares, heads of classifiers, and a temperature that is learned."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from simclr_ray.nn.heads import LearnableTemperature, classifier_head, linear_head, mlp_head
from simclr_ray.nn.losses import NTXentLoss
from simclr_ray.nn.supervised import CrossEntropyLoss


def scores(num: int = 12, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, num, classes, dtype=torch.float64)
    return z1.requires_grad_(), z2.requires_grad_(), torch.randint(0, classes, (num,))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("views", [1, 2])
def test_the_loss_is_torchs_mean_over_views(views: int, smoothing: float) -> None:
    z1, z2, labels = scores()
    value = CrossEntropyLoss(smoothing, views=views)(z1, z2, labels)
    each = [F.cross_entropy(z, labels, label_smoothing=smoothing) for z in (z1, z2)[:views]]
    assert value.item() == pytest.approx(sum(e.item() for e in each) / views, rel=1e-12)
    assert CrossEntropyLoss(views=views).one_view == (views == 1)


def test_metrics_are_accuracy_and_entropy_of_the_first_view() -> None:
    z1, z2, labels = scores()
    found = CrossEntropyLoss().metrics(z1.detach(), z2.detach(), labels)
    assert found.top1.item() == (z1.argmax(1) == labels).double().mean().item()
    p = z1.softmax(1)
    assert found.entropy.item() == pytest.approx(-(p * p.log()).sum(1).mean().item())


def test_labels_are_asked_for() -> None:
    z1, z2, _ = scores()
    with pytest.raises(ValueError, match="one label for each image"):
        CrossEntropyLoss()(z1, z2)


def test_a_classifier_starts_at_ln_k_and_keeps_hidden_layers_as_an_mlp_head_has_them() -> None:
    torch.manual_seed(0)
    head = classifier_head(16, 10, layers=1)
    h, labels = torch.randn(8, 16), torch.randint(0, 10, (8,))
    assert CrossEntropyLoss()(head(h), head(h), labels).item() == pytest.approx(math.log(10))
    names = set(mlp_head(16, 10, 3).state_dict())
    hidden = {n for n in head.state_dict() if not n.startswith("3.")}
    assert hidden == {n for n in names if n.split(".")[0] in "012"}


def test_without_batch_norm_dense_layers_have_a_bias() -> None:
    plain = mlp_head(16, 8, 3, batch_norm=False)
    assert [type(m).__name__ for m in plain] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert all(m.bias is not None for m in plain if isinstance(m, torch.nn.Linear))
    assert linear_head(16, 8, batch_norm=False)[0].bias is not None
    assert linear_head(16, 8)[0].bias is None


def test_a_learned_temperature_is_the_temperature_and_its_gradient_is_the_losss() -> None:
    torch.manual_seed(1)
    z1, z2 = torch.randn(2, 9, 5, dtype=torch.float64)
    head = LearnableTemperature(0.3).double()
    value = NTXentLoss(1.0, normalize=False)(head(z1), head(z2))
    assert value.item() == pytest.approx(NTXentLoss(0.3)(z1, z2).item(), rel=1e-6)
    value.backward()
    log = head.log_temperature
    ends = [NTXentLoss(math.exp(log.item() + d))(z1, z2).item() for d in (1e-5, -1e-5)]
    assert log.grad is not None
    assert log.grad.item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)
