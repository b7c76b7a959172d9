"""A fine-tuned classifier goes out and comes back whole: files, registry, MLflow's own loading."""

from __future__ import annotations

import base64
import io
import json
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from simclr_ray import config as cfg
from simclr_ray.augment.decode import image_decoder
from simclr_ray.cli.app import app
from simclr_ray.config.experiment import Experiment, TrackingConfig
from simclr_ray.errors import CheckpointError
from simclr_ray.inference import encoder_files, registry
from simclr_ray.inference.embed import load_encoder
from simclr_ray.inference.encoder import Classifier, Encoder, EvaluationTransform
from simclr_ray.inference.export import export_encoder
from simclr_ray.nn.build import build_model
from simclr_ray.optim import build_optimizer
from simclr_ray.storage import checkpoint
from simclr_ray.tracking.runs import Tracker

NAMES = ["cat", "dog", "big bird"]
SIZE = 40
TOLERANCE = 1e-5  # float32: kernels of the programs may be fused differently


class Trained(NamedTuple):
    checkpoint: Path
    classifier: Classifier
    images: list[bytes]


def png(seed: int) -> bytes:
    rng = np.random.default_rng(seed)  # a color of its own, and noise: classes that differ
    color, noise = rng.integers(0, 200, (1, 1, 3)), rng.integers(0, 56, (50, 60, 3))
    pixels = (color + noise).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def checkpointed(folder: Path, names: list[str], layers: int = 1) -> Path:
    """Write a checkpoint of a classifier whose weights are all away from their start."""
    tree = {
        "name": "tuned",
        "batch_size": 8,
        "epochs": 1,
        "encoder": {"name": "resnet", "depth": 10, "width": 0.25, "stem": "cifar"},
        "head": {"name": "classifier", "num_classes": 3, "layers": layers, "hidden": 16},
        "loss": {"name": "cross_entropy"},
        "augment": {"name": "simclr", "size": SIZE},
        "data": {"train": "unread"},
    }
    run = cfg.validate(Experiment, tree)
    torch.manual_seed(0)
    model = build_model(run)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.train()(torch.rand(8, 3, SIZE, SIZE))
        view = EvaluationTransform(SIZE, image_decoder(3, 0))
        scores = model.eval()(torch.stack([view(png(seed)) for seed in range(5)])).z
        model.head[-1].bias.sub_(scores.mean(0))  # type: ignore[index] # no class always wins
    tensors = checkpoint.pack(model, build_optimizer(model, run.optimizer))
    record = {
        "experiment": cfg.to_tree(run), "digest": "d", "fingerprint": "f", "class_names": names,
    }  # fmt: skip
    target = folder / checkpoint.new_name(1)
    checkpoint.write(target, 1, tensors, record)
    return target


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    kept = checkpointed(tmp_path_factory.mktemp("run"), NAMES)
    loaded = load_encoder(kept)
    assert isinstance(loaded, Classifier)
    return Trained(kept, loaded, [png(seed) for seed in range(5)])


def expected(trained: Trained) -> Any:
    """Return the probabilities by hand: the model of the checkpoint on views stacked by hand."""
    kept = checkpoint.read(trained.checkpoint)
    model = build_model(cfg.validate(Experiment, kept.record["experiment"]))
    checkpoint.restore_model(kept.tensors, model)
    views = torch.stack([trained.classifier.transform(image) for image in trained.images])
    with torch.no_grad():
        return model.eval()(views).z.softmax(1).numpy()


def test_the_checkpoint_of_a_classifier_predicts_as_it_was_trained(trained: Trained) -> None:
    want = expected(trained)
    assert len(set(want.argmax(1))) > 1  # it tells some apart
    np.testing.assert_allclose(
        trained.classifier.predict_proba(trained.images), want, rtol=0, atol=TOLERANCE
    )
    assert trained.classifier.predict(trained.images) == [NAMES[k] for k in want.argmax(1)]


