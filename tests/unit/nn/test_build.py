"""Models: weights from the seed alone, any torchvision backbone, batch norm that is global."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from simclr_ray import config as cfg
from simclr_ray.config.experiment import (
    AdamWConfig,
    Experiment,
    LARSConfig,
    SGDConfig,
    TorchvisionConfig,
)
from simclr_ray.errors import ConfigError
from simclr_ray.nn import losses
from simclr_ray.nn.batchnorm import GlobalBatchNorm
from simclr_ray.nn.build import (
    SimCLRModel,
    build_encoder,
    build_loss,
    build_model,
    encoder_from_tree,
    feature_dim,
)
from simclr_ray.nn.supervised import CrossEntropyLoss, DistillationLoss
from simclr_ray.optim import build_optimizer

BACKBONES = {
    "resnet18": 512,
    "mobilenet_v3_small": 1024,
    "efficientnet_b0": 1280,
    "convnext_tiny": 768,
    "vit_b_16": 768,
    "regnet_x_400mf": 400,
    "vgg11": 4096,
}
SMALL = {"encoder": {"name": "resnet", "depth": 10, "width": 0.25, "stem": "cifar"}}


def experiment(**changes: Any) -> Experiment:
    return cfg.validate(Experiment, {"name": "t", "data": {"train": "x"}, **SMALL, **changes})


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_weights_depend_on_the_seed_alone_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights(build_model(experiment(seed=5)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    torch.rand(100)
    assert same(first, weights(build_model(experiment(seed=5))))
    assert not same(first, weights(build_model(experiment(seed=6))))


@pytest.mark.parametrize(
    ("head", "dim"),
    [
        ({"name": "none"}, 128),
        ({"name": "linear", "dim": 32}, 32),
        ({"name": "mlp", "layers": 3, "dim": 16, "hidden": 24}, 16),
    ],
)
def test_both_outputs_have_the_dimensions_of_the_config(head: dict[str, Any], dim: int) -> None:
    model = build_model(experiment(head=head))
    h, z = model(torch.rand(4, 3, 32, 32))
    assert feature_dim(model.encoder) == 128  # 512·0.25
    assert h.shape == (4, 128)
    assert z.shape == (4, dim)
    assert (h is z) == (head["name"] == "none")


def test_an_encoder_is_the_same_under_any_head() -> None:
    a = build_model(experiment(head={"name": "none"})).encoder
    b = build_model(experiment(head={"name": "mlp", "layers": 4})).encoder
    assert same(weights(a), weights(b))


@pytest.mark.parametrize(("name", "features"), BACKBONES.items())
def test_a_torchvision_backbone_gives_its_features(name: str, features: int) -> None:
    torch.manual_seed(0)
    size = 32
    encoder = build_encoder(TorchvisionConfig(model=name), size=size).train()
    assert feature_dim(encoder) == features
    h = encoder(torch.rand(2, 3, size, size))
    assert h.shape == (2, features)
    assert torch.isfinite(h).all()
    norms = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    assert all(isinstance(m, GlobalBatchNorm) for m in norms)
    assert all(p.grad_fn is None and p.is_leaf for p in encoder.parameters())


def test_the_batch_norms_of_a_backbone_keep_their_epsilon_and_take_the_configs_momentum() -> None:
    e = experiment(
        encoder={"name": "torchvision", "model": "efficientnet_b0"}, batch_norm={"momentum": 0.03}
    )
    norms = [m for m in build_model(e).modules() if isinstance(m, GlobalBatchNorm)]
    assert {m.momentum for m in norms} == {0.03}
    own = build_model(experiment(batch_norm={"momentum": 0.03}))
    assert {m.momentum for m in own.modules() if isinstance(m, GlobalBatchNorm)} == {0.03}


def test_every_batch_norm_of_our_models_is_global() -> None:
    for head in ({"name": "linear"}, {"name": "mlp", "layers": 3}):
        model = build_model(experiment(head=head))
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
        assert not [m for m in model.modules() if isinstance(m, kinds)]


@pytest.mark.parametrize(("given", "hint"), [("resnet8", "resnet18"), ("convnext_tny", "convnext")])
def test_an_unknown_backbone_is_told_with_the_nearest(given: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"torchvision has no '{given}' .did you mean '{hint}"):
        build_encoder(TorchvisionConfig(model=given))


@pytest.mark.parametrize("name", ["squeezenet1_0", "squeezenet1_1"])
def test_a_backbone_without_a_final_linear_layer_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="does not end in a linear layer") as caught:
        build_encoder(TorchvisionConfig(model=name))
    assert caught.value.issues[0].path == "encoder.model"


def test_an_encoder_is_rebuilt_from_its_stored_config() -> None:
    for tree in (SMALL["encoder"], {"name": "torchvision", "model": "mobilenet_v3_small"}):
        e = experiment(encoder=tree)
        built = build_model(e).encoder
        again = encoder_from_tree(cfg.to_tree(e)["encoder"], size=32)
        again.load_state_dict(built.state_dict())  # strict: the same names and shapes
        assert feature_dim(again) == feature_dim(built)


OPTIMIZERS: list[LARSConfig | SGDConfig | AdamWConfig] = [
    LARSConfig(weight_decay=0.1),
    SGDConfig(weight_decay=0.1),
    AdamWConfig(weight_decay=0.1),
]


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda c: str(c.name))
def test_norms_and_biases_are_neither_decayed_nor_adapted(
    config: LARSConfig | SGDConfig | AdamWConfig,
) -> None:
    model: SimCLRModel = build_model(experiment(head={"name": "mlp"}))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = build_optimizer(model, config).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert decayed["lr"] == plain["lr"] == 0.0
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in plain["params"])
    if config.name == "lars":
        assert (decayed["adapt"], plain["adapt"]) == (True, False)


def test_frozen_parameters_are_not_optimized() -> None:
    model = build_model(experiment())
    model.encoder.requires_grad_(requires_grad=False)
    held = [p for g in build_optimizer(model, SGDConfig()).param_groups for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.head.parameters()}


CLASSIFIER = {"name": "classifier", "num_classes": 4}


@pytest.mark.parametrize(
    ("loss", "kind", "fields"),
    [
        ({"temperature": 0.3}, losses.NTXentLoss, {"temperature": 0.3, "negatives": "both"}),
        ({"negatives": "other", "normalize": False}, losses.NTXentLoss, {"normalize": False}),
        (
            {"temperature": 0.3, "learn_temperature": True},
            losses.NTXentLoss,
            {"temperature": 1.0, "normalize": False},
        ),
        (
            {"name": "ntlogistic", "semi_hard": True},
            losses.NTLogisticLoss,
            {"semi_hard": True, "temperature": 0.1},
        ),
        (
            {"name": "triplet", "margin": 0.4, "negatives": "other"},
            losses.TripletLoss,
            {"margin": 0.4, "negatives": "other", "semi_hard": False},
        ),
        ({"name": "dcl", "sigma": 0.5}, losses.DCLLoss, {"sigma": 0.5}),
        ({"name": "supcon", "temperature": 0.2}, losses.SupConLoss, {"temperature": 0.2}),
        ({"name": "cross_entropy", "views": 2}, CrossEntropyLoss, {"one_view": False}),
        ({"name": "cross_entropy", "label_smoothing": 0.1}, CrossEntropyLoss, {"one_view": True}),
        (
            {"name": "distillation", "teacher": "t", "temperature": 0.1},
            DistillationLoss,
            {"temperature": 0.1},
        ),
    ],
)
def test_a_loss_is_what_its_config_says(
    loss: dict[str, Any], kind: type[losses.Loss], fields: dict[str, Any]
) -> None:
    classifies = loss.get("name") in ("cross_entropy", "distillation")
    changes = {"head": CLASSIFIER} if classifies else {}
    built = build_loss(experiment(loss=loss, batch_size=48, **changes))
    assert type(built) is kind
    for name, value in {**fields, "global_batch_size": 48}.items():
        assert getattr(built, name) == value, name


def test_a_learned_temperature_is_a_parameter_that_is_not_decayed() -> None:
    trained = experiment(loss={"temperature": 0.3, "learn_temperature": True})
    model = build_model(trained)
    (name,) = [n for n, _ in model.named_parameters() if "temperature" in n]
    groups = build_optimizer(model, trained.optimizer).param_groups
    assert [id(p) for p in groups[2]["params"]] == [id(model.get_parameter(name))]
    assert (groups[2]["weight_decay"], groups[2]["adapt"], groups[1]["adapt"]) == (0, True, False)
    z = model(torch.rand(4, 3, 16, 16)).z
    torch.testing.assert_close(z.norm(dim=1), torch.full((4,), 0.3**-0.5))


def test_a_classifiers_last_layer_is_decayed_and_not_adapted() -> None:
    head = CLASSIFIER | {"layers": 1}
    trained = experiment(head=head, loss={"name": "cross_entropy"})
    model = build_model(trained)
    groups = build_optimizer(model, trained.optimizer).param_groups
    (last,) = groups[2]["params"]
    assert last is list(model.head.parameters())[-2]
    assert groups[2]["weight_decay"] == trained.optimizer.weight_decay > 0
    assert [group["adapt"] for group in groups] == [True, False, False]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_a_learned_temperature_stays_where_it_is_of_use_at_the_rates_of_the_presets() -> None:
    torch.manual_seed(0)
    trained = experiment(loss={"temperature": 0.2, "learn_temperature": True}, head={"dim": 16})
    model = build_model(trained)
    optimizer = build_optimizer(model, trained.optimizer)
    loss = losses.NTXentLoss(0.2, learn_temperature=True)
    images = torch.rand(16, 3, 8, 8)
    values = []
    for step in range(60):
        for group in optimizer.param_groups:
            group["lr"] = 4.8 * min(1.0, step / 10)  # the paper's peak on ImageNet
        noisy = torch.cat([images, images]) + 0.05 * torch.randn(32, 3, 8, 8)
        z1, z2 = model(noisy).z.chunk(2)
        value = loss(z1, z2)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    (name,) = [n for n, _ in model.named_parameters() if "temperature" in n]
    assert 0.01 < model.get_parameter(name).exp().item() < 2
    assert values[-1] < np.log(31) - 0.1
