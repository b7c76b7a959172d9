"""The stream through Ray Data is the plan, batch by batch, whatever the ranks and actors."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment, SimCLRViewsConfig
from simclr_ray.data.batch import Batch
from simclr_ray.data.batches import build_plan, build_two_views, join, local_batches
from simclr_ray.data.source import Source
from simclr_ray.data.stream import stream
from simclr_ray.errors import DataError, TooManyBadImages
from simclr_ray.train.worker_batches import apply_color
from tests.ray import processes
from tests.ray.images import write_shapes

pytestmark = pytest.mark.ray


def experiment_on(folder: Path, **changes: Any) -> Experiment:
    tree = {"name": "t", "data": {"train": str(folder / "shapes.parquet")}}
    return cfg.validate(Experiment, tree | changes)


@pytest.mark.parametrize(("num_ranks", "actors", "start_size"), [(1, 2, 0), (2, 1, 16), (3, 2, 0)])
def test_ids_and_pixels_of_every_global_batch_are_those_of_one_process(
    ray_cluster: str, tmp_path: Path, num_ranks: int, actors: int, start_size: int
) -> None:
    write_shapes(tmp_path / "shapes.parquet", 200, row_group_size=9)  # two lanes
    experiment = experiment_on(
        tmp_path,
        batch_size=22,
        epochs=3,
        augment={"size": 32, "start_size": start_size},
        scaling={"data_actors_per_worker": actors, "cpus_per_data_actor": 0.3},
    )
    source = Source.open(experiment.data.train)
    steps = range(5, 21)  # from within an epoch, over two of its ends
    streams = [stream(experiment, source, steps, r, num_ranks) for r in range(num_ranks)]
    seen, sizes = 0, set()
    for alone, *parts in zip(local_batches(experiment, source, steps), *streams, strict=True):
        together = join(parts)
        assert together.step == alone.step == steps[seen]
        assert torch.equal(together.ids, alone.ids)
        assert torch.equal(together.a, alone.a)
        assert torch.equal(together.b, alone.b)
        seen += 1
        sizes.add(alone.a.shape[-1])
    assert seen == len(steps)
    assert sizes == ({16, 20, 28} if start_size else {32})  # views grow with the epochs


def test_views_colored_by_the_worker_are_those_of_the_data_actors(tmp_path: Path) -> None:
    write_shapes(tmp_path / "shapes.parquet", 60, row_group_size=9)
    sizes = {"size": 24, "start_size": 16}
    whole, split = (
        experiment_on(
            tmp_path, batch_size=20, epochs=2, augment=sizes, scaling={"color_augment_on": on}
        )
        for on in ("data", "worker")
    )
    assert split.digest() == whole.digest()
    assert isinstance(split.augment, SimCLRViewsConfig)
    source = Source.open(whole.data.train)
    views = build_two_views(split.augment, split.seed)
    made = [list(local_batches(e, source, range(6))) for e in (whole, split)]
    for expected, crops in zip(*made, strict=True):
        assert not torch.equal(crops.a, expected.a)
        a, b = apply_color(views, crops, crops.step // 3, torch.device("cpu"))
        assert torch.equal(a, expected.a)
        assert torch.equal(b, expected.b)


def test_a_data_actor_that_is_killed_loses_and_repeats_no_step(
    ray_cluster: str, tmp_path: Path
) -> None:
    write_shapes(tmp_path / "shapes.parquet", 220, row_group_size=50)
    experiment = experiment_on(
        tmp_path, batch_size=20, epochs=200, scaling={"cpus_per_data_actor": 0.3}
    )
    source = Source.open(experiment.data.train)
    steps = range(experiment.total_steps(source.num_rows))
    plan, seen = build_plan(experiment, source), []
    before = set(processes.named("MapWorker"))
    for batch in stream(experiment, source, steps, 0, 1):
        seen.append(batch.step)
        assert (batch.ids - 1000).tolist() == plan.rows(batch.step).tolist()
        if batch.step == 30:
            (actor,) = set(processes.named("MapWorker")) - before
            os.kill(actor, signal.SIGKILL)
    assert seen == list(steps)


def test_what_ray_keeps_of_each_block_for_a_summary_does_not_grow(
    ray_cluster: str, tmp_path: Path
) -> None:
    write_shapes(tmp_path / "shapes.parquet", 40, row_group_size=10)
    # a block for each step: an epoch's last one is handed over alone
    experiment = experiment_on(
        tmp_path, batch_size=40, epochs=120, scaling={"cpus_per_data_actor": 0.3}
    )
    source = Source.open(experiment.data.train)
    most = 0
    for batch in stream(experiment, source, range(120), 0, 1):
        if batch.step % 30 == 29:
            kept = [o for o in gc.get_objects() if type(o).__name__ == "BlockStats"]
            most = max(most, len(kept))
    assert most < 60, "one of each of the 120 blocks: see `_Pace`"


def until_error(batches: Iterator[Batch]) -> tuple[list[Batch], Exception]:
    made: list[Batch] = []
    try:
        made.extend(batches)
    except DataError as error:
        return made, error
    raise AssertionError("no error")


def test_an_error_keeps_its_type_and_comes_after_the_steps_that_were_made(
    ray_cluster: str, tmp_path: Path
) -> None:
    write_shapes(tmp_path / "a.parquet", 70, row_group_size=10)
    ids = pa.array(range(10), pa.int64())
    text = pa.table({"id": ids, "image": pa.array([b"no image"] * 10, pa.binary()), "label": ids})
    pq.write_table(text, tmp_path / "b.parquet")
    experiment = experiment_on(
        tmp_path,
        seed=1,
        data={"train": str(tmp_path), "shuffle_rows": 1, "max_bad_fraction": 0.02},
        batch_size=10,  # a row group, or nearly so
        scaling={"cpus_per_data_actor": 0.3},
    )
    source = Source.open(experiment.data.train)
    expected, alone = until_error(local_batches(experiment, source, range(8)))
    made, error = until_error(stream(experiment, source, range(8), 0, 1))
    assert type(error) is type(alone) is TooManyBadImages
    assert str(error) == str(alone)
    assert 0 < len(made) == len(expected) < 8
    assert all(torch.equal(x.a, y.a) for x, y in zip(made, expected, strict=True))
    for x, y in zip(made, expected, strict=True):
        assert (x.bad.tolist(), x.reasons, x.paths) == (y.bad.tolist(), y.reasons, y.paths)