@pytest.mark.parametrize("names", [[], ["cat"]])
def test_classes_without_names_are_numbers(tmp_path: Path, names: list[str]) -> None:
    loaded = load_encoder(checkpointed(tmp_path, names, layers=0))
    assert isinstance(loaded, Classifier)
    assert (
        loaded.class_names == (*names, "0", "1", "2")[: len(names)] + ("0", "1", "2")[len(names) :]
    )


def test_its_files_and_their_copies_hold_the_classifier(trained: Trained, tmp_path: Path) -> None:
    want = trained.classifier.predict_proba(trained.images)
    made = export_encoder(trained.checkpoint, tmp_path / "files")
    assert set(made) == {
        "encoder.json", "model.safetensors", "encoder.pt2",
        "classifier.safetensors", "classifier.pt2",
    }  # fmt: skip
    assert set(export_encoder(tmp_path / "files", tmp_path / "copy", ["safetensors"])) == set(
        made
    ) - {"encoder.pt2"}
    for folder in (tmp_path / "files", tmp_path / "copy"):
        loaded = load_encoder(folder)
        assert isinstance(loaded, Classifier)
        assert loaded.class_names == tuple(NAMES)
        np.testing.assert_array_equal(loaded.predict_proba(trained.images), want)
    views = torch.stack([trained.classifier.transform(image) for image in trained.images])
    programs = [
        torch.export.load(tmp_path / "files" / name).module()
        for name in ("encoder.pt2", "classifier.pt2")
    ]
    with torch.no_grad():
        got = programs[1](programs[0](views)).softmax(1)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


def test_what_holds_the_encoder_without_its_classifier_is_said(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export_encoder(trained.checkpoint, tmp_path / "files", ["torch-export", "onnx"])
    assert "without the classifier, which lies in classifier.pt2: onnx" in caplog.text


def test_a_folder_that_held_a_classifier_holds_none_after_an_encoder_took_its_place(
    trained: Trained, tmp_path: Path
) -> None:
    export_encoder(trained.checkpoint, tmp_path / "files")
    plain = trained.classifier
    alone = Encoder(
        plain.network, config=plain.config, size=SIZE, feature_dim=plain.feature_dim
    ).eval()
    encoder_files.write_encoder(tmp_path / "alone", alone)
    export_encoder(tmp_path / "alone", tmp_path / "files")
    assert not list((tmp_path / "files").glob("classifier*"))
    assert type(load_encoder(tmp_path / "files")) is Encoder


@pytest.mark.parametrize("wrong", ["missing", "altered", "other classes"])
def test_a_classifier_that_does_not_fit_is_refused(
    trained: Trained, tmp_path: Path, wrong: str
) -> None:
    encoder_files.write_encoder_of(trained.checkpoint, tmp_path / "e")
    weights = tmp_path / "e" / encoder_files.CLASSIFIER_WEIGHTS
    if wrong == "missing":  # and not in a program either, from which they would be written again
        weights.unlink()
        (tmp_path / "e" / encoder_files.CLASSIFIER_PROGRAM).unlink()
    elif wrong == "altered":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    else:
        card = json.loads((tmp_path / "e" / encoder_files.CARD).read_text())
        card["classifier"]["head"]["num_classes"] = 4
        (tmp_path / "e" / encoder_files.CARD).write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=r"is not the file|do not fit"):
        load_encoder(tmp_path / "e")


class Registered(NamedTuple):
    uri: str
    model: Any  # MLflow's pyfunc


