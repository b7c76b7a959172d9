"""Files for other programs compute what the encoder does, by networks of those programs."""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from simclr_ray import config as cfg
from simclr_ray.augment.decode import image_decoder
from simclr_ray.config.sections.model import BatchNormConfig, EncoderSection
from simclr_ray.errors import CheckpointError, ConfigError
from simclr_ray.inference.encoder import Encoder
from simclr_ray.inference.encoder_files import load_folder, write_encoder
from simclr_ray.inference.export import export_encoder
from simclr_ray.inference.export_others import exports_line
from simclr_ray.nn.build import build_encoder, feature_dim
from simclr_ray.nn.timm_models import load_timm

UMASK = os.umask(0)
os.umask(UMASK)
TOLERANCE = 1e-5  # of the largest feature
OURS = {"name": "resnet", "depth": 50}
SMALL = {"name": "resnet", "depth": 10, "width": 0.25, "stem": "cifar"}
TIMM_VIT = {
    "name": "timm", "model": "vit_tiny_patch16_224",
    "options": {"depth": 2, "embed_dim": 48, "num_heads": 3},
}  # fmt: skip
TORCHVISION = [
    (OURS, 3),
    (OURS | {"stem": "cifar"}, 3),
    (OURS, 4),
    ({"name": "torchvision", "model": "resnet18"}, 3),
    ({"name": "torchvision", "model": "resnet18", "stem": "cifar"}, 3),
    ({"name": "torchvision", "model": "resnet18", "stem": "cifar_lightly"}, 4),
    ({"name": "torchvision", "model": "shufflenet_v2_x0_5"}, 3),
]
TIMM = [
    (OURS, 3),
    ({"name": "torchvision", "model": "resnet18"}, 3),
    ({"name": "timm", "model": "resnet10t"}, 3),
    ({"name": "timm", "model": "resnet10t"}, 2),
    (TIMM_VIT, 3),
]


def image(seed: int, channels: int) -> Any:
    low = np.random.default_rng(seed).integers(0, 256, (6, 8, channels), dtype=np.uint8)
    return low.repeat(12, 0).repeat(12, 1)


def made(folder: Path, tree: dict[str, Any], channels: int = 3, size: int = 64) -> Encoder:
    """Write an encoder whose weights and statistics are away from their start, and load it."""
    config = cfg.validate(EncoderSection, {"encoder": tree}).encoder
    torch.manual_seed(0)
    network = build_encoder(config, BatchNormConfig(momentum=1), size=size, channels=channels)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        network.train()(torch.rand(8, channels, size, size))
    encoder = Encoder(
        network.eval(),
        config=cfg.to_tree(config),
        size=size,
        feature_dim=feature_dim(network),
        decoder=image_decoder(channels, 0),
    )
    write_encoder(folder, encoder)
    return load_folder(folder)


def inputs(encoder: Encoder) -> torch.Tensor:
    return torch.stack([encoder.transform(image(seed, encoder.channels)) for seed in range(3)])


def assert_equal(network: Any, encoder: Encoder) -> None:
    given = inputs(encoder)
    with torch.no_grad():
        want, got = encoder(given), network(given)
    assert got.shape == want.shape
    assert (got - want).abs().max() < TOLERANCE * want.abs().max()
    assert (want[0] - want[1]).abs().max() > 100 * TOLERANCE * want.abs().max()  # images differ


