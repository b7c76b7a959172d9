"""LARS by the authors' rule, the learning rate of a step, and which parameter is decayed.

LARS (You et al. 2017, arXiv:1708.03888) as in google-research/simclr `lars_optimizer.py`,
`classic_momentum=True`. The ports of other libraries keep the rate *outside* the momentum buffer;
the two differ whenever the rate moves, that is during warm-up and cosine. Both forms are here, by
name; `tests/reference/lars.py` is the NumPy oracle of both.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from simclr_ray.config.components import build
from simclr_ray.config.sections.training import AnyOptimizerConfig, ScheduleConfig
from simclr_ray.nn.parameter_groups import parameter_groups

COSINE: Final = ScheduleConfig()


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling: SGD with momentum whose rate follows ‖w‖/‖g‖ of a tensor.

    You et al. 2017 (arXiv:1708.03888), by the rule of the authors of SimCLR
    (`lars_optimizer.py`, `classic_momentum=True`). For each tensor w with gradient g, in groups
    with `adapt=True`:

        g' = g + wd·w;  r = trust·‖w‖/‖g'‖ (1 where either norm is 0);
        v = momentum·v + (lr·r)·g';  w = w − v

    With `adapt=False`, r = 1: batch norm and biases, which the authors exclude. `outside` is the
    form of lightly and solo-learn: r = trust·‖w‖/(‖g‖ + wd·‖w‖ + 1e-8), v = momentum·v +
    r·(g + wd·w), w = w − lr·v; and `clip_lr` replaces r by min(r/lr, 1), as solo-learn does.
    State: one momentum buffer a tensor, of its shape, dtype and device. A step on GPU does not
    wait for the device. Oracle: `tests/reference/lars.py`.

    Args:
        params: Parameters, or groups of them as dicts: dense floating-point tensors of any shape.
            A group may set `adapt` (default True) and every option below for itself. A parameter
            without a gradient is left alone.
        lr: Learning rate of this step, >= 0, without unit. A schedule sets `group["lr"]`
            (`learning_rate_at`); the paper's peak is 0.3·N/256.
        momentum: μ in [0, 1).
        weight_decay: wd >= 0, added to the gradient before the norms are taken; the paper has 1e-6.
        trust_coefficient: Above 0; `eeta` in the authors' code.
        momentum_form: `authors` (rate inside the buffer) or `outside`.
        clip_lr: Use min(r/lr, 1) for r.
        fused: On CPU, in the authors' form, update with torch's fused SGD kernel, which reads and
            writes each number once. Elsewhere it changes nothing.

    Raises:
        ValueError: An argument is out of its bounds, or `params` is empty.

    Examples:
        ‖w‖ = 5 and ‖g‖ = 1, so the tensor moves by lr·trust·5 along g.

        >>> import torch
        >>> from simclr_ray.optim import LARS
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = LARS([w], lr=1.0)
        >>> w.grad = torch.tensor([0.6, 0.8])
        >>> optimizer.step()
        >>> [round(x, 4) for x in w.tolist()]
        [2.997, 3.996]

        Groups as the authors have them: biases and batch norm neither adapted nor decayed.

        >>> layer = torch.nn.Linear(2, 2)
        >>> groups = [{"params": [layer.weight]},
        ...           {"params": [layer.bias], "adapt": False, "weight_decay": 0.0}]
        >>> optimizer = LARS(groups, lr=0.3, weight_decay=1e-6)
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [1e-06, 0.0]
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        *,
        momentum_form: Literal["authors", "outside"] = "authors",
        clip_lr: bool = False,
        fused: bool = True,
    ) -> None:
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0 or trust_coefficient <= 0:
            raise ValueError("LARS needs lr >= 0, 0 <= momentum < 1, weight_decay >= 0, trust > 0")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "momentum_form": momentum_form,
            "clip_lr": clip_lr,
            "fused": fused,
            "adapt": True,
        }
        super().__init__(params, defaults)

    # Torch wraps these so that `torch.compile` leaves them out, and imports it, sympy and triton
    # on the first call: 1.4 s of each process that makes an optimizer, where nothing is compiled.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override] # torch's has overloads
        """Update all parameters in place; return the loss of `closure`, None without one.

        Args:
            closure: Computes the loss again and its gradients, as torch's optimizers take it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        lr, inside = group["lr"], group["momentum_form"] == "authors"
        raw = [p.grad for p in params if p.grad is not None]
        buffers = [self._buffer(p) for p in params]
        fused = group["fused"] and inside and group["momentum"] > 0
        if fused and all(_is_dense_on_cpu(p) for p in params):
            self._update_fused(params, raw, buffers, group)
            return
        decayed = list(torch._foreach_add(raw, params, alpha=group["weight_decay"]))
        if group["adapt"]:
            ratios = self._ratios(params, raw, decayed, group)
            torch._foreach_mul_(decayed, ratios)
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, decayed, alpha=lr if inside else 1.0)
        torch._foreach_add_(params, buffers, alpha=-1.0 if inside else -lr)

    def _buffer(self, p: Tensor) -> Tensor:
        """Return the momentum buffer of a parameter, laid out as it is."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        elif state["momentum_buffer"].stride() != p.stride():  # a loaded buffer's may differ
            state["momentum_buffer"] = _laid_out(state["momentum_buffer"], p)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    @staticmethod
    def _update_fused(
        params: list[Tensor], raw: list[Tensor], buffers: list[Tensor], group: dict[str, Any]
    ) -> None:
        """Write v = μ·v + (lr·r)·(g + wd·w), w = w − v as SGD of rate 1 and dampening 1 − lr·r."""
        raw = [_flat(_laid_out(g, w)) for g, w in zip(raw, params, strict=True)]
        params, buffers = [_flat(w) for w in params], [_flat(v) for v in buffers]

        def update(w: list[Tensor], g: list[Tensor], v: list[Tensor], rate: float) -> None:
            torch._fused_sgd_(
                w,
                g,
                v,
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=1.0,
                dampening=1.0 - group["lr"] * rate,
                nesterov=False,
                maximize=False,
                is_first_step=False,
            )

        if not group["adapt"]:
            update(params, raw, buffers, 1.0)
            return
        for w, g, v in zip(params, raw, buffers, strict=True):
            update([w], [g], [v], _local_rate(w, g, group))  # w and g are still in cache

    @staticmethod
    def _ratios(
        params: list[Tensor], raw: list[Tensor], decayed: list[Tensor], group: dict[str, Any]
    ) -> list[Tensor]:
        """Return one scalar tensor a parameter: the local learning rate."""
        weight_norms = torch.stack(torch._foreach_norm(params))
        if group["momentum_form"] == "authors":
            gradient_norms = torch.stack(torch._foreach_norm(decayed))
            bottom = gradient_norms
        else:
            gradient_norms = torch.stack(torch._foreach_norm(raw))
            bottom = gradient_norms + group["weight_decay"] * weight_norms + 1e-8
        usable = (weight_norms > 0) & (gradient_norms > 0)
        ratios = group["trust_coefficient"] * weight_norms / bottom
        if group["clip_lr"]:
            ratios = (ratios / group["lr"]).clamp(max=1.0)
        return list(torch.where(usable, ratios, torch.ones_like(ratios)).unbind())


def _local_rate(w: Tensor, g: Tensor, group: dict[str, Any]) -> float:
    """Return r of one flat CPU tensor, reading w and g but writing nothing.

    ‖g + wd·w‖² = ‖g‖² + 2·wd·g·w + wd²·‖w‖².
    """
    decay = group["weight_decay"]
    squared, weight = float(torch.dot(g, g)), float(torch.dot(w, w))
    if decay:
        squared += 2 * decay * float(torch.dot(g, w)) + decay**2 * weight
    if weight <= 0 or squared <= 0:
        return 1.0
    rate: float = group["trust_coefficient"] * math.sqrt(weight / squared)
    if not group["clip_lr"]:
        return rate
    return min(rate / group["lr"], 1.0) if group["lr"] > 0 else 1.0  # warm-up starts at rate 0


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """Return `tensor` in the memory layout of `like`: itself where it has it."""
    if tensor.stride() == like.stride():
        return tensor
    sides = zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
    if all(mine == theirs for length, mine, theirs in sides if length > 1):
        return tensor
    return torch.empty_like(like).copy_(tensor)


def _flat(tensor: Tensor) -> Tensor:
    """Return a dense tensor's memory as a vector: kernels copy what is not contiguous."""
    if tensor.ndim == 1:
        return tensor
    if tensor.is_contiguous():
        return tensor.view(-1)
    return tensor.as_strided((tensor.numel(),), (1,))


