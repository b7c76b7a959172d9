"""The authors' ResNet (google-research/simclr `resnet.py`), and one adaptor for torchvision's.

Differences from torchvision: the first block of *every* group has a projection shortcut (so
ResNet-18/34 have one that torchvision lacks), the last BN gamma of each block starts at zero, and
weights start from a truncated normal of variance 1/fan_in. Stride sits on the 3x3 (v1.5). With
selective kernels (SimCLRv2, arXiv:2006.10029; Li et al. 2019, arXiv:1903.06586) come ResNet-D's
stem and shortcuts (arXiv:1812.01187).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simclr_ray.config.sections.model import ResNetConfig
from simclr_ray.errors import CheckpointError
from simclr_ray.nn.batchnorm import GlobalBatchNorm, frozen_statistics
from simclr_ray.nn.encoders import Architecture, EncoderFamily, Statistics
from simclr_ray.nn.encoders import Norm as GlobalNorm

BLOCKS = {
    10: (1, 1, 1, 1),  # not in the paper; for CPUs
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
BASIC_DEPTHS = (10, 18, 34)
RESNET50_PARAMETERS: Final = 27_968_704  # of depth 50 and a head of two layers to 128: the paper's
VECTOR: Final = 8  # float32 in 256 bits
# The standard deviation of a unit normal truncated at ±2, which TensorFlow divides out.
TRUNCATED_STD = 0.87962566103423978

NormLayer = Callable[[int], nn.Module]


class ResNet(nn.Module):
    """ResNet of `depth`, every channel count times `width`: [N, C, H, W] in [0, 1] -> h [N, F].

    Args:
        depth: 10, 18, 34, 50, 101, 152 or 200; F is 512·width (basic) or 2048·width.
        width: Channel multiplier, stem included.
        stem: `imagenet` 7x7/2 and 3x3/2 max pool; `imagenet_same` the same with the authors' pool,
            padded after the image alone; `cifar` 3x3; `strided` 3x3/2.
        norm: Makes the batch norm (or another norm with `weight`) of a channel count.
        selective_kernel: Ratio of SimCLRv2's selective kernels, 0.0625 there; 0: none.
        inputs: C, channels of the images.

    Attributes:
        recompute: Keep only what passes between blocks, and make the rest again in the backward
            pass (activation checkpointing): the same gradient for less memory and a third more
            work.
    """

    def __init__(
        self,
        depth: int = 50,
        width: float = 1.0,
        stem: Literal["imagenet", "imagenet_same", "cifar", "strided"] = "imagenet",
        norm: NormLayer = GlobalBatchNorm,
        *,
        selective_kernel: float = 0.0,
        inputs: int = 3,
    ) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {sorted(BLOCKS)}, got {depth}")
        if selective_kernel and depth in BASIC_DEPTHS:
            raise ValueError(f"selective kernels need a bottleneck, depth 50 or more, not {depth}")
        block: Callable[[int, int, int, bool], _Block]
        if depth in BASIC_DEPTHS:
            expansion, block = 1, partial(BasicBlock, norm=norm)
        else:
            expansion = Bottleneck.expansion
            block = partial(Bottleneck, norm=norm, selective_kernel=selective_kernel)
        channels = round(64 * width)
        self.stem = _stem(stem, inputs, channels, norm, deep=selective_kernel > 0)
        self.pool = _pool(stem)
        groups = []
        for index, repeats in enumerate(BLOCKS[depth]):
            filters = round(64 * width) * 2**index
            for repeat in range(repeats):
                first = repeat == 0
                groups.append(block(channels, filters, 2 if first and index else 1, first))
                channels = filters * expansion
        self.blocks = nn.Sequential(*groups)
        self.feature_dim = channels
        self.recompute = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                _init_conv(module)

    def forward(self, images: Tensor) -> Tensor:
        """Return h, the global average of the last group: [N, F]."""
        x = self.pool(F.relu(self.stem(images), inplace=True))
        if self.recompute and torch.is_grad_enabled():
            for block in self.blocks:
                twice = partial(_contexts, block)
                x = checkpoint(block, x, use_reentrant=False, context_fn=twice)
        else:
            x = self.blocks(x)
        features: Tensor = x.mean((2, 3))
        return features


def _contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a block's first pass, and of its second: one moves statistics."""
    return nullcontext(), frozen_statistics(block)


