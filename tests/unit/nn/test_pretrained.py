"""Weights to start from: torchvision's give torchvision's features, and misfits are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import CheckpointError, ConfigError
from simclr_ray.nn.batchnorm import GlobalBatchNorm
from simclr_ray.nn.build import build_model
from simclr_ray.nn.pretrained import DEVIATION, MEAN, load_init, load_trained
from simclr_ray.storage import checkpoint
from simclr_ray.storage.provenance import sha256
from simclr_ray.train.resolve import resolve_init

SMALL = {"name": "resnet", "depth": 10, "width": 0.125, "stem": "cifar"}


def experiment(**changes: Any) -> Experiment:
    tree = {"name": "t", "data": {"train": "x"}, "encoder": SMALL}
    return cfg.validate(Experiment, tree | changes)


def moved(model: nn.Module) -> nn.Module:
    """Return the model, its statistics and gammas no longer those of a new one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type] # a buffer
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type] # a buffer
    return model.eval()


@pytest.mark.parametrize(
    "encoder",
    [
        {"name": "resnet", "depth": 50, "width": 1.0, "stem": "imagenet"},
        {"name": "torchvision", "model": "resnet50"},
        {"name": "torchvision", "model": "resnet18"},
    ],
    ids=["ours", "resnet50", "resnet18"],
)
def test_a_torchvision_state_dict_gives_torchvisions_features(
    encoder: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    theirs = moved(torchvision.models.get_model(encoder.get("model", "resnet50")))
    path = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), path)
    exp = resolve_init(experiment(encoder=encoder, init={"weights": str(path)}))
    assert exp.init.sha256 == sha256(path)
    model = build_model(exp).eval()
    load_init(model, exp)
    # The border is padded with black, not with the mean color: images of the mean there agree.
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (MEAN, DEVIATION))
    images = torch.rand(2, 3, 64, 64)
    theirs.fc = nn.Identity()
    with torch.no_grad():
        ours, expected = model.encoder(images), theirs((images - mean) / deviation)
    relative = (ours - expected).norm() / expected.norm()
    assert relative < 0.2  # the border's share
    inner = next(m for m in model.encoder.modules() if isinstance(m, nn.Conv2d))
    first_norm = next(m for m in model.encoder.modules() if isinstance(m, GlobalBatchNorm))
    with torch.no_grad():
        a = first_norm(inner(images))[:, :, 4:-4, 4:-4]
        first: nn.Module = nn.Sequential(theirs.get_submodule("conv1"), theirs.get_submodule("bn1"))
        b = first((images - mean) / deviation)[:, :, 4:-4, 4:-4]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def write_run(folder: Path, exp: Experiment) -> nn.Module:
    """Write a run folder with one checkpoint of a model with weights of its own."""
    torch.manual_seed(1)
    model = build_model(exp)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    record = {"experiment": cfg.to_tree(exp), "digest": "d", "fingerprint": "f", "class_names": []}
    tensors = checkpoint.pack(model, torch.optim.SGD(model.parameters()))
    folder.mkdir()
    checkpoint.write(folder / checkpoint.new_name(3), 3, tensors, record)
    return model


def test_a_run_gives_its_encoder_and_the_first_layers_of_its_head(tmp_path: Path) -> None:
    pretrained = experiment(head={"name": "mlp", "layers": 3})
    source = write_run(tmp_path / "run", pretrained)
    classifier = experiment(
        head={"name": "classifier", "num_classes": 5, "layers": 1},
        loss={"name": "cross_entropy"},
        init={"weights": str(tmp_path / "run")},
    )
    named = resolve_init(classifier)
    assert named.init.weights.startswith(str(tmp_path / "run" / "step-00000003"))
    assert named.digest() != classifier.digest()  # by the weights, not by where they lie
    model = build_model(named)
    load_init(model, named)
    theirs = source.state_dict()
    for name, tensor in model.state_dict().items():
        if name.startswith(("encoder.", "head.0", "head.1")):
            assert torch.equal(tensor, theirs[name]), name
    assert not list(model.head.parameters())[-2].any()  # the scores' weights
    again = resolve_init(named)
    assert again.init == named.init


def test_what_does_not_fit_is_said_before_anything_starts(tmp_path: Path) -> None:
    write_run(tmp_path / "run", experiment(head={"name": "mlp", "layers": 2}))
    start = {"weights": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match=r"another encoder: width: 0.125 -> 0.25"):
        resolve_init(experiment(encoder=SMALL | {"width": 0.25}, init=start))
    with pytest.raises(ConfigError, match="another encoder: name: resnet -> torchvision"):
        resolve_init(experiment(encoder={"name": "torchvision", "model": "resnet18"}, init=start))
    classifier = {"name": "classifier", "num_classes": 5, "layers": 2}
    with pytest.raises(ConfigError, match="from a head that has 1"):
        resolve_init(experiment(head=classifier, loss={"name": "cross_entropy"}, init=start))
    tuned = experiment(head=classifier, loss={"name": "cross_entropy"})
    write_run(tmp_path / "tuned", tuned)
    again = experiment(
        head=classifier,
        loss={"name": "cross_entropy"},
        init={"weights": str(tmp_path / "tuned")},
    )
    assert resolve_init(again).init.sha256  # a classifier counts hidden layers alone
    for missing in ("nowhere", "nowhere.pth", "nowhere/step-00000003-00000000"):
        with pytest.raises(ConfigError, match=r"init.weights: .*nowhere"):
            resolve_init(experiment(init={"weights": str(tmp_path / missing)}))


def test_a_state_dict_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"conv1.weight": torch.zeros(1)}, path)
    for encoder, told in (
        (SMALL, "torchvision has no such ResNet"),
        ({"name": "torchvision", "model": "resnet18"}, "does not fit the encoder"),
    ):
        exp = experiment(encoder=encoder, init={"weights": str(path)})
        with pytest.raises(CheckpointError, match=told):
            load_init(build_model(exp), exp)


def test_experiment_and_model_of_a_checkpoint_come_from_one_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_run(tmp_path / "run", experiment())
    (folder,) = (tmp_path / "run").iterdir()
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return sha256(path)

    monkeypatch.setattr(checkpoint, "sha256", counted)
    trained = load_trained(folder, "seed=7")
    assert hashed == [folder / checkpoint.STATE]
    assert trained.experiment == experiment(seed=7)
    assert not trained.model.training
    theirs = source.state_dict()
    assert all(torch.equal(t, theirs[name]) for name, t in trained.model.state_dict().items())
