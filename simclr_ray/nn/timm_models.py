"""timm's backbones as encoders (extra `timm`): pooled features, batch norm made global."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor, nn

from simclr_ray import config as cfg
from simclr_ray.config.sections.model import TimmConfig
from simclr_ray.errors import ConfigError, one_line
from simclr_ray.nn.encoders import (
    RGB,
    Architecture,
    EncoderFamily,
    Norm,
    Statistics,
    freeze_patch_embedding,
    globalize,
)
from simclr_ray.nn.parameter_groups import exempt_parameters

EXTRA: Final = "simclr-ray[timm]"
# set here, or would load weights: those come by init.weights, with a hash
RESERVED: Final = frozenset(
    {
        *("num_classes", "in_chans", "features_only"),
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
    }
)


class TimmFamily(EncoderFamily[TimmConfig]):
    """Any of timm's that gives one vector an image."""

    def build(self, norm: Norm, size: int, channels: int) -> nn.Module:
        """Return the backbone up to its pooled features, before the classifier.

        Raises:
            ConfigError: timm is not installed, has no such model, or the model takes other options
                or other images.
        """
        timm = load_timm()
        name, options = self.config.model, dict(self.config.options)
        if "." in name or not timm.is_model(name):
            raise ConfigError.of("encoder.model", _no_model(name, timm.list_models()))
        if reserved := sorted(RESERVED & options.keys()):
            raise ConfigError.of(
                "encoder.options", f"options.{reserved[0]} is set here and cannot be given"
            )
        if channels != RGB:
            options["in_chans"] = channels
        settings = timm.models.get_pretrained_cfg(name)
        if settings is not None and settings.fixed_input_size and not _takes_any_size(options):
            options.setdefault("img_size", size)
        try:
            backbone: nn.Module = timm.create_model(
                name, pretrained=False, num_classes=0, **options
            )
        except Exception as error:  # timm's models raise what they find, of any kind
            cause = one_line(error)[:300]
            raise ConfigError.of(
                "encoder.options", f"timm's {name} with {options}: {cause}"
            ) from error
        globalize(backbone, norm)
        exempt_parameters(backbone, getattr(backbone, "no_weight_decay", set)())
        if self.config.freeze_patch_embedding:
            freeze_patch_embedding(backbone)
        backbone.feature_dim = self._feature_dim(backbone, size, channels)  # type: ignore[assignment] # plain attribute
        return backbone

    def _feature_dim(self, backbone: nn.Module, size: int, channels: int) -> int:
        """Return F, found by a pass over shapes alone."""
        named = (*backbone.named_parameters(), *backbone.named_buffers())
        shapes = {n: t.detach().to("meta") for n, t in named}
        images = torch.empty(2, channels, size, size, device="meta")
        training = backbone.training
        shown = f"timm's {self.config.model}"
        try:
            with torch.no_grad():
                h = torch.func.functional_call(backbone.eval(), shapes, images)
        except Exception as error:  # as above
            hint = ""
            if "dynamic_img_size" not in self.config.options:
                hint = "; options.dynamic_img_size=true lets timm's ViTs take any size"
            cause = one_line(error)[:300]
            raise ConfigError.of(
                "encoder.model", f"{shown} takes no images of {size} px: {cause}{hint}"
            ) from error
        finally:
            backbone.train(training)
        if not isinstance(h, Tensor) or h.ndim != 2:
            got = [*h.shape] if isinstance(h, Tensor) else type(h).__name__
            raise ConfigError.of(
                "encoder.model",
                f"{shown} gives {got} where one vector an image, [2, F], is needed",
            )
        return h.shape[1]

    def in_timm(self, size: int) -> Architecture:
        """Return the model itself."""
        options, settings = dict(self.config.options), None
        settings = load_timm().models.get_pretrained_cfg(self.config.model)
        if settings is not None and settings.fixed_input_size and not _takes_any_size(options):
            options.setdefault("img_size", size)
        return Architecture(self.config.model, options)

    def resized(self, encoder: nn.Module, name: str, tensor: Tensor, like: Tensor) -> Tensor | None:
        """Return position embeddings by timm's own rule; tokens before the grid stay."""
        if name != "pos_embed" or tensor.ndim != 3 or tensor.shape[2] != like.shape[2]:
            return super().resized(encoder, name, tensor, like)
        grid = getattr(getattr(encoder, "patch_embed", None), "grid_size", None)
        if grid is None:  # positions of another kind, as Hiera's
            return super().resized(encoder, name, tensor, like)
        rows, columns = grid
        tokens = like.shape[1] - rows * columns
        if math.isqrt(max(0, tensor.shape[1] - tokens)) ** 2 + tokens != tensor.shape[1]:
            return None
        resample = load_timm().layers.resample_abs_pos_embed
        new: Tensor = resample(tensor, [rows, columns], num_prefix_tokens=tokens)
        return new

    def input_statistics(self) -> Statistics | None:
        """Return the mean and deviation that timm names for its weights of the model."""
        settings = load_timm().models.get_pretrained_cfg(self.config.model)
        if settings is None or settings.mean is None:
            return super().input_statistics()
        return tuple(settings.mean), tuple(settings.std)


def load_timm() -> Any:
    """Return the module timm.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import timm  # seconds to import, in every worker; few runs need it
    except ImportError as error:
        problem = f"timm needs the extra: pip install '{EXTRA}' ({error})"
        raise ConfigError.of("encoder.name", problem) from error
    return timm


def _takes_any_size(options: dict[str, Any]) -> bool:
    return bool(options.get("dynamic_img_size"))


def _no_model(name: str, names: list[str]) -> str:
    """Return why there is no model of a name, and which is meant."""
    bare, _, tag = name.partition(".")
    if tag and bare in names:
        return (
            f"{name!r}: the tag .{tag} names weights, which are given by init.weights; say {bare!r}"
        )
    return f"timm has no {name!r}{cfg.nearest(name, names)}"
