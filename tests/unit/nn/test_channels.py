"""Encoders of images that are no RGB, and training on them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from simclr_ray import config as cfg
from simclr_ray.augment.decode import image_decoder
from simclr_ray.config.experiment import Experiment, ResNetConfig, TimmConfig, TorchvisionConfig
from simclr_ray.data.batches import local_batches
from simclr_ray.data.source import Source
from simclr_ray.errors import ConfigError
from simclr_ray.inference.encoder import Encoder
from simclr_ray.inference.encoder_files import load_folder, write_encoder
from simclr_ray.nn.build import build_encoder, build_loss, build_model, feature_dim


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(
    "config",
    [
        ResNetConfig(depth=10, width=0.125, stem="cifar"),
        ResNetConfig(depth=50, width=0.125, selective_kernel=0.0625),
        TorchvisionConfig(model="resnet18"),
        TimmConfig(model="resnet10t"),
    ],
    ids=["cifar", "selective kernels", "torchvision", "timm"],
)
def test_the_first_layer_takes_so_many_channels(config: Any, channels: int) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(config, size=32, channels=channels)
    h = encoder(torch.rand(2, channels, 32, 32))
    assert h.shape == (2, feature_dim(encoder))
    first = next(m for m in encoder.modules() if isinstance(m, nn.Conv2d))
    assert first.in_channels == channels
    with torch.device("meta"):  # as the dry run counts
        build_encoder(config, size=32, channels=channels)


def experiment(folder: Path, channels: int, **data: Any) -> Experiment:
    rng = np.random.default_rng(0)
    images = []
    for _ in range(16):
        out = io.BytesIO()
        np.save(out, rng.integers(0, 60_000, (24, 28, channels), dtype=np.uint16))
        images.append(out.getvalue())
    pq.write_table(pa.table({"image": images}), folder / "t.parquet")
    tree = {
        "name": "t",
        "data": {"train": str(folder / "t.parquet"), "channels": channels, **data},
        "augment": {"name": "simclr", "size": 24},
        "encoder": {"name": "resnet", "depth": 10, "width": 0.125, "stem": "strided"},
        "head": {"name": "mlp", "dim": 16},
        "batch_size": 8,
        "epochs": 1,
    }
    return cfg.validate(Experiment, tree)


@pytest.mark.parametrize("channels", [1, 4])
def test_two_steps_train_and_the_files_of_the_encoder_give_it_back(
    tmp_path: Path, channels: int
) -> None:
    run = experiment(tmp_path, channels)
    model, loss = build_model(run), build_loss(run)
    before = model.encoder.state_dict()["stem.0.weight"].clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    source = Source.open(run.data.train)
    for batch in local_batches(run, source, range(2)):
        assert batch.a.shape == (8, channels, 24, 24)
        _, z = model(torch.cat([batch.a, batch.b]).float() / 255)
        loss(z[:8], z[8:]).backward()
        optimizer.step()
    assert not torch.equal(before, model.encoder.state_dict()["stem.0.weight"])
    encoder = model.encoder.eval()
    white = [1000.0] * channels if channels > 1 else 1000.0
    made = Encoder(
        encoder,
        config=cfg.to_tree(run)["encoder"],
        size=24,
        feature_dim=feature_dim(encoder),
        decoder=image_decoder(channels, white),
    )
    write_encoder(tmp_path / "e", made)
    loaded = load_folder(tmp_path / "e")
    images = torch.rand(3, channels, 24, 24)
    assert torch.equal(loaded(images), encoder(images))
    assert loaded.decoder.channels == channels
    assert np.array_equal(loaded.decoder.white, white)


def test_what_only_rgb_has_is_refused_and_the_default_has_no_effect(tmp_path: Path) -> None:
    run = experiment(tmp_path, 4, white=[1, 2, 3, 4])
    tree = cfg.to_tree(run)
    for change, problem in (
        ({"augment": {"name": "simclr", "grayscale": 0.5}}, "grayscale=0.5 is for RGB"),
        ({"augment": {"name": "pipeline", "a": [{"name": "crop"}, {"name": "sobel"}]}}, "sobel"),
        ({"augment": {"name": "pipeline", "a": [{"name": "crop"}, {"name": "jitter"}]}}, "hue"),
        ({"data": {**tree["data"], "white": [1.0, 2.0]}}, "white has 2 numbers, channels=4"),
        ({"data": {**tree["data"], "channels": 17, "white": 0}}, "16"),
        ({"data": {**tree["data"], "channels": 3}}, "one number with channels=3"),
    ):
        with pytest.raises(ConfigError, match=problem):
            cfg.validate(Experiment, {**tree, **change})
    augment = {**tree["augment"], "grayscale": 0.0}
    assert cfg.validate(Experiment, {**tree, "augment": augment}).digest() == run.digest()
    jitter = {"name": "jitter", "saturation": 0.0, "hue": 0.0}
    stages = {"name": "pipeline", "size": 24, "a": [{"name": "crop"}, jitter, {"name": "blur"}]}
    some = cfg.validate(Experiment, {**tree, "augment": stages})
    (batch,) = local_batches(some, Source.open(some.data.train), range(1))
    assert batch.a.shape == (8, 4, 24, 24)
