"""The registry on a real server, and a registered model in an environment of its own."""

from __future__ import annotations

import io
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from simclr_ray import config as cfg
from simclr_ray.config.experiment import ResNetConfig, TrackingConfig
from simclr_ray.errors import ConfigError
from simclr_ray.inference import embed, promotion, registry
from simclr_ray.inference import encoder_files as export
from simclr_ray.inference.encoder import Encoder
from simclr_ray.inference.encoder_folder import encoder_folder
from simclr_ray.nn.build import build_encoder
from simclr_ray.tracking.runs import TrackedRun, Tracker
from tests.mlflow_server import between

CONFIG = ResNetConfig(depth=10, width=0.25, stem="cifar")
SIZE = 32
TOLERANCE = 1e-5  # float32 features of order 1

EMBED = """
import pathlib, sys
import mlflow, numpy, pandas

mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/m@newest")
image = pathlib.Path("image.png").read_bytes()
numpy.save("got.npy", model.predict(pandas.DataFrame({"image": [image]})))
"""


def image() -> bytes:
    pixels = np.random.default_rng(5).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def register_one(tracker: Tracker, folder: Path) -> TrackedRun:
    torch.manual_seed(0)
    encoder = build_encoder(CONFIG)
    export.write_encoder(
        folder, Encoder(encoder, config=cfg.to_tree(CONFIG), size=SIZE, feature_dim=128)
    )
    run = tracker.start_run("run", params={"a.b": 1, "empty": ""}, tags={"digest": "abc"})
    registry.register_encoder(
        folder, run, name="m", alias="newest", example=image(), tags={"seed": 0}
    )
    return run


@pytest.mark.slow
def test_mlflow_gc_frees_the_files_of_a_version_that_was_removed(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    register_one(Tracker.open(TrackingConfig(uri=uri), str(tmp_path)), tmp_path / "e")
    assert promotion.remove_version("models:/m/1", force=True, tracking_uri=uri) == 1
    assert len(list(tmp_path.rglob("MLmodel"))) == 1
    command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", uri]
    environment = os.environ | {"MLFLOW_TRACKING_URI": uri}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert not list(tmp_path.rglob("MLmodel"))


@pytest.mark.slow
def test_a_real_server_gives_back_runs_metrics_artifacts_and_the_model(
    mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = register_one(
        Tracker.open(TrackingConfig(uri=mlflow_server), "s3://never/touched"), tmp_path / "e"
    )
    run.log_metrics({"train/loss": 1.0, "nan": math.nan, "up": math.inf}, 0)
    run.log_dataset("cifar10", "s3://bucket/x", "f" * 64, 10, "train")
    run.log_text("hello", "notes/a.txt")

    again = TrackedRun.attach(mlflow_server, run.run_id)
    again.log_metrics({"train/loss": 9.0}, 0)
    again.log_metrics({"train/loss": 0.5}, 1)
    again.finish("FINISHED")

    client = MlflowClient(tracking_uri=mlflow_server)
    history = client.get_metric_history(run.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(0, 1.0), (1, 0.5)]
    stored = client.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert math.isnan(stored.data.metrics["nan"])
    assert stored.data.params["a.b"] == "1"
    assert list((tmp_path / "served").rglob("a.txt"))

    want = embed.embed_images(tmp_path / "e", [image()])
    for where in ("models:/m@newest", "models:/m/1", "models:/m/latest"):
        got = embed.embed_images(where, [image()], tracking_uri=mlflow_server)
        np.testing.assert_array_equal(got, want)
    assert not list((tmp_path / "elsewhere").iterdir())  # nothing falls into the working directory


@pytest.mark.long
def test_a_registered_model_embeds_in_an_environment_of_only_its_own_requirements(
    tmp_path: Path,
) -> None:
    # `make` puts uv beside this interpreter, whatever PATH says
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        # a developer's own environment; pip alone would resolve and fetch torch anew
        pytest.skip("uv is not installed: this test makes an environment with it")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run = register_one(Tracker.open(TrackingConfig(uri=uri), "unused"), tmp_path / "e")
    version = MlflowClient(tracking_uri=uri).get_model_version("m", "1")
    assert version.run_id == run.run_id
    requirements = Path(str(version.source).removeprefix("file://")) / "requirements.txt"

    def uv_does(*arguments: str) -> str:
        done = subprocess.run(
            [str(uv), *arguments], capture_output=True, text=True, check=False, timeout=550
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    python = tmp_path / "venv" / "bin" / "python"
    uv_does("venv", "--python", sys.executable, str(tmp_path / "venv"))
    uv_does("pip", "install", "--python", str(python), "-r", str(requirements))
    names = {
        line.split("==")[0] for line in uv_does("pip", "freeze", "--python", str(python)).split()
    }
    assert not names & {"ray", "simclr-ray", "torchvision", "safetensors"}

    (tmp_path / "image.png").write_bytes(image())
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [str(python), "-c", EMBED, uri], cwd=tmp_path, env=environment, check=True, timeout=500
    )
    want = embed.embed_images(tmp_path / "e", [image()])
    np.testing.assert_allclose(np.load(tmp_path / "got.npy"), want, rtol=0, atol=TOLERANCE)


def test_a_model_that_is_not_there_is_refused_with_what_is(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    register_one(Tracker.open(TrackingConfig(uri=uri), "unused"), tmp_path / "e")
    for where, told in {
        "models:/x@newest": "there is no registered model 'x'; the store has: m",
        "models:/x/1": "there is no registered model 'x'",
        "models:/m@best": "m has the versions 1, aliases newest",
        "models:/m/7": "m has the versions 1, aliases newest",
    }.items():
        with pytest.raises(ConfigError, match=told):
            embed.embed_images(where, [image()], tracking_uri=uri)


@pytest.mark.slow
def test_the_weights_of_a_version_go_up_once_and_come_back_whole(
    mlflow_server: str, tmp_path: Path
) -> None:
    with between(mlflow_server) as proxy:
        tracker = Tracker.open(TrackingConfig(uri=proxy.uri), "unused")
        register_one(tracker, tmp_path / "e")
        weights = (tmp_path / "e" / export.WEIGHTS).stat().st_size
        program = (tmp_path / "e" / export.PROGRAM).stat().st_size
        sys.stdout.write(f"{proxy.bytes_up} bytes up; weights {weights}, program {program}\n")
        assert weights <= program  # which holds them, and says what is done with them
        assert proxy.bytes_up < program + 0.25 * weights  # and the source that decodes
        fetched = fetch(proxy.uri, tmp_path / "fetched")
    for name in (export.WEIGHTS, export.PROGRAM):
        assert (fetched / name).read_bytes() == (tmp_path / "e" / name).read_bytes()
    export.read_encoder(fetched)


def fetch(uri: str, scratch: Path) -> Path:
    scratch.mkdir()
    with encoder_folder("models:/m/1", scratch, uri) as folder:
        return folder