class ConvNorm(nn.Sequential):
    """Convolution without bias, padded by (kernel − 1)/2 on each side, then batch norm."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, norm: NormLayer
    ) -> None:
        few = kernel == 1 and stride > 1 and inputs < VECTOR
        made = _CutConv if few else nn.Conv2d
        conv = made(inputs, outputs, kernel, stride, (kernel - 1) // 2, bias=False)
        super().__init__(conv, norm(outputs))


class _CutConv(nn.Conv2d):
    """A strided 1x1 convolution over the pixels that it takes, which are cut out before.

    Of fewer channels than a vector has numbers, channels last and without AVX-512, the gradient of
    torch's own writes past its memory (oneDNN issue 6035): a crash, wrong weights, or no end.
    """

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.stride
        return F.conv2d(x[:, :, ::rows, ::columns], self.weight)


def _stem(kind: str, inputs: int, channels: int, norm: NormLayer, *, deep: bool) -> nn.Sequential:
    """Return the layers before the first block, without their last ReLU and the pool.

    Args:
        kind: `imagenet`, `imagenet_same`, `cifar` or `strided`.
        inputs: Channels of the images.
        channels: 64·width.
        norm: Makes a norm.
        deep: ResNet-D's three 3x3 in place of the 7x7.
    """
    if deep and kind in ("imagenet", "imagenet_same"):
        half = channels // 2
        first, second = ConvNorm(inputs, half, 3, 2, norm), ConvNorm(half, half, 3, 1, norm)
        last = ConvNorm(half, channels, 3, 1, norm)
        return nn.Sequential(*first, nn.ReLU(inplace=True), *second, nn.ReLU(inplace=True), *last)
    kernel, stride = {"cifar": (3, 1), "strided": (3, 2)}.get(kind, (7, 2))
    return ConvNorm(inputs, channels, kernel, stride, norm)


def _pool(kind: str) -> nn.Module:
    """Return the layer between the stem and the first block."""
    if kind == "imagenet":
        return nn.MaxPool2d(3, 2, 1)
    return SameMaxPool() if kind == "imagenet_same" else nn.Identity()


class SameMaxPool(nn.Module):
    """Max pool 3x3/2 as TensorFlow pads it ('SAME'): of an even side the last row alone."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, C, ceil(H / 2), ceil(W / 2)]."""
        # an even side lacks one row, which comes after it; an odd one two, one on each side
        top, left = (size % 2 for size in x.shape[-2:])
        x = F.pad(x, (left, 1, top, 1), value=-math.inf)
        return F.max_pool2d(x, 3, 2)


class SelectiveKernel(nn.Module):
    """Two 3x3 streams, mixed per channel by weights that depend on the image (SK, both 3x3)."""

    LEAST_WIDTH = 32  # the authors' min_dim

    def __init__(
        self, inputs: int, filters: int, stride: int, ratio: float, norm: NormLayer
    ) -> None:
        super().__init__()
        middle = max(int(filters * ratio), self.LEAST_WIDTH)
        self.streams = ConvNorm(inputs, 2 * filters, 3, stride, norm)
        self.squeeze = ConvNorm(filters, middle, 1, 1, norm)
        self.mix = nn.Conv2d(middle, 2 * filters, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, filters, H, W], not below 0."""
        both: Tensor = F.relu(self.streams(x), inplace=True)
        streams = torch.unflatten(both, 1, (2, -1))  # [N, 2, C, H, W]
        seen = streams.sum(1).mean((2, 3), keepdim=True)
        mixing = torch.unflatten(self.mix(F.relu(self.squeeze(seen), inplace=True)), 1, (2, -1))
        mixed: Tensor = (streams * mixing.softmax(1)).sum(1)
        return mixed


class _Averaged(nn.Module):
    """The 2x2 mean before ResNet-D's shortcut; at an edge the mean of what is there."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, C, ⌈H/stride⌉, ⌈W/stride⌉]."""
        if self.stride == 1:  # TensorFlow's "SAME": a row and a column more at the end
            return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2, 1)
        return F.avg_pool2d(x, 2, self.stride, ceil_mode=True, count_include_pad=False)


