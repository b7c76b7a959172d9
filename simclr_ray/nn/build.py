"""What is trained, and by what: encoder f, head g, loss and optimizer, built from config."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from simclr_ray import config as cfg
from simclr_ray.config.components import ComponentConfig, build
from simclr_ray.config.experiment import BatchNormConfig, Experiment
from simclr_ray.config.sections.model import ClassifierHeadConfig, EncoderSection
from simclr_ray.nn.batchnorm import GlobalBatchNorm
from simclr_ray.nn.encoders import family_of, feature_dim
from simclr_ray.nn.heads import LearnableTemperature
from simclr_ray.nn.losses import Loss
from simclr_ray.nn.stochastic import key_draws

__all__ = [
    "Projection",
    "SimCLRModel",
    "build_encoder",
    "build_loss",
    "build_model",
    "classifier_from_tree",
    "encoder_from_tree",
    "feature_dim",
]


class Projection(NamedTuple):
    """Both outputs of one forward pass."""

    h: Tensor  # [M, F]
    z: Tensor  # [M, D]


class SimCLRModel(nn.Module):
    """z = g(f(x)) (SimCLR §2.1)."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Projection:
        """Return h [M, F] and z [M, D] of images [M, C, S, S] in [0, 1]."""
        h = self.encoder(images)
        return Projection(h, self.head(h))


def build_model(experiment: Experiment) -> SimCLRModel:
    """Return the experiment's model, its weights a pure function of `experiment.seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        encoder = build_encoder(
            experiment.encoder,
            experiment.batch_norm,
            size=experiment.augment.size,
            channels=experiment.data.channels,
        )
        head = _head(experiment, feature_dim(encoder))
    return SimCLRModel(encoder, head)


def _head(experiment: Experiment, features: int) -> nn.Module:
    norm = partial(GlobalBatchNorm, momentum=experiment.batch_norm.momentum)
    head = build(experiment.head, nn.Module, features=features, norm=norm)
    temperature = experiment.loss.learned_temperature
    if temperature:
        layers = head if isinstance(head, nn.Sequential) else [head]
        return nn.Sequential(*layers, LearnableTemperature(temperature))
    return head


def build_loss(experiment: Experiment) -> Loss:
    """Return the experiment's loss; its ranks hold the batch plan's shares of the global batch."""
    size = experiment.batch_size
    return build(experiment.loss, Loss, global_batch_size=size)  # type: ignore[type-abstract] # asked by isinstance alone


def build_encoder(
    encoder: ComponentConfig,
    batch_norm: BatchNormConfig | None = None,
    *,
    size: int = 224,
    channels: int = 3,
) -> nn.Module:
    """Return an encoder: [N, C, H, W] in [0, 1] -> [N, F], with `feature_dim` = F.

    Its dropout and stochastic depth are keyed (`nn.stochastic`).
    Weights are drawn from torch's global generator. Raises `ConfigError` for a torchvision model
    that is unknown or has no final linear layer, and for imported code that breaks its contract.
    """
    momentum = (batch_norm or BatchNormConfig()).momentum
    built = family_of(encoder).build(partial(GlobalBatchNorm, momentum=momentum), size, channels)
    key_draws(built)
    return built


def encoder_from_tree(tree: dict[str, Any], *, size: int = 224, channels: int = 3) -> nn.Module:
    """Return the encoder that a stored config tree (`encoder: …`) describes."""
    encoder = cfg.validate(EncoderSection, {"encoder": tree}).encoder
    return build_encoder(encoder, size=size, channels=channels)


def classifier_from_tree(tree: dict[str, Any], features: int) -> nn.Module:
    """Return the classifier that a stored config tree (`head: …`) describes: [N, F] -> [N, K]."""
    head = cfg.validate(ClassifierHeadConfig, tree)
    return build(head, nn.Module, features=features, norm=GlobalBatchNorm)
