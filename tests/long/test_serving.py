"""Registered versions in an environment with nothing but what they name, beside the training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import simclr_ray as sr
from simclr_ray.inference.encoder import Classifier, Encoder
from tests.long import stored_version
from tests.long.environments import bare_environment
from tests.long.photographs import write_photographs

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

CLASSES = ["airplanes", "Faces_easy", "Motorbikes", "watch"]
NUM_IMAGES = 6
TOLERANCE, ONNX_TOLERANCE = 1e-5, 1e-4  # of the largest feature
SMALL = [
    "epochs=2", "batch_size=32", "augment.size=64", "encoder.width=0.25", "data.limit=128",
    "schedule.warmup_epochs=0", "scaling.num_workers=1", "tracking.system_metrics=false",
    "tracking.uri=sqlite:///mlflow.db",
]  # fmt: skip


class Trained(NamedTuple):
    """What was trained and registered, and where."""

    folder: Path
    encoder: Encoder  # of the last checkpoint
    classifiers: dict[str, Classifier]  # by the names of their models


def simclr_ray(folder: Path, *words: str) -> str:
    """Run a verb of ours; return what it prints."""
    environment = os.environ | {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}
    done = subprocess.run(
        [sys.executable, "-m", "simclr_ray", *words],
        cwd=folder, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, image_root: Path) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    write_photographs(image_root, folder / "sorted", CLASSES, 40)
    photographs = sorted((folder / "sorted").rglob("*.jpg"))
    (folder / "images").mkdir()
    for index, file in enumerate(photographs[:: len(photographs) // NUM_IMAGES][:NUM_IMAGES]):
        (folder / "images" / f"{index}.jpg").write_bytes(file.read_bytes())
    # no better than an untrained one after a minute, so it is registered by hand
    simclr_ray(folder, "pretrain", "photos_cpu", "data.train=sorted", "name=photos", *SMALL)
    (run,) = (folder / "runs").glob("photos-*")
    simclr_ray(folder, "model", "register", str(run), "photos", "--force")
    classifiers = {}
    for name, words in {"frozen": ["--frozen"], "whole": ["epochs=2", "batch_size=16"]}.items():
        words += ["--per-class", "10", "data.test="]
        simclr_ray(folder, "model", "finetune", str(run), f"name={name}", *words)
        (tuned,) = (folder / "runs").glob(f"{name}-*")
        simclr_ray(folder, "model", "register", str(tuned), name)
        loaded = sr.load_encoder(tuned)
        assert isinstance(loaded, Classifier)
        classifiers[name] = loaded
    encoder = sr.load_encoder(run)
    inputs = torch.stack([encoder.transform(file) for file in files_of(folder)])
    np.save(folder / "inputs.npy", inputs.numpy())
    return Trained(folder, encoder, classifiers)


def files_of(folder: Path) -> list[Path]:
    return sorted((folder / "images").iterdir())


@pytest.fixture(scope="module")
def python(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment with what the registered versions name, and no more."""
    needed: set[str] = set()
    for file in trained.folder.rglob("requirements.txt"):
        needed |= set(file.read_text().split())
    assert not any(line.startswith(("simclr", "ray")) for line in needed)
    return bare_environment(tmp_path_factory.mktemp("bare"), sorted(needed))


def use(trained: Trained, python: Path, name: str) -> tuple[Any, Any, Any]:
    """Return what pyfunc and the server say of the images, and the program of the inputs."""
    run_in(python, [stored_version.__file__, str(trained.folder), name], trained.folder)
    read = [
        json.loads((trained.folder / f"{name}-{how}.json").read_text())
        for how in ("pyfunc", "served")
    ]
    return read[0], read[1], np.load(trained.folder / f"{name}-program.npy")


def run_in(python: Path, words: Sequence[str], folder: Path) -> None:
    ours = ("PYTHONPATH", "VIRTUAL_ENV", "MLFLOW_TRACKING_URI")
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [str(python), *words], cwd=folder, env=environment | {"PATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def apart(got: Any, want: Any) -> float:
    """Return the largest difference, of the largest number that is wanted."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_pyfunc_server_and_program_give_the_features_of_the_training(
    trained: Trained, python: Path
) -> None:
    want = trained.encoder.embed([file.read_bytes() for file in files_of(trained.folder)])
    for how, got in zip(
        ("pyfunc", "served", "program"), use(trained, python, "photos"), strict=True
    ):
        difference = apart(got, want)
        sys.stdout.write(f"{how}: at most {difference:.1e} of the largest feature\n")
        assert difference < TOLERANCE
    assert apart(want[:1], want[1:2]) > 100 * TOLERANCE


def test_onnx_of_a_version_gives_the_features_of_the_training(
    trained: Trained, tmp_path: Path
) -> None:
    simclr_ray(trained.folder, "export", "models:/photos/1", str(tmp_path / "out"), "--to", "onnx")
    python = bare_environment(tmp_path / "bare", ["onnxruntime", "numpy"])
    program = (
        "import numpy, onnxruntime, sys\n"
        "session = onnxruntime.InferenceSession(sys.argv[1])\n"
        "(h,) = session.run(None, {'images': numpy.load(sys.argv[2])})\n"
        "numpy.save(sys.argv[3], h)\n"
    )
    words = [tmp_path / "out" / "encoder.onnx", trained.folder / "inputs.npy", tmp_path / "h.npy"]
    run_in(python, ["-c", program, *map(str, words)], tmp_path)
    want = trained.encoder.embed(files_of(trained.folder))
    difference = apart(np.load(tmp_path / "h.npy"), want)
    sys.stdout.write(f"onnx: at most {difference:.1e} of the largest feature\n")
    assert difference < ONNX_TOLERANCE


@pytest.mark.parametrize("name", ["frozen", "whole"])
def test_a_classifier_names_classes_by_predict_pyfunc_and_a_server(
    name: str, trained: Trained, python: Path
) -> None:
    classifier, files = trained.classifiers[name], files_of(trained.folder)
    assert list(classifier.class_names) == sorted(CLASSES)
    named, probabilities = classifier.predict(files), classifier.predict_proba(files)
    by_pyfunc, by_server, program = use(trained, python, name)
    for rows in (by_pyfunc, by_server):
        assert [row["label"] for row in rows] == list(named)
        got = [[row[f"p({c})"] for c in classifier.class_names] for row in rows]
        assert np.abs(np.array(got) - probabilities).max() < TOLERANCE
    assert apart(program, classifier.embed(files)) < TOLERANCE
    for where in (f"models:/{name}/1", str(next((trained.folder / "runs").glob(f"{name}-*")))):
        printed = simclr_ray(trained.folder, "predict", where, *map(str, files))
        assert [line.split("\t")[1] for line in printed.splitlines()] == list(named)