class _Block(nn.Module):
    """What both blocks share: shortcut, residual branch with zero-initialised last gamma, ReLU."""

    def __init__(self, shortcut: nn.Module, branch: list[nn.Module], last: nn.Module) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.branch = nn.ModuleList([*branch, last])
        last = last.get_submodule("1")
        assert isinstance(last.weight, Tensor)
        nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(shortcut(x) + branch(x))."""
        out = x
        for index, layer in enumerate(self.branch):
            out = layer(out if index == 0 else F.relu(out, inplace=True))
        return F.relu(out + self.shortcut(x), inplace=True)


class BasicBlock(_Block):
    """3x3, 3x3."""

    def __init__(
        self,
        inputs: int,
        filters: int,
        stride: int,
        project: bool,  # noqa: FBT001
        norm: NormLayer,
    ) -> None:
        shortcut = ConvNorm(inputs, filters, 1, stride, norm) if project else nn.Identity()
        first = ConvNorm(inputs, filters, 3, stride, norm)
        super().__init__(shortcut, [first], ConvNorm(filters, filters, 3, 1, norm))


class Bottleneck(_Block):
    """1x1, 3x3 with the stride, 1x1 to four times the filters."""

    expansion = 4

    def __init__(
        self,
        inputs: int,
        filters: int,
        stride: int,
        project: bool,  # noqa: FBT001
        norm: NormLayer,
        selective_kernel: float = 0.0,
    ) -> None:
        outputs = filters * self.expansion
        shortcut: nn.Module = nn.Identity()
        middle: nn.Module
        if selective_kernel:
            middle = SelectiveKernel(filters, filters, stride, selective_kernel, norm)
            if project:
                shortcut = nn.Sequential(_Averaged(stride), *ConvNorm(inputs, outputs, 1, 1, norm))
        else:
            middle = ConvNorm(filters, filters, 3, stride, norm)
            if project:
                shortcut = ConvNorm(inputs, outputs, 1, stride, norm)
        first, last = ConvNorm(inputs, filters, 1, 1, norm), ConvNorm(filters, outputs, 1, 1, norm)
        super().__init__(shortcut, [first, middle], last)


def _init_conv(conv: nn.Conv2d) -> None:
    fan_in = conv.weight[0].numel()
    std = math.sqrt(1.0 / fan_in) / TRUNCATED_STD
    with torch.no_grad():
        nn.init.trunc_normal_(conv.weight, std=std, a=-2 * std, b=2 * std)


class ResNetFamily(EncoderFamily[ResNetConfig]):
    """The authors' ResNets."""

    def build(self, norm: GlobalNorm, size: int, channels: int) -> ResNet:  # noqa: ARG002 - takes any size
        """Return the network."""
        return ResNet(**self.config.arguments(), norm=norm, inputs=channels)

    def file_names(self, encoder: nn.Module) -> dict[str, str]:
        """Return torchvision's names of our tensors.

        Raises:
            CheckpointError: torchvision has no such ResNet.
        """
        config = self.config
        stems = ("imagenet", "cifar")
        if config.depth < 50 or config.stem not in stems or config.selective_kernel:
            raise CheckpointError(
                "torchvision has no such ResNet: depth 50 or more, stem imagenet or cifar, no "
                f"selective kernels; for its others take {self._torchvisions}"
            )
        layers = {"stem.0": "conv1", "stem.1": "bn1"}
        block = 0
        for group, repeats in enumerate(BLOCKS[config.depth], 1):
            for repeat in range(repeats):
                theirs, own = f"layer{group}.{repeat}", f"blocks.{block}"
                for place in range(3):
                    layers[f"{own}.branch.{place}.0"] = f"{theirs}.conv{place + 1}"
                    layers[f"{own}.branch.{place}.1"] = f"{theirs}.bn{place + 1}"
                layers |= {f"{own}.shortcut.{i}": f"{theirs}.downsample.{i}" for i in (0, 1)}
                block += 1
        parts = (name.rpartition(".") for name in encoder.state_dict())
        return {f"{layer}.{kind}": f"{layers[layer]}.{kind}" for layer, _, kind in parts}

    def in_torchvision(self, size: int) -> Architecture | str:  # noqa: ARG002 - takes any
        """Return torchvision's ResNet; it has no projection in the first group of 18 and 34."""
        config = self.config
        stems = ("imagenet", "cifar")
        if config.depth in (50, 101, 152) and self._is_plain and config.stem in stems:
            return Architecture(f"resnet{config.depth}", {}, config.stem)
        if config.depth in (18, 34) and self._is_plain and config.stem in stems:
            return (
                f"torchvision's ResNet-{config.depth} has no projection in its first group, and "
                f"this one has: {self._torchvisions} trains theirs"
            )
        return (
            "torchvision has the ResNets of depth 50, 101 and 152 at width 1, with stem imagenet "
            "or cifar and without selective kernels"
        )

    def in_timm(self, size: int) -> Architecture | str:  # noqa: ARG002 - takes any
        """Return timm's ResNet, of which the same holds."""
        config = self.config
        if config.depth >= 50 and self._is_plain and config.stem == "imagenet":
            return Architecture(f"resnet{config.depth}", {})
        return (
            "timm has the ResNets of depth 50 and more at width 1, with stem imagenet and "
            "without selective kernels"
        )

    def input_statistics(self) -> Statistics | None:
        """Return ImageNet's; recipes for small images differ in them."""
        return super().input_statistics() if self.config.stem != "cifar" else None

    @property
    def _torchvisions(self) -> str:
        """Return the config of torchvision's ResNet of this depth and stem."""
        depth = min(max(18, self.config.depth), 152)  # the nearest that it has
        small = " encoder.stem=cifar" if self.config.stem == "cifar" else ""
        return f"encoder.name=torchvision encoder.model=resnet{depth}{small}"

    @property
    def _is_plain(self) -> bool:
        return self.config.width == 1 and not self.config.selective_kernel

    def file_children(self, encoder: nn.Module) -> list[str]:  # noqa: ARG002 - torchvision's
        """Return torchvision's layers."""
        return ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
