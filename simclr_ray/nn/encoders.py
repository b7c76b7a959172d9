"""What a family of encoders answers: how it is built, and how weights made elsewhere fit it.

A family is a class here or beside its network, named by its config class (`config.sections.model`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Final, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from simclr_ray.config.components import ComponentConfig, build
from simclr_ray.config.imports import ImportConfig
from simclr_ray.errors import ConfigError, one_line
from simclr_ray.nn.batchnorm import GlobalBatchNorm, GlobalBatchNormAct
from simclr_ray.nn.foreign_weights import DEVIATION, MEAN

Norm = Callable[..., GlobalBatchNorm]
RGB: Final = 3
IMAGENET: Final = "imagenet"  # the stem that every library's ResNet has
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation of each channel
SCALES: Final = ("gamma", "layer_scale")
ConfigT = TypeVar("ConfigT", bound=ComponentConfig)


class Architecture(NamedTuple):
    """A network that another library builds by a name.

    Attributes:
        model: The name.
        options: What its constructor is called with.
        stem: `imagenet`, as the library builds it, or one of `torchvision_models.SMALL_STEMS`.
    """

    model: str
    options: Mapping[str, Any]
    stem: str = IMAGENET


class EncoderFamily(ABC, Generic[ConfigT]):
    """Encoders of one kind.

    Args:
        config: Of one of them.
    """

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @abstractmethod
    def build(self, norm: Norm, size: int, channels: int) -> nn.Module:
        """Return the encoder, [N, C, S, S] in [0, 1] -> [N, F], with `feature_dim` = F.

        Weights are drawn from torch's global generator.

        Args:
            norm: Makes the global batch norm of a channel count, in place of any other.
            size: S, for encoders of one size.
            channels: C.

        Raises:
            ConfigError: There is no such encoder.
        """

    def file_names(self, encoder: nn.Module) -> dict[str, str]:
        """Return what a state dict in a file calls each tensor of the encoder.

        Raises:
            CheckpointError: No such weights can fit.
        """
        return {name: name for name in encoder.state_dict()}

    def file_children(self, encoder: nn.Module) -> list[str]:
        """Return the first parts of `file_names` in the order of layers, as a Sequential has it."""
        return [name for name, _ in encoder.named_children()]

    def resized(self, encoder: nn.Module, name: str, tensor: Tensor, like: Tensor) -> Tensor | None:
        """Return a file's tensor in the shape of `like`; None: that cannot be.

        Args:
            encoder: Whose tensor it is to be.
            name: Its name there.
            tensor: Of the file.
            like: What it is to replace.
        """
        del encoder
        if name.endswith(SCALES) and tensor.numel() == like.numel():
            return tensor.reshape(like.shape)  # [C] or [C, 1, 1]
        return None

    def in_torchvision(self, size: int) -> Architecture | str:  # noqa: ARG002 - of one size
        """Return torchvision's network with these layers for images of `size`, or why not."""
        return "torchvision has no such network"

    def in_timm(self, size: int) -> Architecture | str:  # noqa: ARG002 - as above
        """Return timm's network with these layers for images of `size`, or why not."""
        return "timm has no such network"

    def input_statistics(self) -> Statistics | None:
        """Return mean and deviation that its weights' images had taken off, if nobody says.

        They are folded into the first layer of weights from a file, since encoders here take images
        in [0, 1]. None: weights of such an encoder have no usual ones.
        """
        return MEAN, DEVIATION


def family_of(config: ComponentConfig) -> EncoderFamily[Any]:
    """Return the family of an encoder's config; imported code has one for all."""
    if isinstance(config, ImportConfig):
        return ImportedFamily(config)
    family: EncoderFamily[Any] = config.load()(config)
    return family


def feature_dim(encoder: nn.Module) -> int:
    """Return F of an encoder that was built here."""
    features = encoder.feature_dim
    assert isinstance(features, int)
    return features


def set_recompute(encoder: nn.Module, *, recompute: bool) -> None:
    """Have an encoder's blocks run again in the backward pass, or not.

    Raises:
        ConfigError: It is asked for and the encoder has no `recompute`, or it is timm's and cannot,
            or has batch norm, whose statistics would move again in the backward pass.
    """
    if hasattr(encoder, "recompute"):
        encoder.recompute = recompute  # type: ignore[assignment] # a plain attribute
    elif recompute and (switch := getattr(encoder, "set_grad_checkpointing", None)):
        if any(isinstance(m, GlobalBatchNorm) for m in encoder.modules()):
            raise ConfigError.of(
                "encoder", "scaling.recompute_activations is not for timm's models with batch norm"
            )
        try:
            switch()
        except AssertionError as error:  # timm's way to say that a model cannot
            problem = f"scaling.recompute_activations: {one_line(error)}"
            raise ConfigError.of("encoder", problem) from error
    elif recompute:
        raise ConfigError.of(
            "encoder", "has no attribute `recompute`, by which scaling.recompute_activations is set"
        )


