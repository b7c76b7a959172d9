"""LARS against the NumPy oracle of the authors' rule, and the schedule against its formula."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from simclr_ray.config.experiment import AdamWConfig, LARSConfig, SGDConfig
from simclr_ray.nn.heads import mlp_head
from simclr_ray.optim import LARS, build_optimizer, clip_gradients, learning_rate_at
from tests.reference import lars as oracle

SHAPES = [(4, 3, 3, 3), (7, 5), (5,), (1,)]


def follow(
    form: Literal["authors", "outside"],
    dtype: torch.dtype,
    *,
    adapt: bool = True,
    weight_decay: float = 0.01,
    steps: int = 20,
    fused: bool = True,
) -> list[float]:
    """Return each tensor's relative distance from the oracle after `steps` with moving rates."""
    rng = np.random.default_rng(1)
    starts = [rng.normal(size=s) for s in SHAPES]
    ours = [nn.Parameter(torch.from_numpy(w).to(dtype)) for w in starts]
    theirs = [
        oracle.Lars(w, momentum=0.9, weight_decay=weight_decay, adapted=adapt, form=form)
        for w in starts
    ]
    groups: list[dict[str, Any]] = [{"params": ours, "adapt": adapt}]
    optimizer = LARS(groups, lr=0.0, weight_decay=weight_decay, momentum_form=form, fused=fused)
    for step in range(steps):
        rate = oracle.learning_rate(step, 4.8, 10, 2 * steps)
        optimizer.param_groups[0]["lr"] = rate
        for parameter, reference in zip(ours, theirs, strict=True):
            gradient = rng.normal(size=reference.weight.shape) * 10.0 ** rng.integers(-3, 3)
            parameter.grad = torch.from_numpy(gradient).to(dtype)
            reference.step(gradient, rate)
        optimizer.step()
    return [
        float(np.linalg.norm(p.detach().double().numpy() - r.weight) / np.linalg.norm(r.weight))
        for p, r in zip(ours, theirs, strict=True)
    ]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("adapt", [True, False])
def test_twenty_steps_through_warm_up_equal_the_authors_rule(adapt: bool, fused: bool) -> None:
    assert max(follow("authors", torch.float64, adapt=adapt, fused=fused)) < 1e-12
    in_float32 = follow("authors", torch.float32, adapt=adapt, fused=fused)
    assert max(in_float32) < 1e-6 * 5  # float32 over 20 steps


def test_fused_or_not_a_weight_of_zero_norm_steps_by_the_rate_when_clipped() -> None:
    for fused in (True, False):
        w = nn.Parameter(torch.zeros(3))
        w.grad = torch.ones(3)
        LARS([w], lr=4.0, clip_lr=True, fused=fused).step()
        assert w.tolist() == [-4.0] * 3


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.0}, {"clip_lr": True}, {"clip_lr": True, "lr": 0.0}]
)
def test_the_fused_kernel_takes_tensors_of_any_layout_to_the_same_weights(
    options: dict[str, Any],
) -> None:
    def stepped(fused: bool, layout: torch.memory_format) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        w = nn.Parameter(torch.randn(6, 3, 3, 3, generator=generator, dtype=torch.float64))
        w.grad = torch.randn(w.shape, generator=generator, dtype=torch.float64)
        w.data = w.data.to(memory_format=torch.channels_last)
        w.grad = w.grad.to(memory_format=layout)
        LARS([w], **({"lr": 0.7} | options), weight_decay=0.1, fused=fused).step()
        return w.detach()

    for layout in (torch.channels_last, torch.contiguous_format):
        torch.testing.assert_close(
            stepped(True, layout), stepped(False, layout), rtol=1e-13, atol=0
        )


def test_the_outside_form_is_that_of_other_libraries() -> None:
    # the oracle has no epsilon under the ratio; theirs, 1e-8, is below the gradients' norms
    assert max(follow("outside", torch.float64)) < 1e-6


def test_the_two_forms_differ_when_the_rate_moves() -> None:
    rng = np.random.default_rng(2)
    weight, gradient = rng.normal(size=(2, 4, 4))
    found = []
    forms: tuple[Literal["authors", "outside"], ...] = ("authors", "outside")
    for form in forms:
        parameter = nn.Parameter(torch.from_numpy(weight.copy()))
        optimizer = LARS([parameter], lr=1.0, momentum_form=form)
        for rate in (1.0, 0.1):
            optimizer.param_groups[0]["lr"] = rate
            parameter.grad = torch.from_numpy(gradient)
            optimizer.step()
        found.append(parameter.detach())
    assert (found[0] - found[1]).norm() > 1e-4 * found[0].norm()


