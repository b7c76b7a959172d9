"""Encoders of others are tried before a start: what would fail in hours fails now, in one line."""

from __future__ import annotations

import builtins
from typing import Any

import pytest

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import ConfigError
from simclr_ray.train.dry_run import num_parameters, step_memory
from simclr_ray.train.encoder_check import check_encoder

TINY = {"depth": 1, "embed_dim": 24, "num_heads": 2}


def experiment(encoder: dict[str, Any], **changes: Any) -> Experiment:
    tree = {"name": "t", "data": {"train": "x"}, "augment": {"size": 32}, "encoder": encoder}
    return cfg.validate(Experiment, tree | changes)


def vit(**options: Any) -> dict[str, Any]:
    return {"name": "timm", "model": "vit_tiny_patch16_224", "options": TINY | options}


@pytest.mark.parametrize(
    ("encoder", "changes", "told"),
    [
        ({"name": "timm", "model": "resnet5"}, {}, "timm has no 'resnet5' .did you mean 'resnet50"),
        ({"name": "timm", "model": "resnet18.a1_in1k"}, {}, r"the tag \.a1_in1k names weights"),
        (vit(drop_pth=0.1), {}, "encoder.options: .*drop_pth"),
        (vit(pretrained=True), {}, "options.pretrained is set here"),
        (vit(patch_drop_rate=0.5), {}, r"patch_drop \(PatchDropout\) draws random numbers"),
        (vit(global_pool=""), {}, r"gives \[2, 5, 24\] where one vector an image"),
        (vit(), {"evaluation": {"size": 64}}, "takes no images of 64 px"),
        (vit(), {"augment": {"size": 32, "start_size": 16}}, "takes no images of 16 px"),
        (
            {"name": "timm", "model": "mobilenetv3_small_050", "options": {"drop_rate": 0.2}},
            {},
            r"the encoder \(MobileNetV3\) draws random numbers",
        ),
        (
            {"name": "timm", "model": "mobilenetv3_small_050", "freeze_patch_embedding": True},
            {},
            "freeze_patch_embedding: the encoder does not begin with patches",
        ),
        (
            {"name": "timm", "model": "mobilenetv3_small_050"},
            {"scaling": {"recompute_activations": True}},
            "not for timm's models with batch norm",
        ),
        (
            {"name": "torchvision", "model": "resnet18", "options": {"dropot": 0.1}},
            {},
            "encoder.options: resnet18 of 32 px with .*dropot",
        ),
        (
            {"name": "torchvision", "model": "mobilenet_v3_small", "options": {"weights": "x"}},
            {},
            "options.weights is set here",
        ),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    encoder: dict[str, Any], changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        check_encoder(experiment(encoder, **changes))
    assert len(str(caught.value).splitlines()) == 1


def test_what_can_is_counted_without_memory() -> None:
    for encoder, changes in (
        (vit(drop_path_rate=0.1), {"scaling": {"recompute_activations": True}}),
        (vit(dynamic_img_size=True), {"augment": {"size": 64, "start_size": 32}}),
        ({"name": "timm", "model": "mobilenetv3_small_050"}, {}),
    ):
        config = experiment(encoder, **changes)
        check_encoder(config)
        assert num_parameters(config) > 10_000
        assert step_memory(config).activations > 0


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "timm":
            raise ImportError("No module named 'timm'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"encoder.name: .*pip install 'simclr-ray\[timm\]'"):
        check_encoder(experiment(vit()))
