"""The arithmetic of a run before it starts: counts by hand, and memory as autograd keeps it."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from simclr_ray import config as cfg
from simclr_ray.cli.dataset import _dataset_rows
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.description import describe_columns
from simclr_ray.data.source import Source
from simclr_ray.distributed import ray_address
from simclr_ray.errors import DataError
from simclr_ray.nn.build import build_model
from simclr_ray.nn.precision import DTYPES
from simclr_ray.train.dry_run import derived, num_parameters, step_memory
from simclr_ray.train.resolve import ResolvedExperiment

SMALL = {"name": "resnet", "depth": 10, "width": 0.25, "stem": "cifar"}


def experiment(**changes: Any) -> Experiment:
    tree = {"name": "t", "data": {"train": "x"}, "encoder": SMALL, "augment": {"size": 16}}
    return cfg.validate(Experiment, {**tree, **changes})


@pytest.fixture
def source(tmp_path: Path) -> Source:
    out = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(out, "PNG")
    table = pa.table({"image": pa.array([out.getvalue()] * 1000, pa.binary())})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=25)
    return Source.open(str(tmp_path / "a.parquet"))


def saved_bytes(e: Experiment, images: int) -> int:
    """Return the bytes that autograd really keeps for backward of both views of `images`."""
    torch.manual_seed(0)
    model = build_model(e).to(DTYPES[e.precision]).train()
    size = e.augment.size
    x = torch.rand(2 * images, 3, size, size, dtype=DTYPES[e.precision])
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(nbytes for nbytes, _ in kept.values())


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("head", [{"name": "none"}, {"name": "mlp", "layers": 3}])
def test_activations_are_those_that_autograd_keeps(precision: str, head: dict[str, Any]) -> None:
    e = experiment(batch_size=24, precision=precision, head=head)
    counted = step_memory(e).activations
    assert counted == pytest.approx(
        saved_bytes(e, 24), rel=0.01
    )  # what is not per image: below 1 %


def test_a_torchvision_backbone_is_counted_too() -> None:
    e = experiment(encoder={"name": "torchvision", "model": "resnet18"}, batch_size=4)
    assert step_memory(e).activations == pytest.approx(saved_bytes(e, 4), rel=0.01)


def test_memory_follows_the_largest_local_batch() -> None:
    one = step_memory(experiment(batch_size=96)).activations
    four = step_memory(experiment(batch_size=96, scaling={"num_workers": 4})).activations
    uneven = step_memory(experiment(batch_size=96, scaling={"num_workers": 5})).activations
    assert four == one // 4
    assert uneven == one * 20 // 96


def test_weights_are_counted_with_gradient_and_optimizer_state() -> None:
    parameters = num_parameters(experiment())
    assert parameters == sum(p.numel() for p in build_model(experiment()).parameters())
    lars, sgd, adamw = (
        step_memory(experiment(optimizer={"name": n})).weights for n in ("lars", "sgd", "adamw")
    )
    assert lars == sgd == parameters * 4 * 3  # weight, gradient, momentum
    assert adamw == parameters * 4 * 4  # and a second moment
    assert step_memory(experiment(precision="float64")).weights == 2 * lars


def test_counting_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    num_parameters(experiment())
    assert torch.equal(torch.get_rng_state(), before)


def test_row_groups_of_a_list_are_those_of_its_file_and_no_slices(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    table = pa.table({"image": ["a.png"] * 1000})
    pq.write_table(table, tmp_path / "list.parquet", row_group_size=500)
    listed = Source.open(str(tmp_path / "list.parquet"))
    assert len(listed.row_groups) == 4
    rows = derived(ResolvedExperiment(experiment(), listed))
    assert rows["images"].startswith("1,000 in 1 file, 2 row groups, ")
    shown = _dataset_rows(describe_columns(str(tmp_path / "list.parquet")))
    assert shown["rows"].startswith("1,000 in 1 file, 2 row groups, ")


def test_the_arithmetic_is_that_of_the_experiment(source: Source) -> None:
    e = experiment(
        batch_size=96,
        epochs=20,
        schedule={"learning_rate": 0.5, "scaling": "linear", "warmup_epochs": 2.0},
        scaling={"num_workers": 5},
    )
    rows = derived(ResolvedExperiment(e, source))
    assert rows["images"] == "1,000 in 1 file, 40 row groups, 2 lanes"
    assert rows["global batch"] == "96 images, 192 views"
    assert rows["negatives"] == "190 per anchor"
    assert rows["local batch"] == "20 or 19 images on 5 workers"
    assert rows["steps"] == "10 per epoch, 200 in 20 epochs"
    assert rows["device"].startswith("CPU")
    assert rows["warm-up"] == "20 steps"
    assert rows["peak learning rate"] == "0.1875 (linear scaling of 0.5)"
    assert rows["loss without learning"] == f"{np.log(191):.4f} = ln(2N-1)"
    assert rows["parameters"] == f"{num_parameters(e) / 1e6:.2f} M"
    assert "note" not in rows


@pytest.mark.parametrize(
    ("scaling", "refused"),
    [
        ({"num_workers": 2}, ""),
        (
            {"gpus_per_worker": 1},
            "scaling.gpus_per_worker=1 for 1 asks for 1 GPU, and PyTorch sees none on this machine",
        ),
        ({"num_workers": 17}, "scaling.num_workers=17 on a machine of 4 cores; more than 16 would"),
        ({"cpus_per_worker": 8}, "scaling.cpus_per_worker=8, and this machine has 4 cores"),
        (
            {"data_label_selector": {"role": "data"}},
            "scaling.data_label_selector=role: data: the cluster that is started on this machine",
        ),
    ],
)
def test_what_this_machine_would_refuse_is_told_beforehand(
    scaling: dict[str, Any], refused: str, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = ResolvedExperiment(experiment(batch_size=64, scaling=scaling), source)
    rows = derived(run)
    assert ("refused" in rows) == bool(refused)
    if refused:
        assert rows["refused"].startswith(f"a run here would end at once: {refused}")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # which has what it has
    assert "refused" not in derived(run)
    monkeypatch.setattr(ray_address, "STARTED_HERE", {"10.0.0.1:6379"})  # this machine's own
    assert derived(run) == rows


def test_workers_share_cores_where_they_compute_on_them(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    scaling: dict[str, Any] = {"num_workers": 4}
    rows = derived(ResolvedExperiment(experiment(batch_size=64, scaling=scaling), source))
    assert rows["workers"] == "4 share the 2 cores of this machine: slower than 2"
    scaling["gpus_per_worker"] = 1
    rows = derived(ResolvedExperiment(experiment(batch_size=64, scaling=scaling), source))
    assert "workers" not in rows
    assert "refused" not in rows


def test_an_object_store_is_named_where_a_run_needs_more_than_the_usual_one(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    many = experiment(batch_size=100, scaling={"num_workers": 100})
    line = derived(ResolvedExperiment(many, source))["object store"]
    assert line.startswith("9.4 GiB for the views of 100 decode actors")  # 6 tables of 16 MiB each
    few = experiment(batch_size=100, scaling={"num_workers": 2})
    assert "object store" not in derived(ResolvedExperiment(few, source))


def test_a_warm_up_as_long_as_the_run_is_noted(source: Source) -> None:
    rows = derived(ResolvedExperiment(experiment(batch_size=100, epochs=3), source))
    assert any("never reaches its peak" in rows[key] for key in rows if key.startswith("note"))


def test_rows_that_fill_no_batch_are_refused(source: Source) -> None:
    with pytest.raises(DataError, match="1000 rows do not fill one global batch of 1001"):
        derived(ResolvedExperiment(experiment(batch_size=1001), source))
