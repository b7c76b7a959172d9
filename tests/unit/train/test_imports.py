"""Components from outside the package: checked against their contract, then trained two steps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tests.outside
from simclr_ray import config as cfg
from simclr_ray.config import imports
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.batches import local_batches
from simclr_ray.data.source import Source
from simclr_ray.errors import ConfigError
from simclr_ray.evaluation.encoded_splits import encode
from simclr_ray.evaluation.features import load_split
from simclr_ray.evaluation.scores import score_features
from simclr_ray.inference.encoder import Encoder
from simclr_ray.inference.encoder_files import write_encoder
from simclr_ray.inference.export import export_encoder
from simclr_ray.nn.batchnorm import GlobalBatchNorm
from simclr_ray.nn.build import SimCLRModel, build_loss, build_model, feature_dim
from simclr_ray.nn.pretrained import load_init
from simclr_ray.optim import state_per_parameter
from simclr_ray.train import loop
from simclr_ray.train.dry_run import derived
from simclr_ray.train.imports import export_problem, resolve_imports
from simclr_ray.train.loss_parity import loss_parity
from simclr_ray.train.resolve import resolve
from simclr_ray.train.step_schedule import StepSchedule
from simclr_ray.train.worker import prepare_training
from simclr_ray.train.worker_batches import finish_batches
from tests.ray.images import write_shapes

OWN = "own_components"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def permitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Permit everything, and have `own_components` be importable as a file of its own."""
    monkeypatch.setenv(imports.PERMISSION, imports.EVERYTHING)
    folder = tests.outside.__file__
    assert folder is not None
    monkeypatch.syspath_prepend(str(Path(folder).parent))


@pytest.fixture(scope="module")
def train_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "train.parquet"
    write_shapes(path, 32)
    return path


def own(name: str, **options: Any) -> dict[str, Any]:
    return {"name": "import", "path": f"{OWN}:{name}", "options": options}


def experiment(train: Path | str, **changes: Any) -> Experiment:
    tree = {
        "name": "t",
        "data": {"train": str(train)},
        "augment": {"size": 16},
        "encoder": {"name": "resnet", "depth": 10, "width": 0.125, "stem": "strided"},
        "head": {"name": "mlp", "dim": 8},
        "batch_size": 16,
        "epochs": 1,
        "schedule": {"warmup_epochs": 0.0},
    }
    return cfg.validate(Experiment, tree | changes)


def train_two_steps(config: Experiment) -> SimCLRModel:
    """Return the model after both steps of the only epoch."""
    resolved = resolve(config)
    experiment = resolved.config
    model = build_model(experiment)
    optimizer = prepare_training(model, experiment, CPU)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses: list[float] = []
    batches = local_batches(experiment, resolved.source, range(resolved.total_steps))
    loop.train(
        model,
        build_loss(experiment),
        optimizer,
        finish_batches(experiment, resolved.source, batches, CPU),
        StepSchedule(2, 2, 0, experiment.peak_learning_rate(), experiment.batch_size, log_every=1),
        loop.Callbacks(lambda m: losses.append(m.loss), lambda *_: None, lambda _: None),
    )
    assert len(losses) == resolved.total_steps == 2
    assert all(torch.isfinite(torch.tensor(losses)))
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) == len(before)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": own("PullLoss", weight=0.5), "head": {"name": "linear", "dim": 4}},
        {"encoder": own("small_net", width=6)},
        {"optimizer": own("SignSGD", scale=0.1) | {"weight_decay": 1e-4}},
        {
            "augment": {
                "name": "pipeline",
                "size": 16,
                "a": [{"name": "crop"}, own("Invert", strength=0.5) | {"p": 0.5}],
            }
        },
    ],
    ids=["loss", "encoder", "optimizer", "op"],
)
def test_a_component_from_outside_trains(train_images: Path, changes: dict[str, Any]) -> None:
    train_two_steps(experiment(train_images, **changes))


def test_a_protocol_from_outside_scores_what_two_steps_trained(train_images: Path) -> None:
    config = experiment(train_images)
    split = load_split(Source.open(str(train_images)), 16)
    model = train_two_steps(config)
    protocols = ["knn", f"{OWN}:nearest_mean"]
    encoded = encode(model.encoder, split, split, config)
    score = score_features("two steps", *encoded, config, protocols)
    assert list(score.accuracies) == ["knn_top1", "nearest_mean_top1"]
    assert 0 < score.accuracies["nearest_mean_top1"] <= 1