def globalize(module: nn.Module, norm: Norm) -> None:
    """Replace each batch norm below `module` by the global one, in place; weights stay.

    Raises:
        ConfigError: One is of a class that computes something of its own.
    """
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, _globalized(child, norm))
        else:
            globalize(child, norm)


def _globalized(child: _BatchNorm, norm: Norm) -> GlobalBatchNorm:
    replaced = norm(child.num_features, child.eps)
    replaced.load_state_dict(child.state_dict(), strict=False)  # what it has of ours
    if type(child).__name__ == "BatchNormAct2d":  # timm's
        drop, act = child.get_submodule("drop"), child.get_submodule("act")
        replaced = GlobalBatchNormAct(replaced, drop, act)
    elif not isinstance(child, nn.SyncBatchNorm) and type(child).forward is not _BatchNorm.forward:
        raise ConfigError.of(
            "encoder",
            f"has a batch norm of class {type(child).__name__} with a forward of its own, for "
            "which there is no form over all workers",
        )
    if not child.affine:
        replaced.requires_grad_(requires_grad=False)
    return replaced


def take_channels(encoder: nn.Module, channels: int) -> None:
    """Put a first convolution of `channels` inputs in the place of one of three, in place.

    Its weights are drawn anew, so that what it gives varies as with three channels.

    Raises:
        ConfigError: The first convolution takes no RGB, or there is none.
    """
    where, first = first_convolution(encoder)
    if first.in_channels != RGB or first.groups != 1:
        raise ConfigError.of(
            "encoder", f"{where} takes {first.in_channels} channels: no place for {channels}"
        )
    wide = nn.Conv2d(
        channels,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type] # pairs, as they were given
        first.stride,  # type: ignore[arg-type] # as above
        first.padding,  # type: ignore[arg-type] # as above
        first.dilation,  # type: ignore[arg-type] # as above
        bias=first.bias is not None,
        padding_mode=first.padding_mode,
    )
    deviation = first.weight.detach().std() * math.sqrt(RGB / channels)
    with torch.no_grad():
        wide.weight.copy_(torch.randn_like(wide.weight) * deviation)
    wide.bias = first.bias
    parent, _, leaf = where.rpartition(".")
    setattr(encoder.get_submodule(parent), leaf, wide)


def first_convolution(encoder: nn.Module) -> tuple[str, nn.Conv2d]:
    """Return name and module of the convolution that images come to.

    Raises:
        ConfigError: There is none.
    """
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d):
            return name, module
    raise ConfigError.of("encoder", "has no convolution that images come to")


def freeze_patch_embedding(encoder: nn.Module) -> None:
    """Leave an encoder's patch-wise first layer as it is, in place (MoCo v3, arXiv:2104.02057).

    Raises:
        ConfigError: It has no convolution, or the patches of the first overlap.
    """
    _, first = first_convolution(encoder)
    if tuple(first.kernel_size) != tuple(first.stride):
        problem = "the encoder does not begin with patches that do not overlap"
        raise ConfigError.of("encoder.freeze_patch_embedding", problem)
    first.requires_grad_(requires_grad=False)


class ImportedFamily(EncoderFamily[ImportConfig]):
    """Encoders of a user's own: any module of the contract, whose batch norms become global."""

    def input_statistics(self) -> None:
        """Return none: its contract is images in [0, 1], that of a file is not said."""

    def build(self, norm: Norm, size: int, channels: int) -> nn.Module:
        """Return what the import path makes; F is found by two images of `size`."""
        encoder = build(self.config, nn.Module)
        globalize(encoder, norm)
        encoder.eval()
        images = torch.zeros(2, channels, size, size)
        shown = f"{self.config.path} gives"
        expected = f"expected features [2, F] of images [2, {channels}, {size}, {size}]"
        try:
            with torch.no_grad():
                h = encoder(images)
        except Exception as error:
            cause = one_line(error)
            raise ConfigError.of(
                "encoder", f"{shown} {type(error).__name__}: {cause}; {expected}"
            ) from error
        if not isinstance(h, Tensor) or h.ndim != 2 or len(h) != 2 or not h.is_floating_point():
            got = f"{h.dtype} {[*h.shape]}" if isinstance(h, Tensor) else type(h).__name__
            raise ConfigError.of("encoder", f"{shown} {got}; {expected}")
        encoder.feature_dim = h.shape[1]  # type: ignore[assignment] # a plain attribute
        return encoder.train()
