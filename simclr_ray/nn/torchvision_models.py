"""torchvision's classifiers as encoders: without the last layer, batch norm made global."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final, NamedTuple

from torch import Tensor, nn

from simclr_ray import config as cfg
from simclr_ray.config.sections.model import TorchvisionConfig
from simclr_ray.errors import ConfigError, one_line
from simclr_ray.nn.encoders import (
    IMAGENET,
    RGB,
    Architecture,
    EncoderFamily,
    Norm,
    Statistics,
    freeze_patch_embedding,
    globalize,
    take_channels,
)
from simclr_ray.nn.parameter_groups import exempt_parameters

SAME_IN_TIMM: Final = (  # layer for layer, and by the same names
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip
NO_SMALL_STEM: Final = "timm builds no ResNet with a 3x3 stem and without max pool"
RESERVED: Final = frozenset({"weights", "image_size", "num_classes", "aux_logits", "init_weights"})


class SmallStem(NamedTuple):
    """A stem for small images: one convolution of 3x3, and no max pool."""

    padding: int = 1
    relu: bool = True


SMALL_STEMS: Final = {
    "cifar": SmallStem(),
    # whose benchmark makes a Sequential of a ResNet's layers, so that a function is lost
    "cifar_lightly": SmallStem(relu=False),
    "cifar_solo_learn": SmallStem(padding=2),
}


def stem_layers(stem: str) -> dict[str, nn.Module]:
    """Return what stands in the place of a ResNet's own layers, by their names there."""
    if stem == IMAGENET:
        return {}
    padding, relu = SMALL_STEMS[stem]
    convolution = nn.Conv2d(RGB, 64, 3, 1, padding, bias=False)
    layers: dict[str, nn.Module] = {"conv1": convolution, "maxpool": nn.Identity()}
    return layers if relu else layers | {"relu": nn.Identity()}


class TorchvisionFamily(EncoderFamily[TorchvisionConfig]):
    """Any of torchvision's that ends in a linear layer."""

    def build(self, norm: Norm, size: int, channels: int) -> nn.Module:
        """Return the backbone.

        Raises:
            ConfigError: torchvision has no such model, it takes no images of that size, or it has
                no final linear layer.
        """
        name = self.config.model
        backbone = self._created(size)
        linears = [(n, m) for n, m in backbone.named_modules() if isinstance(m, nn.Linear)]
        if not linears or list(backbone.named_modules())[-1][0] != linears[-1][0]:
            raise ConfigError.of("encoder.model", f"{name} does not end in a linear layer")
        where, classifier = linears[-1]
        parent, _, leaf = where.rpartition(".")
        setattr(backbone.get_submodule(parent), leaf, nn.Identity())
        if channels != RGB:
            take_channels(backbone, channels)
        globalize(backbone, norm)
        exempt_parameters(backbone)
        if self.config.freeze_patch_embedding:
            freeze_patch_embedding(backbone)
        backbone.feature_dim = classifier.in_features  # type: ignore[assignment] # plain attribute
        return backbone

    def _created(self, size: int) -> nn.Module:
        """Return torchvision's model, with its classifier and the stem of the config.

        Raises:
            ConfigError: There is none.
        """
        import torchvision  # seconds to import, in every worker; few runs need it

        name = self.config.model
        names = torchvision.models.list_models(module=torchvision.models)
        if name not in names:
            raise ConfigError.of(
                "encoder.model", f"torchvision has no {name!r}{cfg.nearest(name, names)}"
            )
        options: dict[str, object] = dict(self.config.options)
        if reserved := sorted(RESERVED & options.keys()):
            raise ConfigError.of(
                "encoder.options", f"options.{reserved[0]} is set here and cannot be given"
            )
        if self.config.has_fixed_size:
            options["image_size"] = size
        if name in ("googlenet", "inception_v3"):
            options |= {"aux_logits": False, "init_weights": True}
        try:
            backbone: nn.Module = torchvision.models.get_model(name, weights=None, **options)
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            cause = one_line(error)
            if self.config.options:
                problem = f"{name} of {size} px with {options}: {cause}"
                raise ConfigError.of("encoder.options", problem) from error
            problem = f"{name} takes no images of {size} px: {cause}"
            raise ConfigError.of("encoder.model", problem) from error
        layers = stem_layers(self.config.stem)
        if layers and not isinstance(backbone, torchvision.models.ResNet):
            problem = f"{self.config.stem} is a stem of ResNets; {name} has its own, stem=imagenet"
            raise ConfigError.of("encoder.stem", problem)
        for place, layer in layers.items():
            setattr(backbone, place, layer)
        return backbone

    def in_torchvision(self, size: int) -> Architecture:
        """Return the model itself."""
        options = dict(self.config.options)
        if self.config.has_fixed_size:
            options["image_size"] = size
        if self.config.model in ("googlenet", "inception_v3"):
            options |= {"aux_logits": False, "init_weights": False}
        return Architecture(self.config.model, options, self.config.stem)

    def in_timm(self, size: int) -> Architecture | str:  # noqa: ARG002 - take any
        """Return timm's model of the same name, where it has the same layers."""
        if self.config.stem != IMAGENET:
            return NO_SMALL_STEM
        if self.config.model in SAME_IN_TIMM and not self.config.options:
            return Architecture(self.config.model, {})
        return f"of torchvision's models timm has {', '.join(SAME_IN_TIMM)} alike"

    def input_statistics(self) -> Statistics | None:
        """Return ImageNet's; recipes for small images differ in them."""
        return super().input_statistics() if self.config.stem == IMAGENET else None

    def resized(self, encoder: nn.Module, name: str, tensor: Tensor, like: Tensor) -> Tensor | None:
        """Return position embeddings by torchvision's own rule, the class token left as it is."""
        if not name.endswith("pos_embedding") or tensor.ndim != 3:
            return super().resized(encoder, name, tensor, like)
        old, new = (math.isqrt(t.shape[1] - 1) for t in (tensor, like))  # sides, in patches
        if tensor.shape[2] != like.shape[2] or old**2 + 1 != tensor.shape[1]:
            return None
        from torchvision.models.vision_transformer import interpolate_embeddings

        key = "encoder.pos_embedding"
        resampled: Tensor = interpolate_embeddings(new, 1, OrderedDict({key: tensor}))[key]
        return resampled
