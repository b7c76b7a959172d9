"""Names of other libraries' weights, and what they are called in timm and torchvision.

Names may stand below any prefix, and those that no rule knows stay. Hugging Face's come in two
forms: that of files, and since transformers 5 that of models in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

StateDict = dict[str, Tensor]
Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

_PARTS: Final = r"(?P<part>weight|bias)$"
_QKV: Final = {"query": "q", "key": "k", "value": "v", "q_proj": "q", "k_proj": "k", "v_proj": "v"}


def _attention(match: re.Match[str]) -> str:
    return f"attn.{_QKV[match['which']]}.{match['part']}"


_ATTENTION: Final[Rules] = (
    (
        r"attention\.(?:attention\.|self\.)?(?P<which>query|key|value|q_proj|k_proj|v_proj)\."
        + _PARTS,
        _attention,
    ),
    (r"attention\.(?:output\.dense|o_proj)\.", "attn.proj."),
    (r"layernorm_before\.", "norm1."),
    (r"layernorm_after\.", "norm2."),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"(?<!attention\.)output\.dense\.", "mlp.fc2."),
    (r"(^|\.)layernorm\.(weight|bias)$", r"\1norm.\2"),
)
_VIT: Final[Rules] = (
    (r"embeddings\.cls_token$", "cls_token"),
    (r"embeddings\.position_embeddings$", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
    *_ATTENTION,
)
_SWIN: Final[Rules] = (
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"embeddings\.norm\.", "patch_embed.norm."),
    (
        r"encoder\.layers\.(\d+)\.downsample\.",
        lambda match: f"layers.{int(match[1]) + 1}.downsample.",
    ),
    (r"encoder\.layers\.(\d+)\.", r"layers.\1."),
    (
        r"attention\.(?:self\.|relative_position_bias\.)relative_position_bias_table",
        "attn.relative_position_bias_table",
    ),
    *_ATTENTION,
)
_CONVNEXT: Final[Rules] = (
    (r"embeddings\.patch_embeddings\.", "stem.0."),
    (r"embeddings\.layernorm\.", "stem.1."),
    (r"encoder\.stages\.(\d+)\.downsampling_layer\.", r"stages.\1.downsample."),
    (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"dwconv\.", "conv_dw."),
    (r"pwconv1\.", "mlp.fc1."),
    (r"pwconv2\.", "mlp.fc2."),
    (r"layer_scale_parameter$", "gamma"),
    (r"(blocks\.\d+)\.layernorm\.", r"\1.norm."),
    (r"(^|\.)layernorm\.", r"\1head.norm."),
)


def _resnet_block(match: re.Match[str]) -> str:
    kind = {"convolution": "conv", "normalization": "bn"}[match["kind"]]
    return f"{kind}{int(match['place']) + 1}."


_RESNET: Final[Rules] = (
    (r"embedder\.embedder\.convolution\.", "conv1."),
    (r"embedder\.embedder\.normalization\.", "bn1."),
    (
        r"encoder\.stages\.(\d+)\.layers\.(\d+)\.",
        lambda match: f"layer{int(match[1]) + 1}.{match[2]}.",
    ),
    (r"shortcut\.convolution\.", "downsample.0."),
    (r"shortcut\.normalization\.", "downsample.1."),
    (r"layer\.(?P<place>\d)\.(?P<kind>convolution|normalization)\.", _resnet_block),
)
_VIT_IN_TORCHVISION: Final[Rules] = (
    (r"cls_token$", "class_token"),
    (r"pos_embed$", "encoder.pos_embedding"),
    (r"patch_embed\.proj\.", "conv_proj."),
    (r"blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"attn\.qkv\.", "self_attention.in_proj_"),
    (r"attn\.proj\.", "self_attention.out_proj."),
    (r"norm([12])\.", r"ln_\1."),
    (r"mlp\.fc1\.", "mlp.0."),
    (r"mlp\.fc2\.", "mlp.3."),
    (r"(^|\.)norm\.(weight|bias)$", r"\1encoder.ln.\2"),
)
_SWIN_IN_TORCHVISION: Final[Rules] = (
    (r"patch_embed\.proj\.", "features.0.0."),
    (r"patch_embed\.norm\.", "features.0.2."),
    (r"layers\.(\d+)\.blocks\.", lambda match: f"features.{2 * int(match[1]) + 1}."),
    (r"layers\.(\d+)\.downsample\.", lambda match: f"features.{2 * int(match[1])}."),
    (r"mlp\.fc1\.", "mlp.0."),
    (r"mlp\.fc2\.", "mlp.3."),
)
_CONVNEXT_PARTS: Final = {"conv_dw": "block.0", "norm": "block.2", "mlp.fc1": "block.3"} | {
    "mlp.fc2": "block.5"
}
_CONVNEXT_IN_TORCHVISION: Final[Rules] = (
    (r"stem\.", "features.0."),
    (
        r"stages\.(\d+)\.blocks\.(\d+)\.(conv_dw|norm|mlp\.fc1|mlp\.fc2)\.",
        lambda match: f"features.{2 * int(match[1]) + 1}.{match[2]}.{_CONVNEXT_PARTS[match[3]]}.",
    ),
    (
        r"stages\.(\d+)\.blocks\.(\d+)\.gamma$",
        lambda match: f"features.{2 * int(match[1]) + 1}.{match[2]}.layer_scale",
    ),
    (r"stages\.(\d+)\.downsample\.", lambda match: f"features.{2 * int(match[1])}."),
    (r"head\.norm\.", "classifier.0."),
)
_LIGHTLY: Final[Rules] = ((r"((?:^|\.)(?:layer)?\d+\.\d+\.)shortcut\.", r"\1downsample."),)

HUGGING_FACE: Final[dict[str, Rules]] = {
    "Hugging Face ViT": _VIT,
    "Hugging Face Swin": _SWIN,
    "Hugging Face ConvNeXt": _CONVNEXT,
    "Hugging Face ResNet": _RESNET,
}
IN_TORCHVISION: Final[tuple[Rules, ...]] = (
    _VIT_IN_TORCHVISION,
    _SWIN_IN_TORCHVISION,
    _CONVNEXT_IN_TORCHVISION,
)


def readings(tensors: StateDict) -> list[tuple[str, StateDict]]:
    """Return a state dict by its own names and by each that they may stand for, and whose they are.

    Names of Hugging Face become timm's, and those of timm become torchvision's as well.
    """
    forms = [("", tensors), ("lightly", renamed(tensors, _LIGHTLY))]
    forms += [(kind, _joined(renamed(tensors, rules))) for kind, rules in HUGGING_FACE.items()]
    forms += [
        (kind or "timm", renamed(form, rules))
        for kind, form in tuple(forms)
        for rules in IN_TORCHVISION
    ]
    seen: dict[frozenset[str], tuple[str, StateDict]] = {}
    for kind, form in forms:
        seen.setdefault(frozenset(form), (kind, form))
    return list(seen.values())


def renamed(tensors: StateDict, rules: Rules) -> StateDict:
    """Return a state dict with all rules applied to each name, one after the other."""
    out: StateDict = {}
    for name, tensor in tensors.items():
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        out[new] = tensor
    return out


def _joined(tensors: StateDict) -> StateDict:
    """Return a state dict with queries, keys and values of attention in one tensor, as timm's."""
    out: StateDict = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*attn\.)([qkv])\.(weight|bias)", name)
        if match is None:
            out[name] = tensor
            continue
        before, which, part = match.groups()
        others = [tensors.get(f"{before}{letter}.{part}") for letter in "qkv"]
        if which == "q" and all(other is not None for other in others):
            out[f"{before}qkv.{part}"] = torch.cat([t for t in others if t is not None])
    return out
