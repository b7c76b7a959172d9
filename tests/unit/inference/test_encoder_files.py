"""The exported encoder, its registry version, and what loads back from either."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import textwrap
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from simclr_ray import config as cfg
from simclr_ray.augment import decode
from simclr_ray.augment.decode import image_decoder
from simclr_ray.cli.app import app
from simclr_ray.config.experiment import (
    ImportedEncoderConfig,
    ResNetConfig,
    TorchvisionConfig,
    TrackingConfig,
)
from simclr_ray.config.imports import PERMISSION
from simclr_ray.errors import CheckpointError, ConfigError
from simclr_ray.inference import embed, mlflow_model, registry
from simclr_ray.inference import encoder_files as export
from simclr_ray.inference.encoder import Encoder
from simclr_ray.inference.export_formats import FORMATS
from simclr_ray.nn.build import build_encoder
from simclr_ray.storage import provenance
from simclr_ray.storage.provenance import code_commit
from simclr_ray.tracking import store as mlflow_store
from simclr_ray.tracking.runs import Tracker
from simclr_ray.tracking.store import RegisteredEncoder
from tests.outside.own_components import NUMPY, WRONG

Embeddings = npt.NDArray[np.float32]

CONFIG = ResNetConfig(depth=10, width=0.25, stem="cifar")
SIZE = 48  # above 32, so the evaluation view crops and resizes
WHITE = 4095  # of images with more than 8 bits
# float32: kernels of the program may be fused differently; features are of order 1.
TOLERANCE = 1e-5


class Registered(NamedTuple):
    uri: str
    encoder: nn.Module
    folder: Path
    version: RegisteredEncoder
    images: list[bytes]


def image(seed: int, height: int = 40, width: int = 50, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def deep_image(seed: int) -> bytes:
    """Return gray of 12 bits in a file of 16."""
    values = np.random.default_rng(seed).integers(0, WHITE + 1, (40, 50)).astype(np.uint16)
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    return out.getvalue()


def trained_encoder(config: ResNetConfig | TorchvisionConfig = CONFIG) -> nn.Module:
    """Return an encoder whose weights and running statistics are all away from their start."""
    torch.manual_seed(0)
    encoder = build_encoder(config, size=SIZE)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        encoder.train()
        for _ in range(3):
            encoder(torch.rand(8, 3, SIZE, SIZE))
    return encoder


def module_embeddings(encoder: nn.Module, images: list[bytes]) -> Embeddings:
    """Return what the module in memory gives for the evaluation views: the oracle of this file."""
    views = [decode.evaluation_view(decode.decode_image(i, white=WHITE), SIZE) for i in images]
    batch = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        embeddings: Embeddings = encoder.eval()(batch).numpy()
    return embeddings


def write(folder: Path, encoder: nn.Module) -> None:
    made = Encoder(
        encoder,
        config=cfg.to_tree(CONFIG),
        size=SIZE,
        feature_dim=feature_dim(encoder),
        decoder=image_decoder(3, WHITE),
    )
    export.write_encoder(folder, made)


def feature_dim(encoder: nn.Module) -> int:
    with torch.no_grad():
        return int(encoder.eval()(torch.rand(1, 3, SIZE, SIZE)).shape[1])


def predict(uri: str, where: str, images: list[bytes]) -> Embeddings:
    """Return what the pyfunc model gives, loaded as a stranger would: by the global URI."""
    import mlflow

    # mlflow.set_tracking_uri sets the variable for good, to MLflow's default when it is set back
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        warnings.simplefilter("ignore")  # MLflow's and its dependencies'
        model = mlflow.pyfunc.load_model(where)
    embeddings = model.predict(pd.DataFrame({"image": images}))
    assert isinstance(embeddings, np.ndarray)
    return embeddings


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Registered:
    base = tmp_path_factory.mktemp("export")
    encoder = trained_encoder()
    write(base / "best", encoder)
    tracker = Tracker.open(TrackingConfig(uri=f"sqlite:///{base}/mlflow.db"), "unused")
    of_a_trial = {"study": "losses", "trial": "t-1"}
    run = tracker.start_run("run", params={"seed": 3}, tags=of_a_trial)
    images = [image(1), image(2, 30, 64, "JPEG"), image(3, 100, 50, "WEBP"), deep_image(4)]
    tags: dict[str, str | int | float] = {"dataset_fingerprint": "f" * 64, "knn_top1": 0.5}
    version = registry.register_encoder(
        base / "best", run, name="m", alias="newest", example=images[0], tags=tags
    )
    return Registered(tracker.uri, encoder, base / "best", version, images)


def test_the_folder_holds_weights_a_card_and_a_program_and_nothing_pickled(
    registered: Registered,
) -> None:
    folder = registered.folder
    assert {p.name for p in folder.iterdir()} == {export.WEIGHTS, export.CARD, export.PROGRAM}
    with zipfile.ZipFile(folder / export.PROGRAM) as archive:
        for item in archive.infolist():  # torch.save archives and pickles end so; this one is empty
            assert not item.filename.endswith((".pt", ".pkl")) or item.file_size == 0
    card = json.loads((folder / export.CARD).read_text())
    assert card["encoder"] == cfg.to_tree(CONFIG)
    assert (card["format"], card["size"]) == (1, SIZE)
    assert set(card["versions"]) >= set(export.REQUIREMENTS)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_program_computes_what_the_module_computes_for_any_batch(
    registered: Registered, n: int
) -> None:
    images = torch.rand(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(n))
    program = torch.export.load(registered.folder / export.PROGRAM).module()
    with torch.no_grad():
        got, want = program(images), registered.encoder.eval()(images)
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)


def test_the_encoder_reads_back_to_the_last_bit_in_eval_mode(registered: Registered) -> None:
    back = export.read_encoder(registered.folder)
    assert not back.training
    want = registered.encoder.state_dict()
    got = back.state_dict()
    assert list(got) == list(want)
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_exporting_leaves_the_encoder_in_training_as_it_was(tmp_path: Path) -> None:
    encoder = trained_encoder().double().train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    made = Encoder(encoder, config=cfg.to_tree(CONFIG), size=SIZE, feature_dim=128)
    export.write_encoder(tmp_path / "e", made)
    assert encoder.training
    assert all(p.requires_grad for p in encoder.parameters())
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert next(export.read_encoder(tmp_path / "e").parameters()).dtype == torch.float32


def test_writing_again_replaces_the_folder_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    encoder = trained_encoder()
    write(tmp_path / "e", encoder)
    first = (tmp_path / "e" / export.CARD).read_text()
    with torch.no_grad():
        next(encoder.parameters()).mul_(2)
    write(tmp_path / "e", encoder)
    assert (tmp_path / "e" / export.CARD).read_text() != first
    export.read_encoder(tmp_path / "e")
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def test_a_wrong_feature_width_is_refused_and_nothing_is_kept(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\(1, 128\), not \(1, 64\)"):
        export.write_encoder(
            tmp_path / "e",
            Encoder(trained_encoder(), config=cfg.to_tree(CONFIG), size=SIZE, feature_dim=64),
        )
    assert list(tmp_path.iterdir()) == []


def test_a_format_from_outside_is_written_and_checked_like_ours(tmp_path: Path) -> None:
    encoder = trained_encoder()
    tree, features = cfg.to_tree(CONFIG), feature_dim(encoder)
    own = (*FORMATS, NUMPY)
    made = Encoder(encoder, config=tree, size=SIZE, feature_dim=features)
    export.write_encoder(tmp_path / "own", made, own)
    with np.load(tmp_path / "own" / NUMPY.file) as stored:
        assert set(stored.files) == set(encoder.state_dict())
    assert {f.file for f in own} < {p.name for p in (tmp_path / "own").iterdir()}
    with pytest.raises(CheckpointError, match="the exported doubled differs from the module by"):
        export.write_encoder(tmp_path / "no", made, [WRONG])
    assert not (tmp_path / "no").exists()


def test_an_imported_encoder_is_read_back_without_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "tests.outside.own_components:small_net"
    monkeypatch.setenv(PERMISSION, path)
    config = ImportedEncoderConfig(path=path)
    encoder = build_encoder(config, size=SIZE).eval()
    made = Encoder(encoder, config=cfg.to_tree(config), size=SIZE, feature_dim=8)
    export.write_encoder(tmp_path / "own", made)
    monkeypatch.delenv(PERMISSION)
    images = torch.rand(3, 3, SIZE, SIZE)
    with torch.no_grad():
        read = export.read_encoder(tmp_path / "own")(images)
        assert torch.allclose(read, encoder(images), rtol=1e-4, atol=1e-6)
        # and within an encoder, which is put into eval mode
        assert torch.equal(export.load_folder(tmp_path / "own").train().eval()(images), read)


def test_altered_weights_are_refused(tmp_path: Path, registered: Registered) -> None:
    folder = copied(registered.folder, tmp_path / "e")
    raw = bytearray((folder / export.WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (folder / export.WEIGHTS).write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"is not the file"):
        export.read_encoder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "has format 99"),
        ({"surprise": 1}, "describes no encoder"),
        ({"encoder": {"name": "resnet", "depth": 18}}, "do not fit"),
        ({"encoder": {"name": "resnet", "depth": 7}}, "do not fit"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(
    tmp_path: Path, registered: Registered, change: dict[str, object], message: str
) -> None:
    folder = copied(registered.folder, tmp_path / "e")
    card = json.loads((folder / export.CARD).read_text())
    (folder / export.CARD).write_text(json.dumps(card | change))
    with pytest.raises(CheckpointError, match=message):
        export.read_encoder(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["mobilenet_v3_small", pytest.param("vit_b_16", marks=pytest.mark.long)]
)
def test_a_torchvision_backbone_exports_and_reads_back(tmp_path: Path, model: str) -> None:
    config = TorchvisionConfig(model=model)
    encoder = trained_encoder(config)
    made = Encoder(encoder, config=cfg.to_tree(config), size=SIZE, feature_dim=feature_dim(encoder))
    export.write_encoder(tmp_path / "e", made)
    got = embed.embed_images(tmp_path / "e", [image(1)])
    np.testing.assert_allclose(got, module_embeddings(encoder, [image(1)]), atol=TOLERANCE)


def test_the_registered_model_embeds_encoded_images_as_the_module_does(
    registered: Registered,
) -> None:
    got = predict(registered.uri, "models:/m@newest", registered.images)
    assert got.dtype == np.float32
    assert got.shape == (len(registered.images), feature_dim(registered.encoder))
    want = module_embeddings(registered.encoder, registered.images)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
    assert np.abs(want[0] - want[1]).max() > 100 * TOLERANCE  # the features do differ


def test_more_images_than_a_batch_come_back_in_order(registered: Registered) -> None:
    many = [image(seed, 8, 8) for seed in range(300)]
    got = predict(registered.uri, "models:/m@newest", many)
    np.testing.assert_allclose(
        got[[0, 255, 256, 299]],
        module_embeddings(registered.encoder, [many[i] for i in (0, 255, 256, 299)]),
        rtol=0,
        atol=TOLERANCE,
    )


def test_an_undecodable_image_is_named_by_its_row(registered: Registered) -> None:
    with pytest.raises(ValueError, match="row 2: not an image"):
        predict(registered.uri, "models:/m@newest", [*registered.images[:2], b"no image"])
    with pytest.raises(decode.ImageError, match="image 1: truncated"):
        embed.embed_images(registered.folder, [registered.images[0], registered.images[0][:900]])
    told: list[tuple[int, str]] = []
    images = [registered.images[0][:900], registered.images[0]]
    rows = embed.embed_images(
        registered.folder, images, on_bad=lambda place, why: told.append((place, why))
    )
    assert told == [(0, "truncated")]
    assert np.isnan(rows[0]).all()
    np.testing.assert_array_equal(rows[1:], embed.embed_images(registered.folder, images[1:]))


def test_the_same_encoder_of_a_run_is_one_version_and_the_alias_moves(
    registered: Registered,
) -> None:
    tracker = Tracker.open(TrackingConfig(uri=registered.uri), "unused")
    run = tracker.start_run("again", params={}, tags={})
    image = registered.images[0]
    first: dict[str, str | int | float] = {"checkpoint": "a"}
    versions = [
        registry.register_encoder(
            registered.folder, run, name="twice", alias=alias, example=image, tags=tags
        )
        for alias, tags in (("old", first), ("newest", first), ("newest", {"checkpoint": "b"}))
    ]
    assert [v.version for v in versions] == [1, 1, 2]
    client = MlflowClient(tracking_uri=registered.uri)
    found = (client.get_model_version_by_alias("twice", alias) for alias in ("old", "newest"))
    assert [int(version.version) for version in found] == [1, 2]


def test_a_decoder_that_is_not_installed_is_no_requirement(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = provenance.versions_of

    def without_tifffile(names: Iterable[str]) -> dict[str, str]:
        return {**installed(names), "tifffile": "absent"}

    monkeypatch.setattr(mlflow_model, "versions_of", without_tifffile)
    required = [line.split("==")[0] for line in mlflow_model.pinned_requirements()]
    assert {"torch", "imagecodecs"} <= set(required)
    assert "tifffile" not in required


def test_the_version_says_what_it_needs_and_where_it_comes_from(registered: Registered) -> None:
    client = MlflowClient(tracking_uri=registered.uri)
    version = client.get_model_version("m", str(registered.version.version))
    assert version.run_id == registered.version.run_id
    assert version.tags["dataset_fingerprint"] == "f" * 64
    assert version.tags["knn_top1"] == "0.5"
    assert (version.tags["study"], version.tags["trial"]) == ("losses", "t-1")
    folder = Path(str(version.source).removeprefix("file://"))
    requirements = (folder / "requirements.txt").read_text().split()
    assert requirements == mlflow_model.pinned_requirements()
    assert all("==" in line and "+" not in line for line in requirements)
    assert any(line.startswith("tifffile==") for line in requirements)  # decodes here, so there too
    example = json.loads((folder / "input_example.json").read_text())
    assert example["columns"] == ["image"]
    assert not [p.name for p in folder.rglob("*") if p.suffix in (".pkl", ".pickle")]
    mentions = (folder / "pyfunc.py").read_text() + "".join(
        path.read_text() for path in (folder / "artifacts/decode").glob("*.py")
    )
    assert not [
        line for line in mentions.splitlines() if line.startswith(("import ray", "from simclr"))
    ]
    run = client.get_run(registered.version.run_id)
    assert run.outputs is not None
    (output,) = run.outputs.model_outputs
    assert f"/{output.model_id}/" in str(version.source)


@pytest.mark.parametrize("where", ["models:/m@newest", "models:/m/1", "models:/m/latest"])
def test_the_module_loads_from_every_form_of_address(registered: Registered, where: str) -> None:
    encoder = embed.load_encoder(where, tracking_uri=registered.uri)
    want = registered.encoder.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in encoder.network.state_dict().items())


def test_embedding_through_registry_folder_and_run_folder_is_the_same(
    registered: Registered, tmp_path: Path
) -> None:
    copied(registered.folder, tmp_path / "run" / "encoder")
    want = module_embeddings(registered.encoder, registered.images)
    for where in ("models:/m@newest", registered.folder, tmp_path / "run"):
        got = embed.embed_images(where, registered.images, tracking_uri=registered.uri)
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
    assert embed.embed_images(registered.folder, []).shape == (0, want.shape[1])


def test_a_second_version_takes_the_alias_and_the_first_stays(
    registered: Registered, tmp_path: Path
) -> None:
    tracker = Tracker.open(TrackingConfig(uri=registered.uri), "unused")
    run = tracker.start_run("run", params={}, tags={})
    encoder = trained_encoder()
    versions = []
    for factor in (1.0, 2.0):
        with torch.no_grad():
            next(encoder.parameters()).mul_(factor)
        write(tmp_path / "e", encoder)
        versions.append(
            registry.register_encoder(
                tmp_path / "e", run, name="two", alias="champion", example=image(0), tags={}
            )
        )
    version = versions[-1]
    assert (version.name, version.version, version.uri) == ("two", 2, "models:/two/2")
    first, second = (
        next(embed.load_encoder(w, tracking_uri=tracker.uri).parameters())
        for w in ("models:/two/1", "models:/two@champion")
    )
    torch.testing.assert_close(second, 2 * first, rtol=0, atol=0)


def test_files_that_cannot_be_embedded_are_named_and_the_others_are_embedded(
    registered: Registered, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good, broken = tmp_path / "good.png", tmp_path / "broken.png"
    good.write_bytes(registered.images[0])
    broken.write_bytes(b"no image")
    missing = tmp_path / "missing.png"
    given = [str(p) for p in (missing, good, broken, good)]
    done = CliRunner().invoke(app, ["embed", str(registered.folder), *given])
    assert done.exit_code == 1
    shown = capfd.readouterr()
    rows = [line.split("\t") for line in (done.stdout + shown.out).splitlines()]
    assert [row[0] for row in rows] == [str(good), str(good)]
    want = embed.embed_images(registered.folder, registered.images[:1])[0]
    for row in rows:
        np.testing.assert_allclose([float(v) for v in row[1:]], want, rtol=1e-5)
    told = (done.stderr + shown.err).splitlines()
    assert told[0] == f"left out: {missing}: No such file or directory"
    assert told[1].startswith(f"left out: {broken}: ")


def test_what_is_not_there_is_said_so(registered: Registered, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no encoder\.json"):
        embed.load_encoder(tmp_path)
    for where in ("models:/m@nobody", "models:/m/9", "models:/other/latest"):
        with pytest.raises(ConfigError, match=r"^models:/.*there is no"):
            embed.load_encoder(where, tracking_uri=registered.uri)


def test_a_reserved_alias_is_refused_before_anything_is_stored(registered: Registered) -> None:
    client = MlflowClient(tracking_uri=registered.uri)
    run = Tracker.open(TrackingConfig(uri=registered.uri), "unused").start_run(
        "r", params={}, tags={}
    )
    with pytest.raises(ConfigError, match="reserved"):
        registry.register_encoder(
            registered.folder, run, name="new", alias="latest", example=image(0), tags={}
        )
    assert "new" not in [m.name for m in client.search_registered_models()]


@pytest.mark.slow
def test_the_registered_model_runs_where_neither_ray_nor_this_package_can_be_imported(
    registered: Registered, tmp_path: Path
) -> None:
    np.save(tmp_path / "want.npy", module_embeddings(registered.encoder, registered.images[:1]))
    (tmp_path / "image.png").write_bytes(registered.images[0])
    script = textwrap.dedent(f"""
        import pathlib, sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("ray", "simclr_ray", "torchvision", "safetensors"):
                    raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

        sys.meta_path.insert(0, Blocked())
        import mlflow, numpy, pandas

        mlflow.set_tracking_uri({registered.uri!r})
        model = mlflow.pyfunc.load_model("models:/m@newest")
        image = pathlib.Path("image.png").read_bytes()
        got = model.predict(pandas.DataFrame({{"image": [image]}}))
        numpy.testing.assert_allclose(got, numpy.load("want.npy"), rtol=0, atol={TOLERANCE})
        assert not [m for m in sys.modules if m.split(".")[0] in ("ray", "simclr_ray")]
        print("embedded", got.shape)
    """)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "embedded (1, 128)" in done.stdout


def test_the_commit_is_that_of_this_checkout_and_of_no_other(tmp_path: Path) -> None:
    top = Path(provenance.__file__).parents[2]
    commit = code_commit()
    if (top / ".git").exists():
        assert len(commit.removesuffix("-dirty")) == 40
    else:
        assert commit == ""


def copied(source: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_reserved_variables_do_not_leak_from_opening_a_store(registered: Registered) -> None:
    assert not set(mlflow_store.FIRST_CONTACT) & set(os.environ)