def test_a_format_from_outside_holds_what_two_steps_trained(
    train_images: Path, tmp_path: Path
) -> None:
    config = experiment(train_images)
    encoder = train_two_steps(config).encoder
    tree, dim = cfg.to_tree(config.encoder), feature_dim(encoder)
    whole = Encoder(encoder, config=tree, size=16, feature_dim=dim)
    write_encoder(tmp_path / "encoder", whole)
    named = ["torch-export", f"{OWN}:numpy_archive"]
    made = export_encoder(str(tmp_path / "encoder"), tmp_path / "out", named)
    assert set(made) == {"encoder.json", "model.safetensors", "encoder.pt2", "encoder.npz"}
    assert set(made) == {path.name for path in (tmp_path / "out").iterdir()}
    with np.load(tmp_path / "out" / "encoder.npz") as stored:
        state = encoder.state_dict()
        assert set(stored.files) == set(state)
        assert all(np.array_equal(stored[name], state[name]) for name in state)
    again = export_encoder(str(tmp_path / "out"), tmp_path / "again", named[1:])
    assert set(again) == {"encoder.json", "model.safetensors", "encoder.npz"}
    for wrong, message in (
        ("hidden_weights", "writes 'model.safetensors'; expected the name of a file that no other"),
        ("small_net", "returned Sequential; expected an ExportFormat"),
        ("nearest_mean", "called without arguments: .*missing 4 required"),
    ):
        with pytest.raises(ConfigError, match=message):
            export_encoder(str(tmp_path / "out"), tmp_path / "no", [f"{OWN}:{wrong}"])
    assert not (tmp_path / "no").exists()


def test_a_loss_from_outside_gets_the_labels_that_it_takes(train_images: Path) -> None:
    config = experiment(train_images, loss=own("LabelLoss"), head={"name": "linear", "dim": 4})
    assert config.takes_labels
    resolved = resolve(config)
    batches = local_batches(resolved.config, resolved.source, range(1))
    (batch,) = finish_batches(resolved.config, resolved.source, batches, CPU)
    assert batch.labels is not None
    value = build_loss(resolved.config)(torch.zeros(16, 4), torch.zeros(16, 4), batch.labels)
    assert value.item() == pytest.approx(4 * batch.labels.square().sum().item() / 16)


def test_an_encoder_from_outside_has_global_batch_norm_and_its_features_counted() -> None:
    config = experiment("x", encoder=own("small_net", width=6), batch_norm={"momentum": 0.25})
    encoder = build_model(config).encoder
    assert encoder.feature_dim == 6
    (norm,) = (m for m in encoder.modules() if isinstance(m, GlobalBatchNorm))
    assert norm.momentum == 0.25
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in encoder.modules())
    again = build_model(config).encoder.state_dict()  # a pure function of the seed
    assert all(torch.equal(t, again[n]) for n, t in encoder.state_dict().items())


def test_weights_that_an_imported_encoder_brings_stay(tmp_path: Path) -> None:
    encoder = build_model(experiment("x", encoder=own("pretrained_net"))).encoder
    norms = [m for m in encoder.modules() if isinstance(m, GlobalBatchNorm)]
    assert [set(norm.weight.tolist()) for norm in norms] == [{2.0}, {1.0}]
    assert [set(norm.running_mean.tolist()) for norm in norms] == [{1.0}, {1.0}]
    assert [norm.weight.requires_grad for norm in norms] == [True, False]
    weights = {name: torch.full_like(t, 0.5) for name, t in encoder.state_dict().items()}
    torch.save(weights, tmp_path / "own.pth")
    init = {"weights": f"{tmp_path}/own.pth", "mean": [0, 0, 0], "std": [1, 1, 1]}
    config = experiment("x", encoder=own("pretrained_net"), init=init)
    model = build_model(config)
    load_init(model, config)
    first = next(iter(model.encoder.parameters()))
    assert set(first.flatten().tolist()) == {0.5}


def test_the_state_of_an_optimizer_is_counted_by_a_step_of_it() -> None:
    config = experiment("x", optimizer=own("SignSGD"))
    assert state_per_parameter(config.optimizer) == 0
    assert state_per_parameter(experiment("x", optimizer={"name": "adamw"}).optimizer) == 2