def _is_dense_on_cpu(tensor: Tensor) -> bool:
    if not tensor.is_cpu:
        return False
    if tensor.is_contiguous():
        return True
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def learning_rate_at(
    step: int, peak: float, warmup: int, total: int, config: ScheduleConfig = COSINE
) -> float:
    """Return the rate of step 0 ≤ `step` < `total`: linear from 0, then cosine to 0.

    lr(t) = peak·t/w for t < w, then peak·½(1 + cos(π(t − w)/(T − w))) (authors' `model.py`).

    Args:
        step: t, from 0.
        peak: Rate at the end of warm-up.
        warmup: w, steps.
        total: T, steps of the run.
        config: What comes after warm-up; with `decay: constant` the rate stays at `peak`.
    """
    if step < warmup:
        return peak * step / warmup
    if config.decay == "constant":
        return peak
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def build_optimizer(model: nn.Module, config: AnyOptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer of `model` at rate 0; the loop sets the rate of each step.

    Batch norm and biases are neither decayed nor, under LARS, adapted (the authors' exclusions). A
    classifier's last layer is decayed and not adapted. A learned temperature is adapted and not
    decayed: the raw rate, made for adapted layers, would move it out of its bounds. These layers
    say so themselves (`nn.parameter_groups`).
    """
    groups = parameter_groups(model, config.weight_decay)
    return build(config, torch.optim.Optimizer, groups, lr=0.0)


def clip_gradients(model: nn.Module, longest: float) -> Tensor:
    """Scale the gradients of `model` down to a joint norm of at most `longest`, in place.

    All ranks have the same averaged gradients, so each scales them alike without a collective.

    Args:
        model: After a backward pass.
        longest: Above 0; with 0 nothing is scaled.

    Returns:
        The norm before, a scalar: of all gradients as one vector.
    """
    trained = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if longest:
        torch.nn.utils.clip_grads_with_norm_(trained, longest, norm)
    return norm


def state_per_parameter(config: AnyOptimizerConfig) -> int:
    """Return the numbers that the optimizer keeps for each parameter, found by a step on one."""
    layer = nn.Linear(2, 2, bias=False)
    optimizer = build_optimizer(layer, config)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    kept = optimizer.state[layer.weight].values()
    sizes = [t.numel() for t in kept if isinstance(t, Tensor)]
    return sum(size for size in sizes if size > 1) // layer.weight.numel()
