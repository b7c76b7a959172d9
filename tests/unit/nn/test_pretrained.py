"""Weights to start from: torchvision's give torchvision's features, and misfits are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from simclr_ray import config as cfg
from simclr_ray.config import imports
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import CheckpointError, ConfigError
from simclr_ray.inference.encoder_files import CARD
from simclr_ray.inference.export import ALL_FORMATS
from simclr_ray.nn.batchnorm import GlobalBatchNorm
from simclr_ray.nn.build import build_model
from simclr_ray.nn.foreign_weights import DEVIATION, MEAN
from simclr_ray.nn.pretrained import (
    OWN_CARD,
    OWN_FILES,
    _folder_statistics,
    load_init,
    load_trained,
)
from simclr_ray.storage import checkpoint
from simclr_ray.storage.provenance import sha256
from simclr_ray.train.resolve import init_line, resolve_init

WEIGHT_FORMATS = ("safetensors", "torchvision", "timm")
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


VIT: dict[str, Any] = {"depth": 1, "embed_dim": 24, "num_heads": 2}
TIMM_VIT = {"name": "timm", "model": "vit_small_patch16_224", "options": VIT}
NO_SHIFT = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
Named = dict[str, torch.Tensor]


def prefixed(tensors: Named, prefix: str) -> Named:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def narrow_resnet() -> nn.Module:
    """Return torchvision's ResNet-50, narrow: quickly written."""
    torch.manual_seed(3)
    return moved(torchvision.models.resnet50(width_per_group=4))


def solo_learn(backbone: Named) -> dict[str, Any]:
    """Return a checkpoint as solo-learn's methods write it, a momentum copy beside."""
    shaken = {name: tensor + 1 for name, tensor in backbone.items()}
    head = {"projector.0.weight": torch.zeros(4, 4), "classifier.weight": torch.zeros(10, 4)}
    copies = prefixed(shaken, "momentum_backbone.")
    return {"epoch": 3, "state_dict": copies | prefixed(backbone, "backbone.") | head}


CHILDREN = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


def numbered(backbone: Named) -> Named:
    """Return the names of `nn.Sequential(*list(resnet.children())[:-1])`, as of lightly."""
    out = {}
    for name, tensor in backbone.items():
        first, _, rest = name.partition(".")
        out[f"{CHILDREN.index(first)}.{rest}"] = tensor
    return out


LAYOUTS: dict[str, Callable[[Named], dict[str, Any]]] = {
    "plain": lambda own: own,
    "DDP": lambda own: prefixed(own, "module."),
    "compiled": lambda own: {"model": prefixed(own, "_orig_mod.")},
    "MoCo": lambda own: {
        "state_dict": prefixed({n: t + 1 for n, t in own.items()}, "module.encoder_k.")
        | prefixed(own, "module.encoder_q."),
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}},
    },
    "DINO": lambda own: {
        "student": prefixed({n: t + 1 for n, t in own.items()}, "module.backbone."),
        "teacher": prefixed(own, "backbone."),
    },
    "encoder": lambda own: prefixed(own, "encoder."),
    "solo-learn": solo_learn,
    "solo-learn, before 1.0": lambda own: {"state_dict": prefixed(own, "encoder.")},
    "lightly": lambda own: {"state_dict": prefixed(numbered(own), "backbone.")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_a_state_dict_gives_the_features_of_its_encoder(
    layout: str, tmp_path: Path
) -> None:
    theirs = narrow_resnet()
    theirs.fc = nn.Identity()
    path = tmp_path / "weights.ckpt"
    torch.save(LAYOUTS[layout](theirs.state_dict()), path)
    encoder = {"name": "torchvision", "model": "resnet50", "options": {"width_per_group": 4}}
    exp = resolve_init(experiment(encoder=encoder, init={"weights": str(path), **NO_SHIFT}))
    model = build_model(exp).eval()
    load_init(model, exp)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(images), theirs(images), rtol=1e-5, atol=1e-5)


def cifar_resnet(padding: int = 1, *, relu: bool = True) -> torchvision.models.ResNet:
    """Return torchvision's ResNet-18 with a stem for small images, as others alter it."""
    torch.manual_seed(4)
    theirs = torchvision.models.resnet18()
    theirs.conv1 = nn.Conv2d(3, 64, 3, 1, padding, bias=False)
    theirs.maxpool, theirs.fc = nn.Identity(), nn.Identity()
    if not relu:
        theirs.relu = nn.Identity()
    return moved(theirs)


def lightly_cifar(backbone: Named) -> dict[str, Any]:
    """Return a checkpoint of lightly's CIFAR benchmark, whose ResNet has no ReLU and no pool."""
    order = [name for name in CHILDREN if name not in ("relu", "maxpool")]
    out = {}
    for name, tensor in backbone.items():
        first, _, rest = name.partition(".")
        out[f"backbone.{order.index(first)}.{rest.replace('downsample', 'shortcut')}"] = tensor
    return {"state_dict": out | {"projection_head.layers.0.weight": torch.zeros(4, 4)}}


