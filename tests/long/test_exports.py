"""What is exported computes the same in the libraries that it is for, of photographs.

They run in an environment of its own, which sees the packages of this one: torch is not downloaded
again, and transformers is no dependency.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from simclr_ray.data.source import Source
from simclr_ray.inference.encoder import Encoder
from simclr_ray.inference.export import export_encoder
from tests.long.environments import make_environment
from tests.long.test_foreign_weights import PACKAGES
from tests.unit.inference.test_export_others import made

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

PROGRAM = Path(__file__).with_name("foreign_readers.py")
NUM_IMAGES = 8
TOLERANCES = {"onnx": 1e-4}  # of the largest feature; of all others:
TOLERANCE = 1e-5
ALL = ["torchvision", "timm", "timm_folder", "transformers", "onnx", "torch_export"]
TIMM = ALL[1:]
VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3}
# encoder, readers, and what the reader has to be told that the file does not say
CASES: dict[str, tuple[dict[str, Any], int, list[str], dict[str, Any]]] = {
    "ours": (
        {"name": "resnet", "depth": 50}, 96, ALL,
        {"torchvision": "resnet50", "timm": "resnet50"},
    ),
    "ours_cifar": (
        {"name": "resnet", "depth": 50, "stem": "cifar"}, 32,
        ["torchvision", "onnx", "torch_export"], {"torchvision": "resnet50", "small_stem": True},
    ),
    "ours_small": (
        {"name": "resnet", "depth": 10, "width": 0.5}, 96, ["onnx", "torch_export"], {},
    ),
    "torchvision_resnet18": (
        {"name": "torchvision", "model": "resnet18"}, 96, ALL,
        {"torchvision": "resnet18", "timm": "resnet18"},
    ),
    "timm_convnext": ({"name": "timm", "model": "convnext_atto"}, 96, TIMM,
        {"timm": "convnext_atto"}),
    "timm_vit": (
        {"name": "timm", "model": "vit_tiny_patch16_224", "options": VIT}, 96, TIMM,
        {"timm": "vit_tiny_patch16_224", "options": VIT | {"img_size": 96}},
    ),
}  # fmt: skip
FORMATS = {
    "torchvision": "torchvision", "timm": "timm", "timm_folder": "huggingface",
    "transformers": "huggingface", "onnx": "onnx", "torch_export": "torch-export",
}  # fmt: skip


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory, image_root: Path) -> Path:
    """Export each encoder, let the others read it, and return the folder."""
    root = tmp_path_factory.mktemp("exports")
    (root / "images").mkdir()
    photographs = Source.open(str(image_root / "caltech101" / "test")).read_group(0).images
    for index, image in enumerate(photographs[:NUM_IMAGES]):
        (root / "images" / f"{index}.jpg").write_bytes(image or b"")
    for name, (tree, size, readers, how) in CASES.items():
        encoder = made(root / "encoders" / name, tree, size=size)
        formats = list(dict.fromkeys(FORMATS[reader] for reader in readers))
        export_encoder(root / "encoders" / name, root / name, formats)
        torch.save(inputs_of(root, encoder), root / name / "inputs.pth")
        with torch.no_grad():
            torch.save(encoder(inputs_of(root, encoder)), root / name / "want.pth")
        every = {"options": {}, "small_stem": False, **how, "readers": readers}
        (root / name / "how.json").write_text(json.dumps(every))
    make_environment(root / "other", PACKAGES)(str(PROGRAM), str(root))
    return root


def inputs_of(root: Path, encoder: Encoder) -> Tensor:
    files = sorted((root / "images").iterdir())
    return torch.stack([encoder.transform(file) for file in files])


@pytest.mark.parametrize(
    ("name", "reader"), [(name, reader) for name, case in CASES.items() for reader in case[2]]
)
def test_a_file_computes_in_its_library_what_the_encoder_does(
    name: str, reader: str, read: Path
) -> None:
    want = torch.load(read / name / "want.pth", weights_only=True)
    got = torch.load(read / name / "features.pth", weights_only=True)[reader]
    assert got.shape == want.shape
    difference = float((got - want).abs().max() / want.abs().max())
    sys.stdout.write(f"{name} by {reader}: at most {difference:.1e} of the largest feature\n")
    assert difference < TOLERANCES.get(reader, TOLERANCE)
    assert float((want[0] - want[1]).abs().max() / want.abs().max()) > 1e-2  # images differ


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if "transformers" in case[2]]
)
def test_the_image_processor_of_a_folder_makes_nearly_the_view_of_the_encoder(
    name: str, read: Path
) -> None:
    """It resizes before it crops, we after: a border and rounding differ."""
    features = torch.load(read / name / "features.pth", weights_only=True)
    views = torch.load(read / name / "inputs.pth", weights_only=True)
    want = torch.load(read / name / "want.pth", weights_only=True)
    assert features["processor"].shape == views.shape
    apart = (features["processor"] - views).abs()
    cosines = torch.nn.functional.cosine_similarity(features["processed"], want).numpy()
    sys.stdout.write(
        f"{name}: pixels {float(apart.mean()):.4f} apart on average, {float(apart.max()):.2f} at "
        f"most; cosines of the features from {np.min(cosines):.4f}\n"
    )
    assert float(apart.mean()) < 0.025
    assert np.min(cosines) > 0.95  # of random weights, which exaggerate
