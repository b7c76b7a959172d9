"""Weights that the authors released, by TensorFlow's names of them: an `.npz` of a checkpoint.

    names = [name for name, _ in tf.train.list_variables(path)]
    np.savez("r50_1x.npz", **{name: tf.train.load_variable(path, name) for name in names})

Layers are numbered in the order in which the authors' code makes them (google-research/simclr
`resnet.py`), which is that of ours: the stem, and of each block its shortcut first. Their images
are in [0, 1], so nothing is folded in. Their stem for ImageNet is `imagenet_same`; `imagenet` is
refused, since it pads the max pool otherwise and other features come out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor, nn

from simclr_ray.errors import CheckpointError
from simclr_ray.nn.batchnorm import GlobalBatchNorm
from simclr_ray.nn.resnet import ResNet

_NAME: Final = re.compile(
    r"base_model/(?P<kind>conv2d|batch_normalization)(?:_(?P<number>\d+))?/(?P<part>\w+)(?::0)?"
)
KERNEL_DIMS: Final = 4
_PARTS: Final = {
    "kernel": "weight", "gamma": "weight", "beta": "bias",
    "moving_mean": "running_mean", "moving_variance": "running_var",
}  # fmt: skip


def is_authors(tree: Mapping[Any, Any]) -> bool:
    """Return whether a file holds variables of the authors' network."""
    return any(isinstance(name, str) and _NAME.fullmatch(name) for name in tree)


def by_own_names(encoder: nn.Module, tree: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the authors' variables by the names of an encoder; others keep theirs.

    Args:
        encoder: A `ResNet`.
        tree: Arrays as tensors by TensorFlow's names; kernels are [H, W, inputs, outputs].

    Raises:
        CheckpointError: The encoder is another network, or has fewer layers.
    """
    if not isinstance(encoder, ResNet):
        raise CheckpointError("holds the authors' ResNet; take encoder.name=resnet")
    if isinstance(encoder.pool, nn.MaxPool2d):
        raise CheckpointError("the authors pad the max pool otherwise; encoder.stem=imagenet_same")
    layers = {
        "conv2d": [n for n, m in encoder.named_modules() if isinstance(m, nn.Conv2d)],
        "batch_normalization": [
            n for n, m in encoder.named_modules() if isinstance(m, GlobalBatchNorm)
        ],
    }
    out = {}
    for name, tensor in tree.items():
        match = _NAME.fullmatch(str(name))  # of a pickle it may be a number
        is_of_encoder = match is not None and match["part"] in _PARTS and isinstance(tensor, Tensor)
        if match is None or not is_of_encoder:  # the head, or the optimizer's
            out[name] = tensor
            continue
        number, own = int(match["number"] or 0), layers[match["kind"]]
        if number >= len(own):
            raise CheckpointError(
                f"holds {match['kind']}_{number}, and the encoder has {len(own)} such layers"
            )
        part = _PARTS[match["part"]]
        if match["part"] == "kernel" and tensor.ndim != KERNEL_DIMS:
            raise CheckpointError(f"holds {name} of shape {list(tensor.shape)}, which is no kernel")
        out[f"{own[number]}.{part}"] = (
            tensor.permute(3, 2, 0, 1).contiguous() if match["part"] == "kernel" else tensor
        )
    return out
