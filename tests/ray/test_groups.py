"""Images of several things, lying anywhere, are prepared and trained on in pairs of one thing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow.fs import LocalFileSystem

from simclr_ray import config as cfg
from simclr_ray.cli.dataset import prepare_shards
from simclr_ray.config.experiment import ColumnsConfig, Experiment
from simclr_ray.data import shards
from simclr_ray.data.batches import join, local_batches
from simclr_ray.data.description import describe
from simclr_ray.data.footer import INDEX, MANIFEST
from simclr_ray.data.image_groups import group_column, groups_of, open_grouped
from simclr_ray.data.inputs import ParquetInput
from simclr_ray.data.prepare import prepare
from simclr_ray.data.shards import ShardPlan
from simclr_ray.data.stream import stream
from simclr_ray.errors import DataError
from simclr_ray.train.driver import pretrain
from simclr_ray.train.dry_run import derived
from simclr_ray.train.resolve import resolve
from tests.ray.images import noise_png
from tests.ray.test_pretrain import losses_of

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

NUM_IMAGES = 300


def visits() -> list[str | None]:
    """Return the visit of each image: about 80, and some images of none."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 80, NUM_IMAGES).tolist()
    return [None if rng.random() < 0.05 else f"visit {v}" for v in drawn]


@pytest.fixture(scope="module")
def scattered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a set whose visits lie all over its row groups, with images that cannot be decoded."""
    path = tmp_path_factory.mktemp("groups") / "clinic.parquet"
    images = [b"no image" if i in (5, 250) else noise_png(i, 32) for i in range(NUM_IMAGES)]
    table = pa.table({"image": images, "visit": visits(), "label": np.arange(NUM_IMAGES) % 3})
    pq.write_table(table, path, row_group_size=40)
    return path


@pytest.fixture(scope="module")
def prepared(scattered: Path, ray_cluster: str) -> Path:
    """Prepare it by the command that training on it names."""
    with pytest.raises(DataError) as caught:
        open_grouped(str(scattered), ColumnsConfig(group="visit"))
    line = str(caught.value).split("simclr-ray prepare ")[1].split(";")[0]
    what, to, *options = line.split(" ")
    prepare_shards(what, to, *options, "rows_per_shard=60")
    return Path(to)


def experiment(path: Path, workers: int = 1, storage: str = "one") -> Experiment:
    tree = {
        "name": "t",
        "data": {
            "train": str(path),
            "columns": {"group": "group"},
            "cache_gib": 0,
            "max_bad_fraction": 0.1,
        },
        "augment": {"size": 32},
        "encoder": {"name": "resnet", "depth": 10, "width": 0.125, "stem": "strided"},
        "head": {"name": "mlp", "dim": 16},
        "batch_size": 24,
        "epochs": 1,
        "precision": "float64",
        "evaluation": {"every_epochs": 0},
        "scaling": {
            "num_workers": workers,
            "cpus_per_worker": 0.5,
            "cpus_per_data_actor": 0.3,
            "data_actors_per_worker": 1,
        },
        "tracking": {"log_every_steps": 1, "system_metrics": False},
        "storage": str(path.parent / storage),
    }
    return cfg.validate(Experiment, tree)


def shards_of(folder: Path, columns: ColumnsConfig) -> list[ShardPlan]:
    given = ParquetInput.open(str(folder / "in.parquet"), columns, 0)
    parts = given.parts(100, 0)
    return [ShardPlan(i, part, "plan", (), 10**6, given.groups) for i, part in enumerate(parts)]


def folder_of(folder: Path) -> tuple[LocalFileSystem, str]:
    return LocalFileSystem(), str(folder)


def test_prepare_writes_each_group_into_one_row_group(prepared: Path) -> None:
    manifest = json.loads((prepared / MANIFEST).read_text())
    kept = Counter(v if v else i for i, v in enumerate(visits()) if i not in (5, 250))
    assert manifest["num_rows"] == NUM_IMAGES - 2 == sum(kept.values())
    assert manifest["groups"] == {
        "number": len(kept), "least": min(kept.values()), "most": max(kept.values())
    }  # fmt: skip
    source = open_grouped(str(prepared), ColumnsConfig(group="group"))
    assert source.index.endswith(INDEX)
    assert sorted(groups_of(source).sizes) == sorted(kept.values())
    assert groups_of(source).members is None  # members lie side by side
    assert len(source.files) > 4
    given = visits()
    group_of_row = group_column(source).to_pylist()
    assert group_of_row == [given[i] for i in source.ids().tolist()]  # each with its own image
    rows = source.read_rows(np.arange(source.num_rows))
    assert all(
        image == noise_png(i, 32) for i, image in zip(rows.ids.tolist(), rows.images, strict=True)
    )
    assert rows.labels is not None
    assert (rows.labels == rows.ids % 3).all()
    order = [given.index(v) for v in dict.fromkeys(group_of_row) if v]
    assert order != sorted(order)  # shuffled
    line = describe(str(prepared), ColumnsConfig(group="group")).groups
    assert line == f"{len(kept)} groups of 1 to {max(kept.values())} images"


def test_inspect_says_of_groups_that_lie_scattered_what_to_do(scattered: Path) -> None:
    assert "simclr-ray prepare" in describe(str(scattered), ColumnsConfig(group="visit")).groups


def test_batches_of_three_workers_are_those_of_one_process(prepared: Path) -> None:
    e, num_ranks = experiment(prepared, workers=2), 3
    source = open_grouped(str(prepared), e.data.columns)
    steps = range(1, 2 * e.steps_per_epoch(source.num_pairs))
    streams = [stream(e, source, steps, rank, num_ranks) for rank in range(num_ranks)]
    for alone, *parts in zip(local_batches(e, source, steps), *streams, strict=True):
        together = join(parts)
        for name in ("a", "b", "ids", "ids_b", "bad"):
            assert torch.equal(getattr(together, name), getattr(alone, name)), name


@pytest.mark.long  # two minutes; the batches of three workers are compared above
def test_two_workers_train_as_one_does(prepared: Path) -> None:
    resolved = resolve(experiment(prepared))
    said = derived(resolved)
    assert said["groups"].endswith("images")
    assert resolved.total_steps == (resolved.source.num_groups // 24)
    one, two = (pretrain(experiment(prepared, n, s)) for n, s in ((1, "one"), (2, "two")))
    ours, theirs = losses_of(Path(one.folder)), losses_of(Path(two.folder))
    assert list(ours) == list(theirs) == list(range(1, resolved.total_steps + 1))
    assert [*ours.values()] == pytest.approx([*theirs.values()], rel=1e-9)


def test_images_of_one_folder_are_a_group(tmp_path: Path) -> None:
    for cls in ("cat", "dog"):
        for visit in range(6):
            folder = tmp_path / "in" / cls / f"visit{visit}"
            folder.mkdir(parents=True)
            for frame in range(3):
                (folder / f"{frame}.png").write_bytes(noise_png(visit * 3 + frame, 32))
    out = tmp_path / "out"
    manifest = prepare(str(tmp_path / "in"), str(out), groups="folders", rows_per_shard=10)
    assert manifest.groups == (12, 3, 3)
    assert manifest.class_names == ("cat", "dog")
    assert manifest == prepare(
        str(tmp_path / "in"), str(out), groups="folders", rows_per_shard=10
    )  # as all is there
    source = open_grouped(str(out), ColumnsConfig(group="group"))
    table = pq.read_table(out / "part-00000.parquet")
    assert all(
        path.rpartition("/")[0] == group
        for path, group in zip(table["path"].to_pylist(), table["group"].to_pylist(), strict=True)
    )
    assert source.num_groups == 12
    with pytest.raises(DataError, match="of another dataset or of other settings"):
        prepare(str(tmp_path / "in"), str(out), rows_per_shard=10)


def test_a_group_that_is_too_large_for_a_row_group_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table(
        {"image": [noise_png(i, 32) for i in range(12)], "visit": [1] * 9 + [2, 3, None]}
    )
    pq.write_table(table, tmp_path / "in.parquet")
    columns = ColumnsConfig(group="visit")
    for name, value in (("MAX_GROUP_ROWS", 2), ("MAX_GROUP_BYTES", 10)):
        monkeypatch.setattr(shards, name, value)
    (part,) = shards_of(tmp_path, columns)
    shards.write_shard(part, *folder_of(tmp_path))
    source = open_grouped(str(tmp_path / part.file_name), ColumnsConfig(group="group"))
    assert sorted(g.num_rows for g in source.row_groups) == [1, 1, 1, 9]  # it alone is larger
    monkeypatch.setattr(shards, "MAX_BYTES_OF_A_GROUP", 8 * len(noise_png(0, 32)))
    with pytest.raises(DataError, match="group 1 has more than 10,000 images or 0 MiB"):
        shards.write_shard(part, *folder_of(tmp_path))
    monkeypatch.setattr("simclr_ray.data.shards.MAX_IMAGES_OF_A_GROUP", 8)
    with pytest.raises(DataError, match="of 9 images has more than"):
        shards_of(tmp_path, columns)
