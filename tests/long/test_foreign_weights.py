"""State dicts that the real timm, torchvision, transformers and lightly write give their features.

They are written in an environment of its own, which sees the packages of this one: torch is not
downloaded again, and neither transformers nor lightly is a dependency.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.nn.build import build_model
from simclr_ray.nn.pretrained import load_init
from simclr_ray.train.resolve import init_line, resolve_init
from tests.long import foreign_writers
from tests.long.environments import make_environment

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

TOLERANCE = 1e-5  # of the features' norm; what is measured is 1e-6
PACKAGES = (
    *("transformers==5.24.0", "huggingface_hub==2.4.0", "tokenizers==0.23.3", "hf_xet==1.8.0"),
    *("regex==2026.11.19", "httpx2==2.16.2", "httpcore2==2.16.2", "truststore==0.10.5"),
    *("anyio==4.16.0", "h11==0.16.0", "idna==3.20", "tqdm==4.70.1", "typer==0.29.2"),
    *("lightly==1.6.0", "lightly_utils==0.0.2", "pytorch_lightning==2.6.6"),
    *("lightning_utilities==0.15.3", "torchmetrics==1.9.0", "hydra-core==1.3.8"),
    *("omegaconf==2.4.0", "antlr4-python3-runtime==4.9.3", "pyyaml==6.0.4", "requests==2.34.2"),
)
NO_SHIFT = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
NARROW = {key: value for key, value in foreign_writers.VIT.items() if key != "img_size"}
TIMM_RESNET = {"name": "timm", "model": "resnet50"}
RESNET = {"name": "torchvision", "model": "resnet50"}
OURS = {"name": "resnet", "depth": 50}
CONVNEXT = {"name": "timm", "model": "convnext_tiny"}
VIT = {"name": "timm", "model": "vit_small_patch16_224"}
SWIN = {"name": "torchvision", "model": "swin_t"}
ENCODERS: dict[str, list[dict[str, Any]]] = {
    "timm_resnet50.pth": [TIMM_RESNET, RESNET, OURS],
    "timm_convnext.pth": [CONVNEXT, {"name": "torchvision", "model": "convnext_tiny"}],
    "timm_vit.pth": [VIT],
    "torchvision_resnet50.pth": [RESNET, TIMM_RESNET, OURS],
    "torchvision_swin_t.pth": [SWIN],
    "lightly.ckpt": [RESNET, TIMM_RESNET, OURS],
    "lightly_vit.ckpt": [VIT | {"options": NARROW}],
    "lightly_cifar.ckpt": [OURS | {"stem": "cifar"}, RESNET | {"stem": "cifar"}],
    "lightly_cifar_benchmark.ckpt": [RESNET | {"model": "resnet18", "stem": "cifar_lightly"}],
    "hf_vit": [VIT | {"options": NARROW}],
    "hf_vit_in_memory.pth": [VIT | {"options": NARROW}],
    "hf_vit_classifier": [VIT | {"options": NARROW}],
    "hf_resnet": [TIMM_RESNET, RESNET, OURS],
    "hf_convnext": [CONVNEXT, {"name": "torchvision", "model": "convnext_tiny"}],
    "hf_swin": [{"name": "timm", "model": "swin_tiny_patch4_window7_224"}, SWIN],
}
CASES = [(name, encoder) for name, encoders in ENCODERS.items() for encoder in encoders]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    make_environment(folder, PACKAGES)(foreign_writers.__file__, str(folder))
    return folder


@pytest.mark.parametrize(("name", "encoder"), CASES)
def test_a_state_dict_gives_the_features_of_the_library_that_wrote_it(
    name: str, encoder: dict[str, Any], written: Path
) -> None:
    expected: Tensor = torch.load(written / "features.pth", weights_only=True)[name]
    x = foreign_writers.images(name)
    tree = {
        "name": "t",
        "data": {"train": "x"},
        "augment": {"size": x.shape[-1]},
        "encoder": encoder,
        "init": {"weights": str(written / name), **NO_SHIFT},
    }
    experiment = resolve_init(cfg.validate(Experiment, tree))
    model = build_model(experiment).eval()
    load_init(model, experiment)
    with torch.no_grad():
        h = model.encoder(x)
    assert (h - expected).norm() < TOLERANCE * expected.norm()
    line = init_line(experiment)
    assert len(line.splitlines()) == 1
    assert len(line) < 500