@pytest.mark.slow
@pytest.mark.parametrize(("tree", "channels"), TORCHVISION)
def test_torchvision_loads_its_state_dict_strictly(
    tree: dict[str, Any], channels: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torchvision

    caplog.set_level("INFO")
    encoder = made(tmp_path / "e", tree, channels)
    assert "torchvision.pth" in export_encoder(tmp_path / "e", tmp_path / "out", ["torchvision"])
    (code,) = re.findall(r"torchvision.pth is for: (.*)", caplog.text)
    if tree.get("stem") == "cifar":
        assert "net.maxpool = torch.nn.Identity()" in code
    names: dict[str, Any] = {"torch": torch, "torchvision": torchvision}
    exec(code, names)  # noqa: S102 - what is said is what loads
    network: Any = names["net"]
    network.load_state_dict(torch.load(tmp_path / "out" / "torchvision.pth", weights_only=True))
    assert_equal(network.eval(), encoder)


@pytest.mark.slow
@pytest.mark.parametrize(("tree", "channels"), TIMM)
def test_timm_loads_its_state_dict_and_its_folder(
    tree: dict[str, Any], channels: int, tmp_path: Path
) -> None:
    timm = load_timm()
    encoder = made(tmp_path / "e", tree, channels)
    export_encoder(tmp_path / "e", tmp_path / "out", ["timm", "huggingface"])
    options = {**tree.get("options", {}), "num_classes": 0}
    if channels != 3:
        options["in_chans"] = channels
    if tree is TIMM_VIT:
        options["img_size"] = encoder.size
    network = timm.create_model(
        tree.get("model", "resnet50"),
        checkpoint_path=str(tmp_path / "out" / "timm.safetensors"),
        **options,
    )
    assert_equal(network.eval(), encoder)
    mode = (tmp_path / "out" / "huggingface" / "model.safetensors").stat().st_mode
    assert mode & 0o044 == 0o044 & ~UMASK  # others may read it
    again = timm.create_model(
        f"local-dir:{tmp_path}/out/huggingface", pretrained=True, num_classes=0
    )
    assert_equal(again.eval(), encoder)
    shown = timm.data.resolve_model_data_config(again)
    assert tuple(shown["mean"]) == (0.0,) * channels
    assert tuple(shown["std"]) == (1.0,) * channels
    assert shown["input_size"] == (channels, 64, 64)
    assert shown["interpolation"] == "bicubic"
    assert int(64 / shown["crop_pct"]) == 74  # an even number more than 64, next to 64 / 0.875


@pytest.mark.slow
def test_the_view_of_timm_is_near_ours(tmp_path: Path) -> None:
    """Ours crops before it resizes, theirs after: alike but for a border and rounding."""
    timm = load_timm()
    encoder = made(tmp_path / "e", {"name": "torchvision", "model": "resnet18"})
    export_encoder(tmp_path / "e", tmp_path / "out", ["huggingface"])
    network = timm.create_model(f"local-dir:{tmp_path}/out/huggingface", pretrained=True)
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    low = Image.fromarray(image(3, 3)).resize((8, 6))
    smooth = low.resize((150, 120), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    smooth.save(out, "PNG")
    view = theirs(smooth)
    assert view.shape == (3, 64, 64)
    assert (view - encoder.transform(out.getvalue())).abs().mean() < 0.02


def test_what_can_be_exported_is_one_line_before_a_training() -> None:
    def line(**tree: Any) -> str:
        return exports_line(cfg.validate(EncoderSection, {"encoder": tree}).encoder, 32)

    theirs = {"name": "torchvision", "model": "resnet18"}
    assert line(**theirs) == ("safetensors, torch-export, onnx, torchvision, timm, huggingface")
    assert line(**theirs, stem="cifar").startswith(
        "safetensors, torch-export, onnx, torchvision; not timm, huggingface: timm builds no"
    )
    ours = line(name="resnet", depth=18, stem="cifar")
    assert ours.startswith("safetensors, torch-export, onnx; not torchvision: torchvision's ")
    assert (
        "encoder.name=torchvision encoder.model=resnet18 encoder.stem=cifar trains theirs" in ours
    )


@pytest.mark.parametrize(
    ("tree", "to", "said"),
    [
        (SMALL, "torchvision", "depth 50, 101 and 152"),
        (
            {"name": "resnet", "depth": 18, "stem": "cifar"},
            "torchvision",
            "encoder.model=resnet18 encoder.stem=cifar trains theirs",
        ),
        (
            {"name": "torchvision", "model": "resnet18", "stem": "cifar"},
            "timm",
            r"no ResNet with a 3x3 stem and without max pool \(--to onnx",
        ),
        (SMALL, "timm", "depth 50 and more"),
        (SMALL, "huggingface", "depth 50 and more"),
    ],
)
def test_an_architecture_that_the_other_lacks_is_refused_before_anything_is_written(
    tree: dict[str, Any], to: str, said: str, tmp_path: Path
) -> None:
    made(tmp_path / "e", tree, size=32)
    with pytest.raises(ConfigError, match=f"--to {to}: .*{said}"):
        export_encoder(tmp_path / "e", tmp_path / "out", [to])
    assert not (tmp_path / "out").exists()


def test_without_the_extra_onnx_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "e", SMALL, size=32)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"--to: onnx needs the extra: .*simclr-ray\[onnx\]"):
        export_encoder(tmp_path / "e", tmp_path / "out", ["onnx"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("tree", [SMALL, TIMM_VIT])
def test_onnx_takes_any_batch_and_where_the_network_does_any_size(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    import onnxruntime

    encoder = made(tmp_path / "e", tree, size=64)
    export_encoder(tmp_path / "e", tmp_path / "out", ["onnx"])
    session = onnxruntime.InferenceSession(tmp_path / "out" / "encoder.onnx")
    sizes = [64, 40, 96] if tree is SMALL else [64]
    for n, size in [(n, size) for n in (1, 5) for size in sizes]:
        images = torch.rand(n, 3, size, size)
        with torch.no_grad():
            want = encoder(images).numpy()
        (got,) = session.run(None, {"images": images.numpy()})
        assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


def test_a_file_that_computes_something_else_is_never_handed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from simclr_ray.inference import export_others

    made(tmp_path / "e", {"name": "torchvision", "model": "resnet18"})
    build = export_others.plain_torchvision

    def altered(encoder: Encoder) -> nn.Module:
        network = build(encoder)
        network.relu = nn.GELU()
        return network

    monkeypatch.setattr(export_others, "plain_torchvision", altered)
    with pytest.raises(CheckpointError, match="the exported torchvision differs from the module"):
        export_encoder(tmp_path / "e", tmp_path / "out", ["torchvision"])
    assert not (tmp_path / "out").exists()
