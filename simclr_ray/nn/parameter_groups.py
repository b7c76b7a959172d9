"""Which parameters are decayed and which are adapted: layers say it, optimizers read it.

The authors' exclusions: batch norm and biases are neither decayed nor, under LARS, adapted. A layer
that differs has an `update_rule`, as of `batchnorm` and `heads`.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from torch import nn


class UpdateRule(NamedTuple):
    """How a layer's own parameters are updated; biases are `PLAIN` whatever it says."""

    decay: bool  # weight decay
    adapt: bool  # the local rate of LARS


USUAL: Final = UpdateRule(decay=True, adapt=True)
PLAIN: Final = UpdateRule(decay=False, adapt=False)
SCORES: Final = UpdateRule(decay=True, adapt=False)
SCALE: Final = UpdateRule(decay=False, adapt=True)
# Checkpoints number parameters in this order. The first two are groups of every optimizer.
ORDER: Final = (USUAL, PLAIN, SCORES, SCALE)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trained parameters in groups with `weight_decay` and `adapt`, by `ORDER`."""
    rules = {
        id(parameter): rule_of(module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = []
    for rule in ORDER:
        params = [p for p in trained if rules[id(p)] == rule]
        if params or rule in (USUAL, PLAIN):
            decay = weight_decay if rule.decay else 0.0
            groups.append({"params": params, "weight_decay": decay, "adapt": rule.adapt})
    return groups


def rule_of(module: nn.Module, name: str) -> UpdateRule:
    """Return how the parameter `name` of a layer is updated."""
    if name == "bias" or isinstance(module, nn.LayerNorm | nn.GroupNorm):
        return PLAIN
    rule = getattr(module, "update_rule", USUAL)
    assert isinstance(rule, UpdateRule)
    return rule
