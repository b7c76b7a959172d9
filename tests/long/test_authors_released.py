"""Weights as TensorFlow stores the authors' network give the features that TensorFlow computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from simclr_ray import config as cfg
from simclr_ray.augment.decode import DEFAULT_DECODER
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.source import Source
from simclr_ray.inference.encoder import EvaluationTransform
from simclr_ray.nn.build import build_model
from simclr_ray.nn.pretrained import load_init
from tests.long.environments import bare_environment

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

SIZE, NUM_IMAGES = 96, 4
TOLERANCE = 1e-5  # of the largest feature
ENCODERS: dict[str, dict[str, float]] = {
    "r18": {"depth": 18},
    "r50": {"depth": 50},
    "r50_sk": {"depth": 50, "selective_kernel": 0.0625},
}
PROGRAM = Path(__file__).with_name("authors_network.py")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, image_root: Path) -> Path:
    folder = tmp_path_factory.mktemp("authors")
    view = EvaluationTransform(SIZE, DEFAULT_DECODER)
    photographs = Source.open(str(image_root / "caltech101" / "test")).read_group(0).images
    inputs = torch.stack([view(image or b"") for image in photographs[:NUM_IMAGES]])
    np.save(folder / "images.npy", inputs.permute(0, 2, 3, 1).numpy())
    python = bare_environment(folder / "bare", ["tensorflow-cpu"])
    done = subprocess.run(
        [str(python), str(PROGRAM), str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ENCODERS)
def test_an_npz_that_tensorflow_wrote_gives_the_features_of_tensorflow(
    name: str, written: Path
) -> None:
    tree = {
        "name": "t", "data": {"train": "x"}, "augment": {"name": "simclr", "size": SIZE},
        "encoder": {"name": "resnet", "width": 0.25, "stem": "imagenet_same", **ENCODERS[name]},
        "init": {"weights": str(written / f"{name}.npz")},
    }  # fmt: skip
    run = cfg.validate(Experiment, tree)
    model = build_model(run).eval()
    load_init(model, run)
    images = torch.from_numpy(np.load(written / "images.npy")).permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        h = model.encoder(images).numpy()
    want = np.load(written / f"{name}-features.npy")
    difference = float(np.abs(h - want).max() / np.abs(want).max())
    sys.stdout.write(f"{name}: at most {difference:.1e} of the largest feature\n")
    assert difference < TOLERANCE
    assert np.abs(want[0] - want[1]).max() > 100 * TOLERANCE * np.abs(want).max()