CIFAR_STEMS: dict[str, tuple[nn.Module, Callable[[Named], dict[str, Any]]]] = {
    "cifar": (cifar_resnet(), lambda own: own),
    "cifar_lightly": (cifar_resnet(relu=False), lightly_cifar),
    "cifar_solo_learn": (cifar_resnet(padding=2), solo_learn),
}


@pytest.mark.parametrize("stem", CIFAR_STEMS)
def test_resnets_for_cifar_come_in_whole_and_give_the_features_of_their_package(
    stem: str, tmp_path: Path
) -> None:
    theirs, layout = CIFAR_STEMS[stem]
    path = tmp_path / "weights.ckpt"
    torch.save(layout(theirs.state_dict()), path)
    encoder = {"name": "torchvision", "model": "resnet18", "stem": stem}
    unsaid = experiment(encoder=encoder, init={"weights": str(path)})
    with pytest.raises(
        ConfigError, match=r"nobody knows: say init.mean=\[0.485,0.456,0.406\] init.std=\["
    ):
        init_line(unsaid)
    exp = resolve_init(experiment(encoder=encoder, init={"weights": str(path), **NO_SHIFT}))
    assert init_line(exp).startswith("100 of ")  # 20 convolutions, and 20 batch norms of four
    model = build_model(exp).eval()
    assert sum(p.numel() for p in model.encoder.parameters()) == 11_168_832
    load_init(model, exp)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(images), theirs(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_weights_with_a_stem_for_cifar_name_the_encoder_that_takes_them(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(cifar_resnet().state_dict(), path)
    init = {"weights": str(path), **NO_SHIFT}
    with pytest.raises(
        ConfigError,
        match=r"conv1.weight is 64x3x7x7 here and 64x3x3x3 there .*encoder.stem=cifar",
    ):
        init_line(experiment(encoder={"name": name, "model": "resnet18"}, init=init))
    ours = {"name": "resnet", "depth": 18, "stem": "cifar"}
    with pytest.raises(ConfigError, match=r"encoder.model=resnet18 encoder.stem=cifar"):
        init_line(experiment(encoder=ours, init=init))


def test_a_stem_of_resnets_is_refused_for_other_networks() -> None:
    encoder = {"name": "torchvision", "model": "shufflenet_v2_x0_5", "stem": "cifar"}
    with pytest.raises(ConfigError, match=r"encoder.stem: cifar is a stem of ResNets"):
        build_model(experiment(encoder=encoder))


def test_weights_into_an_encoder_of_ones_own_are_not_guessed_to_be_of_images_in_0_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights.pth")
    encoder = {"name": "import", "path": "torchvision.models:resnet18"}
    monkeypatch.setenv(imports.PERMISSION, encoder["path"])
    init = {"weights": str(tmp_path / "weights.pth")}
    with pytest.raises(ConfigError, match=r"nobody knows: say init\.mean"):
        init_line(experiment(encoder=encoder, init=init))
    line = init_line(experiment(encoder=encoder, init=init | NO_SHIFT))
    assert line.endswith("for images less (0, 0, 0) over (1, 1, 1)")


def test_files_that_export_wrote_are_for_images_in_0_1(tmp_path: Path) -> None:
    written = {each.file for each in ALL_FORMATS if each.name in WEIGHT_FORMATS}
    assert written == set(OWN_FILES)
    assert OWN_CARD == CARD
    encoder = {"name": "torchvision", "model": "resnet18"}
    path = tmp_path / "torchvision.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    exp = experiment(encoder=encoder, init={"weights": str(path)})
    assert init_line(exp).endswith(
        "for images less (0.485, 0.456, 0.406) over (0.229, 0.224, 0.225)"
    )
    (tmp_path / CARD).write_text("{}")
    assert init_line(exp).endswith("for images less (0, 0, 0) over (1, 1, 1)")


def test_what_is_loaded_and_left_out_is_one_line(tmp_path: Path) -> None:
    theirs = timm.create_model("vit_small_patch16_224", img_size=32, num_classes=3, **VIT)
    torch.save({"model": theirs.state_dict()}, tmp_path / "weights.pth")
    init = {"weights": f"{tmp_path}/weights.pth"}
    line = init_line(experiment(encoder=TIMM_VIT, init=init))
    assert line == (
        "18 of 20 tensors loaded from model; left out 2: head.weight, head.bias; "
        "for images less (0.485, 0.456, 0.406) over (0.229, 0.224, 0.225)"
    )
    torch.save(theirs.state_dict(), tmp_path / "plain.pth")  # as timm's own: of what it has
    init = {"weights": f"{tmp_path}/plain.pth"}
    assert "(0.5, 0.5, 0.5) over (0.5, 0.5, 0.5)" in init_line(
        experiment(encoder=TIMM_VIT, init=init)
    )


@pytest.mark.parametrize("kind", ["timm", "torchvision"])
def test_patches_take_the_normalisation_exactly_and_positions_another_grid(
    kind: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    if kind == "timm":
        encoder = TIMM_VIT
        theirs = timm.create_model("vit_small_patch16_224", img_size=64, num_classes=0, **VIT)
    else:
        encoder = {"name": "torchvision", "model": "vit_b_32"}
        theirs = torchvision.models.vit_b_32(image_size=64)
        theirs.heads = nn.Identity()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.05)
    path = tmp_path / "weights.safetensors"
    save_file(theirs.state_dict(), path)
    init = {"weights": str(path), "mean": list(MEAN), "std": list(DEVIATION)}
    exp = experiment(encoder=encoder, augment={"size": 64}, init=init)
    model = build_model(exp).eval()
    load_init(model, exp)
    images = torch.rand(2, 3, 64, 64)
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (MEAN, DEVIATION))
    with torch.no_grad():
        expected = theirs.eval()((images - mean) / deviation)
        torch.testing.assert_close(model.encoder(images), expected, rtol=1e-4, atol=1e-5)
    larger = experiment(encoder=encoder, augment={"size": 96}, init=init)
    assert "resampled to the encoder's grid" in init_line(larger)
    load_init(build_model(larger), larger)


def test_a_hugging_face_folder_says_what_its_images_had_taken_off(tmp_path: Path) -> None:
    theirs = timm.create_model("vit_small_patch16_224", img_size=32, num_classes=0, **VIT)
    names = {
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "blocks.0.norm1.": "encoder.layer.0.layernorm_before.",
        "blocks.0.norm2.": "encoder.layer.0.layernorm_after.",
        "blocks.0.attn.proj.": "encoder.layer.0.attention.output.dense.",
        "blocks.0.mlp.fc1.": "encoder.layer.0.intermediate.dense.",
        "blocks.0.mlp.fc2.": "encoder.layer.0.output.dense.",
        "norm.": "layernorm.",
    }
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        if ".qkv." in name:
            for which, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                kind = name.rpartition(".")[2]
                tensors[f"vit.encoder.layer.0.attention.attention.{which}.{kind}"] = part.clone()
            continue
        old = next(o for o in names if name.startswith(o))
        tensors[f"vit.{names[old]}{name.removeprefix(old)}"] = tensor
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    preprocessing = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    exp = resolve_init(experiment(encoder=TIMM_VIT, init={"weights": str(tmp_path)}))
    assert exp.init.sha256 == sha256(tmp_path / "model.safetensors")
    line = init_line(exp)
    assert "18 of 18 tensors loaded under 'vit.' as of Hugging Face ViT" in line
    assert "(0.1, 0.2, 0.3) over (0.4, 0.5, 0.6)" in line
    model = build_model(exp).eval()
    load_init(model, exp)
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v)[:, None, None] for v in preprocessing.values())
    with torch.no_grad():
        expected = theirs.eval()((images - mean) / std)
        torch.testing.assert_close(model.encoder(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mean", [0.5, None, [], ["a"], [0.1, True, 0.2], {"r": 0.1}])
def test_a_mean_that_is_no_list_of_numbers_is_refused_in_a_line(tmp_path: Path, mean: Any) -> None:
    text = json.dumps({"image_mean": mean, "image_std": [0.4, 0.5, 0.6]})
    (tmp_path / "preprocessor_config.json").write_text(text)
    said = r"^preprocessor_config.json: image_mean .* is no list of numbers; say init.mean"
    with pytest.raises(CheckpointError, match=said):
        _folder_statistics(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"pretrained_cfg": null}')
    assert _folder_statistics(tmp_path) is None


def test_what_does_not_fit_names_five_of_each_side_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    theirs = narrow_resnet().state_dict()
    for tensors, told in (
        ({"a": torch.zeros(1)}, r"0 of its 18 tensors are in the file.*it holds a$"),
        (theirs, r"0 of its 18.*it lacks cls_token, pos_embed, patch_embed.proj.weight, .*, …; it"),
        ({}, "0 of its 18"),
    ):
        torch.save(tensors, path)
        exp = experiment(encoder=TIMM_VIT, init={"weights": str(path)})
        with pytest.raises(ConfigError, match=told) as caught:
            resolve_init(exp)
        assert len(str(caught.value)) < 500
        assert len(str(caught.value).splitlines()) == 1
    lacking = {name: t for name, t in theirs.items() if not name.startswith("layer4.2.")}
    torch.save(lacking, path)
    encoder = {"name": "torchvision", "model": "resnet50", "options": {"width_per_group": 4}}
    with pytest.raises(ConfigError, match=r"250 of its 265 .*lacks layer4\.2\.conv1\.weight"):
        resolve_init(experiment(encoder=encoder, init={"weights": str(path)}))


class _Settings:
    """Stands for the objects that training programs put beside weights."""


def test_a_file_with_objects_is_refused_and_the_way_out_is_said(tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "hyper_parameters": _Settings()}, path)
    exp = experiment(encoder=TIMM_VIT, init={"weights": str(path)})
    with pytest.raises(
        ConfigError, match=r"_Settings besides tensors.*model\.state_dict\(\)"
    ) as told:
        resolve_init(exp)
    assert len(str(told.value).splitlines()) == 1


NO_WEIGHTS: list[tuple[bytes, str]] = [
    (b"", "is empty"),
    (b"hello", "is no file of weights"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "a pointer of Git LFS"),
    (b"<!DOCTYPE html><html></html>", "a page of HTML"),
    (b"PK\x03\x04 and no archive", "is no whole file of weights"),
    (b"\x80\x02hello", "is no whole file of weights"),
    (bytes(range(128, 256)), "is no whole file of weights"),
]


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize(("data", "told"), NO_WEIGHTS, ids=lambda v: str(v)[:12])
def test_what_holds_no_weights_is_named_and_nobody_is_told_to_run_it(
    data: bytes, told: str, ending: str, tmp_path: Path
) -> None:
    path = tmp_path / f"weights.{ending}"
    path.write_bytes(data)
    if ending == "safetensors" and told == "is no file of weights":
        told = "is no whole file of weights"
    with pytest.raises(ConfigError, match=told) as caught:
        resolve_init(experiment(encoder=TIMM_VIT, init={"weights": str(path)}))
    assert "weights_only" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_saved_whole_is_refused_with_the_way_to_save_its_tensors(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    exp = experiment(encoder=TIMM_VIT, init={"weights": str(tmp_path / "whole.pt")})
    with pytest.raises(ConfigError, match=r"Linear besides tensors.*model\.state_dict\(\)"):
        resolve_init(exp)


def test_weights_that_are_not_finite_are_named_before_anything_starts(tmp_path: Path) -> None:
    tensors = torchvision.models.resnet18().state_dict()
    tensors["layer1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(tensors, tmp_path / "weights.pth")
    encoder = {"name": "torchvision", "model": "resnet18"}
    exp = experiment(encoder=encoder, init={"weights": str(tmp_path / "weights.pth")})
    with pytest.raises(ConfigError, match=r"layer1\.0\.conv1\.weight is not finite"):
        resolve_init(exp)


def test_a_place_without_weights_says_what_is_there(tmp_path: Path) -> None:
    def refused(weights: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            resolve_init(experiment(encoder=TIMM_VIT, init={"weights": str(weights)}))
        return str(caught.value)

    assert "there is no file or folder" in refused(tmp_path / "nope")
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "holds no checkpoint" in refused(folder)
    (folder / "config.json").write_text("{}")
    assert "holds config.json and no weights (model.safetensors" in refused(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    assert "index.json is no JSON" in refused(folder)
    for index in ("{}", '{"weight_map": {"a": "../other.safetensors"}}', '{"weight_map": 3}'):
        (folder / "model.safetensors.index.json").write_text(index)
        assert "names no files of this folder" in refused(folder)


@pytest.mark.parametrize("channels", [1, 4])
def test_weights_of_other_channels_are_refused_before_anything_starts(
    channels: int, tmp_path: Path
) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights.pth")
    exp = experiment(
        data={"train": "x", "channels": channels},
        encoder={"name": "torchvision", "model": "resnet18"},
        init={"weights": str(tmp_path / "weights.pth")},
    )
    with pytest.raises(ConfigError, match=r"init\.weights"):
        resolve_init(exp)


def test_a_mean_of_other_channels_than_the_weights_is_said(tmp_path: Path) -> None:
    own = torchvision.models.resnet18()
    own.conv1 = nn.Conv2d(4, 64, 7, 2, 3, bias=False)
    torch.save(own.state_dict(), tmp_path / "weights.pth")
    changes: dict[str, Any] = {
        "data": {"train": "x", "channels": 4},
        "encoder": {"name": "torchvision", "model": "resnet18"},
        "init": {"weights": str(tmp_path / "weights.pth")},
    }
    with pytest.raises(ConfigError, match=r"4 channels.* of 3; say init\.mean"):
        resolve_init(experiment(**changes))
    changes["init"] |= {"mean": [0.0] * 4, "std": [1.0] * 4}
    assert resolve_init(experiment(**changes)).init.sha256
