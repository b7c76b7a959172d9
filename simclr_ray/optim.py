"""LARS by the authors' rule, and the learning rate of a step.

LARS (You et al. 2017) as in google-research/simclr `lars_optimizer.py`, `classic_momentum=True`.
The ports of other libraries keep the rate *outside* the momentum buffer; the two differ whenever
the rate moves, that is during warm-up and cosine. Both forms are here, by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling.

    For each tensor w with gradient g, in groups with `adapt=True` (`authors` form):

        g' = g + wd·w;  r = trust·‖w‖/‖g'‖ (1 where either norm is 0);
        v = momentum·v + (lr·r)·g';  w = w − v

    With `adapt=False`, r = 1. `outside` is the form of lightly and solo-learn:
    r = trust·‖w‖/(‖g‖ + wd·‖w‖ + 1e-8), v = momentum·v + r·(g + wd·w), w = w − lr·v; and
    `clip_lr` replaces r by min(r/lr, 1), as solo-learn does. No host synchronisation.

    Args:
        params: Parameters or groups; a group may set `adapt` and every option below.
        lr: Learning rate.
        momentum: μ.
        weight_decay: Added to the gradient before the norms are taken.
        trust_coefficient: The authors' eeta.
        momentum_form: `authors` (rate inside the buffer) or `outside`.
        clip_lr: Use min(r/lr, 1) for r.
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
            "adapt": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters in place; return what `closure` returns, if given."""
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
        buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
        decayed = list(torch._foreach_add(raw, params, alpha=group["weight_decay"]))
        if group["adapt"]:
            ratios = self._ratios(params, raw, decayed, group)
            torch._foreach_mul_(decayed, ratios)
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, decayed, alpha=lr if inside else 1.0)
        torch._foreach_add_(params, buffers, alpha=-1.0 if inside else -lr)

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


def learning_rate_at(step: int, peak: float, warmup: int, total: int) -> float:
    """Return the rate of step 0 ≤ `step` < `total`: linear from 0, then cosine to 0.

    lr(t) = peak·t/w for t < w, then peak·½(1 + cos(π(t − w)/(T − w))) (authors' `model.py`).
    """
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
