"""torchvision's classifiers as encoders: without the last layer, batch norm made global."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final

from torch import Tensor, nn

from simclr_ray import config as cfg
from simclr_ray.config.sections.model import TorchvisionConfig
from simclr_ray.errors import ConfigError, one_line
from simclr_ray.nn.encoders import (
    RGB,
    Architecture,
    EncoderFamily,
    Norm,
    freeze_patch_embedding,
    globalize,
    take_channels,
)
from simclr_ray.nn.parameter_groups import exempt_parameters

SAME_IN_TIMM: Final = (  # layer for layer, and by the same names
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip
RESERVED: Final = frozenset({"weights", "image_size", "num_classes", "aux_logits", "init_weights"})


class TorchvisionFamily(EncoderFamily[TorchvisionConfig]):
    """Any of torchvision's that ends in a linear layer."""

    def build(self, norm: Norm, size: int, channels: int) -> nn.Module:
        """Return the backbone.

        Raises:
            ConfigError: torchvision has no such model, it takes no images of that size, or it has
                no final linear layer.
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

    def in_torchvision(self, size: int) -> Architecture:
        """Return the model itself."""
        options = dict(self.config.options)
        if self.config.has_fixed_size:
            options["image_size"] = size
        if self.config.model in ("googlenet", "inception_v3"):
            options |= {"aux_logits": False, "init_weights": False}
        return Architecture(self.config.model, options)

    def in_timm(self, size: int) -> Architecture | str:  # noqa: ARG002 - take any
        """Return timm's model of the same name, where it has the same layers."""
        if self.config.model in SAME_IN_TIMM and not self.config.options:
            return Architecture(self.config.model, {})
        return f"of torchvision's models timm has {', '.join(SAME_IN_TIMM)} alike"

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
