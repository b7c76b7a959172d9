"""A run is refused before it starts where its checkpoints do not fit; the size is the real one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import ConfigError
from simclr_ray.nn.build import build_model
from simclr_ray.nn.precision import DTYPES
from simclr_ray.optim import build_optimizer
from simclr_ray.storage import checkpoint
from simclr_ray.storage.space import Space
from simclr_ray.train import disk_space
from simclr_ray.train.disk_space import check_space, checkpoint_bytes
from simclr_ray.train.resolve import ResolvedExperiment, resolve
from tests.ray.images import write_shapes

SMALL = {"name": "resnet", "depth": 10, "width": 0.125, "stem": "strided"}


def resolved_in(folder: Path, **changes: object) -> ResolvedExperiment:
    if not (folder / "train.parquet").exists():
        write_shapes(folder / "train.parquet", 40)
    tree = {
        "name": "t", "data": {"train": str(folder / "train.parquet")}, "encoder": SMALL,
        "augment": {"size": 32}, "batch_size": 16, "epochs": 3, "storage": str(folder / "runs"),
    }  # fmt: skip
    return resolve(cfg.validate(Experiment, tree | changes))


def with_free(monkeypatch: pytest.MonkeyPatch, free: int, files: int | None = None) -> None:
    monkeypatch.setattr(disk_space, "space_at", lambda path: Space(free, files))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(
    "optimizer", [{"name": "lars"}, {"name": "adamw"}, {"name": "sgd", "momentum": 0.0}]
)
def test_the_size_of_a_checkpoint_is_that_of_one_that_is_written(
    precision: str, optimizer: dict[str, object], tmp_path: Path
) -> None:
    tree = {"name": "t", "data": {"train": "x"}, "encoder": SMALL, "augment": {"size": 32}}
    config = cfg.validate(Experiment, {**tree, "precision": precision, "optimizer": optimizer})
    model = build_model(config).to(DTYPES[config.precision])
    made = build_optimizer(model, config.optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    record = {"experiment": cfg.to_tree(config)}
    checkpoint.write(tmp_path / "a", 1, checkpoint.pack(model, made), record)
    real = sum(file.stat().st_size for file in (tmp_path / "a").iterdir())
    assert real <= checkpoint_bytes(config) <= 1.05 * real + 2**15


@pytest.mark.parametrize(
    ("keep", "policy", "copies"),
    [(1, "stop", 2), (2, "stop", 3), (5, "stop", 6), (1, "rollback", 4)],  # a good one is kept, too
)
def test_what_is_kept_and_one_more_has_to_fit_and_one_in_the_temporary_folder(
    keep: int, policy: str, copies: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = resolved_in(tmp_path, checkpoint={"keep": keep}, health={"on_collapse": policy})
    size = checkpoint_bytes(run.config)
    with_free(monkeypatch, copies * size - 1)
    with pytest.raises(ConfigError, match=f"^storage: .* free; {copies} checkpoints of") as caught:
        check_space(run)
    assert ("checkpoint.keep" in str(caught.value)) == (keep > 1)
    with_free(monkeypatch, (copies + 1) * size - 1)
    beside = "TMPDIR: .* 1 checkpoint of .* beside .* in storage have to fit: .* set TMPDIR"
    with pytest.raises(ConfigError, match=beside):
        check_space(run)
    with_free(monkeypatch, (copies + 1) * size)
    check_space(run)


def test_checkpoints_that_are_there_need_no_room_and_half_ones_are_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = resolved_in(tmp_path)
    size = checkpoint_bytes(run.config)
    assert run.folder.local is not None
    whole, half = (run.folder.local / checkpoint.new_name(step) for step in (2, 3))
    checkpoint.write(whole, 2, {"model.x": torch.zeros(1)}, {})
    half.mkdir()
    (half / checkpoint.STATE).write_bytes(bytes(size))
    with_free(monkeypatch, 2 * size)  # two in storage, one in scratch; the half one is removed
    check_space(run)
    with_free(monkeypatch, 2 * size - 1)
    with pytest.raises(ConfigError, match="have to fit"):
        check_space(run)


def test_a_run_that_has_its_last_checkpoint_needs_no_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = resolved_in(tmp_path)
    assert run.folder.local is not None
    last = run.folder.local / checkpoint.new_name(run.total_steps)
    checkpoint.write(last, run.total_steps, {"model.x": torch.zeros(1)}, {})
    with_free(monkeypatch, 0)
    check_space(run)


def test_a_disk_that_takes_no_more_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 2**40, 3)
    with pytest.raises(ConfigError, match=r"storage: .* takes 3 more files \(df -i\): make room"):
        check_space(resolved_in(tmp_path))


def test_of_a_cluster_s_machines_only_a_local_storage_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = resolved_in(tmp_path)
    with_free(monkeypatch, 3 * checkpoint_bytes(run.config))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_space(run)


def test_shapes_are_counted_without_torchs_compiler() -> None:
    # in an interpreter of its own: here another test may have loaded it
    code = """
import sys, torch
from simclr_ray.config.experiment import Experiment
from simclr_ray.nn.build import build_model
from simclr_ray.train.disk_space import checkpoint_bytes, counting_device
experiment = Experiment.load("cifar10_study_cpu")
counted = checkpoint_bytes(experiment)
with counting_device(experiment):
    model = build_model(experiment)
assert counted and all(t.is_meta for t in model.state_dict().values())
shapes = [t.shape for t in build_model(experiment).state_dict().values()]
assert shapes == [t.shape for t in model.state_dict().values()]
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
