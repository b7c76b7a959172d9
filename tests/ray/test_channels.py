"""Images that are no RGB, from files to a registered encoder and back."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from simclr_ray import config as cfg
from simclr_ray.augment.decode import evaluation_view
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.prepare import prepare
from simclr_ray.inference.embed import embed_images, load_encoder
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.train.pipeline import run_pipeline

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_IMAGES, SIDE, SIZE = 24, 40, 40  # above 32 px: evaluation crops and resizes
BRIGHT = np.array([300, 4000, 12000, 65535])  # of each of four bands


def drawn(index: int, channels: int) -> NDArray[np.uint16]:
    """Return smooth waves that differ by image, channel and class: uint16 [H, W, C]."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    rng = np.random.default_rng(index)
    waves = [
        0.5 + 0.5 * np.sin(6.3 * (x if index % 2 else y) * (1 + c) + rng.uniform(0, 6.3))
        for c in range(channels)
    ]
    values: NDArray[np.uint16] = np.rint(np.stack(waves, 2) * BRIGHT[:channels]).astype(np.uint16)
    return values


def npy(values: NDArray[Any]) -> bytes:
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


def png_16(values: NDArray[np.uint16]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(values[..., 0] * np.uint16(10)).save(out, "PNG")  # up to 3000 of 65535
    return out.getvalue()


def scaled(values: NDArray[np.uint16], white: Any, ending: str) -> NDArray[np.uint8]:
    """Return values as bytes; halves fall as the decoder's division has them."""
    level = values * np.uint16(10) if ending == "png" else values
    pixels: NDArray[np.uint8] = np.minimum(np.round(level / (np.array(white) / 255)), 255).astype(
        np.uint8
    )
    return pixels


@pytest.mark.parametrize(
    ("ending", "channels", "white"),
    [("npy", 4, [300, 4000, 12000, 65535]), ("png", 1, 3000)],
    ids=["four bands", "gray of 16 bits"],
)
def test_other_channels_go_from_files_to_a_registered_encoder_and_back(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ray_cluster: str,
    ending: str,
    channels: int,
    white: Any,
) -> None:
    files = tmp_path / "files"
    encoded = []
    for index in range(NUM_IMAGES):
        values = drawn(index, channels)
        image = npy(values) if ending == "npy" else png_16(values)
        folder = files / f"class_{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:02}.{ending}").write_bytes(image)
        encoded.append(image)
    manifest = prepare(str(files), str(tmp_path / "shards"))
    assert manifest.num_rows == NUM_IMAGES
    assert not manifest.rejected

    data = str(tmp_path / "shards")
    tree = {
        "name": "c",
        "data": {"train": data, "test": data, "channels": channels, "white": "auto"},
        "augment": {"name": "simclr", "size": SIZE, "blur": 0.5},
        "encoder": {"name": "resnet", "depth": 10, "width": 0.125, "stem": "strided"},
        "head": {"name": "mlp", "dim": 16},
        "batch_size": 12,
        "epochs": 1,
        "evaluation": {"linear": {"epochs": 2}},
        "scaling": {"num_workers": 1, "cpus_per_worker": 0.5, "cpus_per_data_actor": 0.3},
        "tracking": {"log_every_steps": 1, "system_metrics": False},
        "registry": {"name": "channels", "alias": "newest"},
        "storage": str(tmp_path / "runs"),
    }
    outcome = run_pipeline(cfg.validate(Experiment, tree))
    store = RunRecord.read(RunFolder.at(outcome.run.folder)).tracking_uri
    card = json.loads((Path(outcome.run.folder) / "encoder" / "encoder.json").read_text())
    assert card["channels"] == channels
    assert card["white"] == pytest.approx(white, rel=0.02)  # what `auto` found
    assert outcome.scores[-1].name == "raw pixels"

    where = "models:/channels@newest"
    network = load_encoder(where, tracking_uri=store)
    pixels = [scaled(drawn(i, channels), card["white"], ending) for i in range(NUM_IMAGES)]
    views = np.stack([evaluation_view(p, SIZE) for p in pixels])
    with torch.inference_mode():
        own = network(torch.from_numpy(views).permute(0, 3, 1, 2) / 255).numpy()
    assert np.allclose(embed_images(where, encoded, tracking_uri=store), own, atol=1e-5)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    served = mlflow.pyfunc.load_model(where).predict(pd.DataFrame({"image": encoded}))
    assert np.allclose(served, own, atol=1e-5)
