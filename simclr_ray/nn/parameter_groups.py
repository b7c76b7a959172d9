"""Which parameters are decayed and which are adapted: layers say it, optimizers read it.

The authors' exclusions: batch norm and biases are neither decayed nor, under LARS, adapted. A layer
that differs has an `update_rule`, as of `batchnorm` and `heads`.
"""

from __future__ import annotations

from collections.abc import Collection
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
# Of transformers and ConvNeXt, which recipes exempt as they do biases: tokens, positions, scales.
EXEMPT: Final = frozenset(
    {
        *("cls_token", "class_token", "dist_token", "reg_token", "mask_token"),
        *("pos_embed", "pos_embedding", "relative_position_bias_table"),
        *("gamma", "gamma_1", "gamma_2", "layer_scale", "logit_scale"),
    }
)


def exempt_parameters(encoder: nn.Module, names: Collection[str] = ()) -> None:
    """Have what is no matrix or kernel of an encoder updated as biases are; in place.

    Those are vectors, tokens, position embeddings and tables, and layer scales.

    Args:
        encoder: Of layers without an `update_rule`.
        names: Further dotted names, such as timm's `no_weight_decay()`.
    """
    for place, module in encoder.named_modules():
        exempt = {
            name
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.ndim <= 1 or name in EXEMPT or f"{place}.{name}".lstrip(".") in names
        }
        if exempt:
            module.exempt = frozenset(exempt)


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
    if (
        name == "bias"
        or name in getattr(module, "exempt", ())
        or isinstance(module, nn.LayerNorm | nn.GroupNorm)
    ):
        return PLAIN
    rule = getattr(module, "update_rule", USUAL)
    assert isinstance(rule, UpdateRule)
    return rule