@pytest.fixture(scope="module")
def registered(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Registered:
    import mlflow

    base = tmp_path_factory.mktemp("registry")
    encoder_files.write_encoder_of(trained.checkpoint, base / "encoder")
    tracker = Tracker.open(TrackingConfig(uri=f"sqlite:///{base}/mlflow.db"), "unused")
    registry.register_encoder(
        base / "encoder", tracker.start_run("run", params={}, tags={}), name="animals",
        alias="newest", example=trained.images[0], tags={},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
        warnings.simplefilter("ignore")  # MLflow's and its dependencies'
        return Registered(tracker.uri, mlflow.pyfunc.load_model("models:/animals@newest"))


def test_a_registered_classifier_names_classes_and_comes_back_as_one(
    trained: Trained, registered: Registered
) -> None:
    table = registered.model.predict(pd.DataFrame({"image": trained.images}))
    assert list(table) == ["label", "p(cat)", "p(dog)", "p(big bird)"]
    want = trained.classifier.predict_proba(trained.images)
    np.testing.assert_allclose(table.iloc[:, 1:].to_numpy(), want, rtol=0, atol=TOLERANCE)
    assert list(table["label"]) == trained.classifier.predict(trained.images)
    outputs = registered.model.metadata.signature.outputs
    assert outputs.input_names() == list(table)
    back = load_encoder("models:/animals@newest", tracking_uri=registered.uri)
    assert isinstance(back, Classifier)
    np.testing.assert_array_equal(back.predict_proba(trained.images), want)


def test_bytes_base64_and_paths_are_one_image_and_a_batch_size_changes_nothing(
    trained: Trained, registered: Registered, tmp_path: Path
) -> None:
    image = trained.images[0]
    (tmp_path / "a b.png").write_bytes(image)
    text = base64.b64encode(image).decode()
    given = [
        image,
        bytearray(image),
        text.encode(),
        text,
        f"data:image/png;base64,{text}",
        tmp_path / "a b.png",
    ]
    tables = [
        registered.model.predict(pd.DataFrame({"image": given}), params=params)
        for params in (None, {"batch_size": 1}, {"batch_size": 2}, {"batch_size": 100})
    ]
    want = trained.classifier.predict_proba([image] * len(given))
    for table in tables:
        np.testing.assert_allclose(table.iloc[:, 1:].to_numpy(), want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["/etc/hostname"], "row 0: '/etc/hostname' is no base64 of an image; a path is given as"),
        ([Path("no/such.png")], "row 0: .*No such file"),
        ([b"no image"], "row 0: not an image"),
        (["x" * 5000], "row 0: 'x+...' is no base64"),
        (
            [png(0), 3.5],
            "row 1: expected an image as bytes, base64 text or pathlib.Path; got float",
        ),
        ([None], "got NoneType"),
        ([png(0)[:500]], "row 0: truncated"),
    ],
)
def test_what_is_no_image_is_named_by_its_row(
    registered: Registered, given: list[Any], message: str
) -> None:
    table = pd.DataFrame({"image": pd.Series(given, dtype=object)})
    with pytest.raises(ValueError, match=message):
        registered.model.predict(table)


def test_a_batch_size_of_nothing_is_refused(registered: Registered) -> None:
    with pytest.raises(ValueError, match="batch_size=0; it must be at least 1"):
        registered.model.predict(pd.DataFrame({"image": [png(0)]}), params={"batch_size": 0})


def test_an_exported_folder_can_be_moved(trained: Trained, tmp_path: Path) -> None:
    export_encoder(trained.checkpoint, tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    loaded = load_encoder(tmp_path / "b")
    assert isinstance(loaded, Classifier)
    assert loaded.predict([]) == []


def test_predict_prints_the_class_of_each_file(
    trained: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good, broken, missing = (tmp_path / name for name in ("good.png", "broken.png", "missing.png"))
    good.write_bytes(trained.images[0])
    broken.write_bytes(b"no image")
    done = CliRunner().invoke(
        app, ["predict", str(trained.checkpoint), *map(str, (missing, good, broken, good))]
    )
    assert done.exit_code == 1
    shown = capfd.readouterr()
    rows = [line.split("\t") for line in (done.stdout + shown.out).splitlines()]
    probability = trained.classifier.predict_proba(trained.images[:1]).max()
    want = [str(good), *trained.classifier.predict(trained.images[:1]), f"{probability:.4f}"]
    assert rows == [want, want]
    left_out = (done.stderr + shown.err).splitlines()
    assert [line.split(": ")[1] for line in left_out] == [str(missing), str(broken)]


def test_a_checkpoint_that_names_more_classes_than_it_has_is_refused(tmp_path: Path) -> None:
    kept = checkpointed(tmp_path, [*NAMES, "jan"])
    with pytest.raises(CheckpointError, match="names 4 classes and its classifier has 3") as raised:
        load_encoder(kept)
    assert "\n" not in str(raised.value)