STAGES = {"name": "pipeline", "size": 16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": own("no_features")}, r"encoder: own_components:no_features gives "
         r"torch.float32 \[2, 8, 14, 14\]; expected features \[2, F\] of images \[2, 3, 16, 16\]"),
        ({"encoder": own("small_net", depth=3)}, r"encoder: own_components:small_net\(depth\) "
         r"raised TypeError: .*unexpected keyword argument 'depth'"),
        ({"encoder": own("Invert")}, "encoder: own_components:Invert.* returned Invert; expected "
         "an instance of torch.nn.modules.module.Module"),
        ({"encoder": own("small_nett")}, r"own_components has no 'small_nett' \(did you mean "
         "'small_net'"),
        ({"encoder": own("NOT_CALLABLE")}, "own_components:NOT_CALLABLE: is of type int, not "
         "callable; expected a class or function"),
        ({"encoder": {"name": "import", "path": "nowhere.at:all"}}, "nowhere.at:all: there is no "
         "module 'nowhere' on the Python path"),
        ({"encoder": {"name": "import", "path": "own_components.inner:all"}},
         "importing own_components.inner raised ModuleNotFoundError"),
        ({"loss": own("small_net")}, r"loss: own_components:small_net\(global_batch_size\) raised"),
        ({"loss": own("RowsLoss")}, r"loss: own_components:RowsLoss gives torch.float32 \[4\]; "
         "expected a float scalar"),
        ({"loss": own("DetachedLoss")}, "gives .* and no gradient; expected both, finite"),
        ({"loss": own("label_loss")}, "takes_labels=True.*name the class"),
        ({"augment": STAGES | {"a": [{"name": "crop"}, own("Brighten")]}},
         r"augment.a.1: own_components:Brighten gives values from 1\.\d+ to 1\.\d+; expected"),
        ({"augment": STAGES | {"a": [{"name": "crop"}, own("Halve")]}},
         r"gives torch.float32 \[3, 3, 16, 8\]; expected torch.float32 \[3, 3, 16, 16\]"),
        ({"augment": STAGES | {"a": [{"name": "crop"}, own("small_net")]}},
         "returned Sequential; expected an instance of simclr_ray.augment.ops.Op"),
        ({"optimizer": own("Invert")}, "optimizer: own_components:Invert.* raised TypeError"),
        ({"encoder": own("small_net"), "scaling": {"recompute_activations": True}},
         "has no attribute `recompute`"),
    ],
)  # fmt: skip
def test_what_breaks_a_contract_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        resolve_imports(experiment("x", **changes))
    assert len(str(caught.value).splitlines()) == 1


def test_the_code_is_a_part_of_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    layers = "nn.Conv2d(3, 2, 16), nn.Flatten()"
    source = f"from torch import nn\ndef net():\n    return nn.Sequential({layers})\n"
    (tmp_path / "changing_net.py").write_text(source)
    config = experiment("x", encoder={"name": "import", "path": "changing_net:net"})
    first = resolve_imports(config)
    assert resolve_imports(first) == first
    (tmp_path / "changing_net.py").write_text(source + "# otherwise the same\n")
    assert resolve_imports(config).digest() != first.digest() != config.digest()
    with pytest.raises(ConfigError, match="its package has sha256"):
        build_model(first)
    sys.modules.pop("changing_net")


def test_an_encoder_that_torch_export_refuses_is_told_by_the_dry_run(train_images: Path) -> None:
    fine = resolve(experiment(train_images, encoder=own("small_net")))
    assert derived(fine)["registration"].startswith("torch.export takes the encoder")
    shipped = derived(fine)["imported encoder"]
    assert shipped.startswith(f"{OWN}:small_net, sha256 ")
    assert shipped.endswith(", shipped")
    refused = resolve(experiment(train_images, encoder=own("Branching")))
    told = derived(refused)["registration"]
    assert told.startswith("the encoder cannot be registered: torch.export fails: ")
    assert "\n" not in told
    assert export_problem(experiment("x")) == ""


@pytest.mark.distributed
def test_a_loss_holds_its_contract_on_two_processes_or_is_found_out() -> None:
    found = loss_parity(f"{OWN}:PullLoss", {"weight": 0.3})
    assert found.holds, found
    wrong = loss_parity(f"{OWN}:LocalNTXent", {"temperature": 0.5})
    assert not wrong.holds
    assert wrong.gradient > 1e-3
