"""bf16 autocast over processes: the global batch norm keeps its statistics in float32."""

from __future__ import annotations

import pytest
import torch

from simclr_ray.distributed.spawn import spawn
from simclr_ray.nn.batchnorm import GlobalBatchNorm
from tests.distributed import bf16_ranks

pytestmark = pytest.mark.distributed


def test_two_ranks_normalise_bf16_as_one_process_does() -> None:
    whole = bf16_ranks.inputs()
    norm = GlobalBatchNorm(5).train()
    out = norm(whole)
    parts = spawn(bf16_ranks.normalise, 2)
    together = torch.cat([torch.tensor(p) for p, _, _ in parts])
    assert out.dtype == torch.bfloat16
    # one unit in the last place of bf16 near 4 is 1/64
    torch.testing.assert_close(together, out.float().detach(), rtol=0, atol=1 / 32)
    for _, (mean, variance), _ in parts:
        torch.testing.assert_close(torch.tensor(mean), norm.running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(variance), norm.running_var, rtol=1e-4, atol=1e-6)

    exact = whole.double().requires_grad_()
    (GlobalBatchNorm(5).double().train()(exact) ** 3).sum().backward()
    assert exact.grad is not None
    gradient = torch.cat([torch.tensor(g) for _, _, g in parts]).double()
    varies = [0, 1, 2, 4]
    error = (gradient - exact.grad)[:, varies].norm() / exact.grad[:, varies].norm()
    assert error < 2**-7  # terms are rounded to bf16's 8 bits
    assert gradient[:, 3].isfinite().all()
