"""Global batch norm alone, in one process: it is torch's, with an optional shift."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from simclr_ray.nn.batchnorm import GlobalBatchNorm
from tests.reference import batchnorm


@pytest.mark.parametrize("shape", [(9, 4), (5, 4, 3, 2)])
def test_forward_backward_and_running_statistics_equal_the_oracle(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    rows, upstream = 3 + 2 * rng.normal(size=(2, *shape))
    gamma, beta = rng.normal(size=(2, 4))
    norm = GlobalBatchNorm(4, momentum=0.3).double()
    norm.weight.data.copy_(torch.from_numpy(gamma))
    assert norm.bias is not None
    norm.bias.data.copy_(torch.from_numpy(beta))
    x = torch.from_numpy(rows).requires_grad_()
    y = norm(x)
    y.backward(torch.from_numpy(upstream))
    expected = batchnorm.forward(rows, gamma, beta, 1e-5)
    dx, dgamma, dbeta = batchnorm.backward(rows, upstream, gamma, 1e-5)
    count = rows.size // 4
    unbiased = expected.var * count / (count - 1)
    for ours, oracle in (
        (y, expected.y),
        (x.grad, dx),
        (norm.weight.grad, dgamma),
        (norm.bias.grad, dbeta),
        (norm.running_mean, 0.3 * expected.mean),
        (norm.running_var, 0.7 + 0.3 * unbiased),
    ):
        assert ours is not None
        np.testing.assert_allclose(ours.detach().numpy(), oracle, rtol=1e-10, atol=1e-11)


def test_in_eval_mode_it_uses_and_keeps_the_running_statistics() -> None:
    norm = GlobalBatchNorm(3).eval()
    norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    norm.running_var.copy_(torch.tensor([4.0, 4.0, 4.0]))
    y = norm(torch.tensor([[3.0, 2.0, 1.0]]))
    torch.testing.assert_close(y, torch.tensor([[1.0, 0.0, -1.0]]), rtol=0, atol=1e-5)
    assert norm.running_mean.tolist() == [1.0, 2.0, 3.0]


def test_it_takes_the_state_of_torchs_batch_norm_and_without_shift_has_no_bias() -> None:
    ours, torchs = GlobalBatchNorm(3), nn.BatchNorm2d(3)
    state = {k: v for k, v in torchs.state_dict().items() if k != "num_batches_tracked"}
    ours.load_state_dict(state)
    bare = GlobalBatchNorm(3, shift=False)
    assert [n for n, _ in bare.named_parameters()] == ["weight"]
    x = torch.from_numpy(np.random.default_rng(2).normal(size=(8, 3))).float()
    torch.testing.assert_close(bare(x), ours(x))
