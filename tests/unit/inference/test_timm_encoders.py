"""Encoders of timm are exported, read back, and run where neither timm nor simclr_ray is."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.inference import encoder_files
from simclr_ray.nn.build import build_model, feature_dim
from simclr_ray.optim import build_optimizer
from simclr_ray.storage import checkpoint

SIZE = 32
DROPS = {"drop_path_rate": 0.3, "proj_drop_rate": 0.1}
ENCODERS: dict[str, dict[str, Any]] = {
    "mobilenet": {"model": "mobilenetv3_small_050"},
    "vit of any size": {
        "model": "vit_small_patch16_224",
        "options": {"depth": 2, "embed_dim": 32, "num_heads": 2, "dynamic_img_size": True, **DROPS},
        "freeze_patch_embedding": True,
    },
    "convnext": {
        "model": "convnext_tiny",
        "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "drop_path_rate": 0.3},
    },
}


def experiment(name: str) -> Experiment:
    tree = {
        "name": "t",
        "data": {"train": "x"},
        "augment": {"size": SIZE},
        "encoder": {"name": "timm", **ENCODERS[name]},
        "evaluation": {"size": 48 if name == "vit of any size" else 0},
    }
    return cfg.validate(Experiment, tree)


ALONE = """
    import sys
    for name in ("timm", "simclr_ray", "ray"):
        sys.modules[name] = None
    import numpy as np, torch
    folder = sys.argv[1]
    images = torch.from_numpy(np.load(f"{folder}/images.npy"))
    program = torch.export.load(f"{folder}/e/encoder.pt2").module()
    with torch.inference_mode():
        np.save(f"{folder}/features.npy", program(images).numpy())
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_a_checkpoint_becomes_an_encoder_that_needs_no_timm(name: str, tmp_path: Path) -> None:
    run = experiment(name)
    model = build_model(run)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        model.train()(torch.rand(4, 3, SIZE, SIZE))
    tensors = checkpoint.pack(model, build_optimizer(model, run.optimizer))
    record = {"experiment": cfg.to_tree(run), "digest": "d", "fingerprint": "f", "class_names": []}
    checkpoint.write(tmp_path / checkpoint.new_name(1), 1, tensors, record)
    encoder_files.write_encoder_of(next(tmp_path.glob("step-*")), tmp_path / "e")
    read = encoder_files.load_folder(tmp_path / "e")
    assert read.feature_dim == feature_dim(model.encoder)
    images = torch.rand(3, 3, read.size, read.size)
    with torch.no_grad():
        expected = model.encoder.eval()(images).numpy()
        np.testing.assert_allclose(read(images).numpy(), expected, rtol=0, atol=1e-5)
    np.save(tmp_path / "images.npy", images.numpy())
    command = [sys.executable, "-c", textwrap.dedent(ALONE), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    got = np.load(tmp_path / "features.npy")
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