@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_a_zero_norm_means_a_plain_step_and_no_division_by_zero(zero: str) -> None:
    weight = torch.zeros(3) if zero == "weight" else torch.ones(3)
    gradient = torch.zeros(3) if zero == "gradient" else torch.full((3,), 2.0)
    parameter = nn.Parameter(weight.clone())
    parameter.grad = gradient
    LARS([parameter], lr=0.5).step()
    torch.testing.assert_close(parameter.detach(), weight - 0.5 * gradient)


def test_a_parameter_without_a_gradient_stays() -> None:
    parameter = nn.Parameter(torch.ones(3))
    LARS([parameter], lr=0.5).step()
    assert parameter.tolist() == [1, 1, 1]


def test_the_buffer_survives_saving_and_loading() -> None:
    def steps(optimizer: LARS, parameter: nn.Parameter, num: int) -> None:
        for _ in range(num):
            parameter.grad = parameter.detach().sin()
            optimizer.step()

    whole = nn.Parameter(torch.arange(1.0, 5.0))
    steps(LARS([whole], lr=0.5, weight_decay=0.1), whole, 4)
    parts = nn.Parameter(torch.arange(1.0, 5.0))
    first = LARS([parts], lr=0.5, weight_decay=0.1)
    steps(first, parts, 2)
    second = LARS([parts], lr=0.1)
    second.load_state_dict(first.state_dict())
    steps(second, parts, 2)
    assert torch.equal(whole, parts)


def test_batch_norm_and_biases_are_excluded_from_decay_and_adaptation() -> None:
    model = nn.Sequential(mlp_head(6, 4), nn.Linear(4, 2))
    decayed, plain = build_optimizer(model, LARSConfig(weight_decay=0.3)).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {"0.0.weight", "0.3.weight", "1.weight"}
    assert {names[id(p)] for p in plain["params"]} == {
        "0.1.weight",
        "0.1.bias",
        "0.4.weight",
        "1.bias",
    }
    assert (decayed["weight_decay"], decayed["adapt"]) == (0.3, True)
    assert (plain["weight_decay"], plain["adapt"]) == (0.0, False)
    for config in (SGDConfig(weight_decay=0.3), AdamWConfig(weight_decay=0.3)):
        groups = build_optimizer(model, config).param_groups
        assert [g["weight_decay"] for g in groups] == [0.3, 0.0]


@pytest.mark.parametrize(("warmup", "total"), [(10, 100), (0, 7), (3, 4), (976, 97_657)])
def test_the_rate_is_the_authors_schedule_and_starts_at_zero(warmup: int, total: int) -> None:
    for step in sorted({0, 1, warmup // 2, warmup, (warmup + total) // 2, total - 1}):
        expected = oracle.learning_rate(step, 2.0, warmup, total)
        assert learning_rate_at(step, 2.0, warmup, total) == pytest.approx(expected, abs=1e-15)
    assert learning_rate_at(0, 2.0, warmup, total) == (0.0 if warmup else 2.0)


def test_warm_up_that_ends_with_the_run_never_divides_by_zero() -> None:
    assert learning_rate_at(9, 1.0, 10, 10) == pytest.approx(0.9)
    assert learning_rate_at(10, 1.0, 10, 10) == pytest.approx(1.0)


def test_a_long_gradient_is_scaled_to_the_longest_and_a_short_one_left() -> None:
    model = nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[2.0, 3.0]]), torch.tensor([6.0])  # norm 7
    assert clip_gradients(model, 0.0).item() == pytest.approx(7.0)
    assert model.bias.grad.item() == 6.0
    assert clip_gradients(model, 8.0).item() == pytest.approx(7.0)
    assert model.bias.grad.item() == 6.0
    assert clip_gradients(model, 3.5).item() == pytest.approx(7.0)
    assert model.weight.grad.tolist() == [[pytest.approx(1.0), pytest.approx(1.5)]]
    assert clip_gradients(model, 0.0).item() == pytest.approx(3.5, rel=1e-5)


def test_an_optimizer_and_a_linear_probe_load_no_compiler() -> None:
    # in an interpreter of its own: here another test may have loaded it
    code = """
import sys, torch
from simclr_ray.config.experiment import LinearConfig
from simclr_ray.evaluation.linear import fit_linear
from simclr_ray.optim import LARS
layer = torch.nn.Linear(2, 2)
optimizer = LARS(layer.parameters(), lr=0.1)
layer(torch.ones(1, 2)).sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
fit_linear(torch.randn(8, 3), torch.arange(8) % 2, 2, LinearConfig(epochs=1), 0)
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
