"""What is trained, and by what: encoder f, head g, loss and optimizer, built from config."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, assert_never

import torch
from torch import Tensor, nn

from simclr_ray import config as cfg
from simclr_ray.config.experiment import (
    BatchNormConfig,
    ClassifierHeadConfig,
    CrossEntropyConfig,
    DCLConfig,
    DistillationConfig,
    Experiment,
    LinearHeadConfig,
    MLPHeadConfig,
    NoHeadConfig,
    NTLogisticConfig,
    NTXentConfig,
    ResNetConfig,
    SupConConfig,
    TorchvisionConfig,
    TripletConfig,
)
from simclr_ray.errors import ConfigError, ConfigIssue
from simclr_ray.nn import losses
from simclr_ray.nn.batchnorm import GlobalBatchNorm
from simclr_ray.nn.heads import LearnableTemperature, classifier_head, linear_head, mlp_head
from simclr_ray.nn.resnet import ResNet
from simclr_ray.nn.supervised import CrossEntropyLoss, DistillationLoss


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
        """Return h [M, F] and z [M, D] of images [M, 3, S, S] in [0, 1]."""
        h = self.encoder(images)
        return Projection(h, self.head(h))


def build_model(experiment: Experiment) -> SimCLRModel:
    """Return the experiment's model, its weights a pure function of `experiment.seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        encoder = build_encoder(
            experiment.encoder, experiment.batch_norm, size=experiment.augment.size
        )
        head = _head(experiment, feature_dim(encoder))
    return SimCLRModel(encoder, head)


def _head(experiment: Experiment, features: int) -> nn.Module:
    norm = partial(GlobalBatchNorm, momentum=experiment.batch_norm.momentum)
    head: nn.Module
    match experiment.head:
        case NoHeadConfig():
            head = nn.Identity()
        case LinearHeadConfig() as c:
            head = linear_head(features, c.dim, norm, batch_norm=c.batch_norm)
        case MLPHeadConfig() as c:
            head = mlp_head(features, c.dim, c.layers, c.hidden, norm, batch_norm=c.batch_norm)
        case ClassifierHeadConfig() as c:
            head = classifier_head(
                features, c.num_classes, c.layers, c.hidden, norm, batch_norm=c.batch_norm
            )
        case _ as never:
            assert_never(never)
    loss = experiment.loss
    if isinstance(loss, NTXentConfig) and loss.learn_temperature:
        layers = head if isinstance(head, nn.Sequential) else [head]
        return nn.Sequential(*layers, LearnableTemperature(loss.temperature))
    return head


def build_loss(experiment: Experiment) -> losses.Loss:
    """Return the experiment's loss; its ranks hold the batch plan's shares of the global batch."""
    size = experiment.batch_size
    match experiment.loss:
        case NTXentConfig(learn_temperature=True) as c:  # the head scales z
            return losses.NTXentLoss(
                1.0, normalize=False, global_batch_size=size, negatives=c.negatives
            )
        case NTXentConfig() as c:
            return losses.NTXentLoss(
                c.temperature,
                normalize=c.normalize,
                global_batch_size=size,
                negatives=c.negatives,
            )
        case NTLogisticConfig() as c:
            return losses.NTLogisticLoss(
                c.temperature,
                normalize=c.normalize,
                global_batch_size=size,
                semi_hard=c.semi_hard,
                negatives=c.negatives,
            )
        case TripletConfig() as c:
            return losses.TripletLoss(
                c.margin,
                normalize=c.normalize,
                global_batch_size=size,
                semi_hard=c.semi_hard,
                negatives=c.negatives,
            )
        case DCLConfig() as c:
            return losses.DCLLoss(
                c.temperature, normalize=c.normalize, global_batch_size=size, sigma=c.sigma
            )
        case SupConConfig() as c:
            return losses.SupConLoss(c.temperature, normalize=c.normalize, global_batch_size=size)
        case CrossEntropyConfig() as c:
            return CrossEntropyLoss(c.label_smoothing, views=c.views, global_batch_size=size)
        case DistillationConfig() as c:
            return DistillationLoss(c.temperature, global_batch_size=size)
        case _ as never:
            assert_never(never)


def build_encoder(
    encoder: ResNetConfig | TorchvisionConfig,
    batch_norm: BatchNormConfig | None = None,
    *,
    size: int = 224,
) -> nn.Module:
    """Return an encoder: [N, 3, H, W] in [0, 1] -> [N, F], with `feature_dim` = F.

    Weights are drawn from torch's global generator. Raises `ConfigError` for a torchvision model
    that is unknown or has no final linear layer.
    """
    momentum = (batch_norm or BatchNormConfig()).momentum
    norm = partial(GlobalBatchNorm, momentum=momentum)
    if isinstance(encoder, ResNetConfig):
        return ResNet(
            encoder.depth,
            encoder.width,
            encoder.stem,
            norm,
            selective_kernel=encoder.selective_kernel,
        )
    return _torchvision_backbone(encoder.model, size, momentum)


def encoder_from_tree(tree: dict[str, object], *, size: int = 224) -> nn.Module:
    """Return the encoder that a stored config tree (`encoder: …`) describes."""
    if tree.get("name") == "resnet":
        return build_encoder(cfg.validate(ResNetConfig, tree), size=size)
    return build_encoder(cfg.validate(TorchvisionConfig, tree), size=size)


def feature_dim(encoder: nn.Module) -> int:
    """Return F of an encoder that was built here."""
    features = encoder.feature_dim
    assert isinstance(features, int)
    return features


def _torchvision_backbone(name: str, size: int, momentum: float) -> nn.Module:
    import torchvision  # seconds to import, in every worker; few runs need it

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        hint = cfg.nearest(name, names)
        raise ConfigError([ConfigIssue("encoder.model", f"torchvision has no {name!r}{hint}")])
    options: dict[str, object] = {}
    if name.startswith("vit"):
        options["image_size"] = size
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    backbone: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    linears = [(n, m) for n, m in backbone.named_modules() if isinstance(m, nn.Linear)]
    if not linears or list(backbone.named_modules())[-1][0] != linears[-1][0]:
        raise ConfigError([ConfigIssue("encoder.model", f"{name} does not end in a linear layer")])
    where, classifier = linears[-1]
    parent, _, leaf = where.rpartition(".")
    setattr(backbone.get_submodule(parent), leaf, nn.Identity())
    _globalise(backbone, momentum)
    backbone.feature_dim = classifier.in_features  # type: ignore[assignment] # a plain attribute
    return backbone


def _globalise(module: nn.Module, momentum: float) -> None:
    """Replace each batch norm below `module` by the global one, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d | nn.BatchNorm1d):
            setattr(module, name, GlobalBatchNorm(child.num_features, child.eps, momentum))
        else:
            _globalise(child, momentum)
