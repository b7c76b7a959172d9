"""The stream through Ray Data is the plan, batch by batch, whatever the ranks and actors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simclr_ray import config as cfg
from simclr_ray.data.maker import join, local_batches, two_views
from simclr_ray.data.source import Source
from simclr_ray.data.stream import stream
from simclr_ray.experiment import Experiment
from simclr_ray.worker import colour
from tests.ray.pictures import write_shapes

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(("num_ranks", "actors", "first_size"), [(1, 2, 0), (2, 1, 16), (3, 1, 0)])
def test_ids_and_pixels_of_every_global_batch_are_those_of_one_process(
    ray_cluster: str, tmp_path: Path, num_ranks: int, actors: int, first_size: int
) -> None:
    write_shapes(tmp_path / "shapes.parquet", 200, row_group_size=9)  # two lanes
    tree = {
        "name": "t",
        "data": {"train": str(tmp_path / "shapes.parquet")},
        "batch_size": 22,
        "epochs": 3,
        "augment": {"size": 32, "first_size": first_size},
        "scaling": {"data_actors_per_worker": actors, "cpus_per_data_actor": 0.3},
    }
    experiment = cfg.validate(Experiment, tree)
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
    assert sizes == ({16, 20, 28} if first_size else {32})  # views grow with the epochs


def test_views_coloured_by_the_worker_are_those_of_the_data_actors(tmp_path: Path) -> None:
    write_shapes(tmp_path / "shapes.parquet", 60, row_group_size=9)
    tree = {
        "name": "t",
        "data": {"train": str(tmp_path / "shapes.parquet")},
        "batch_size": 20,
        "epochs": 2,
        "augment": {"size": 24, "first_size": 16},
    }
    whole = cfg.validate(Experiment, tree)
    split = cfg.validate(Experiment, tree | {"scaling": {"colour_on": "worker"}})
    assert split.digest() == whole.digest()
    source = Source.open(whole.data.train)
    views = two_views(split.augment, split.seed)
    made = [list(local_batches(e, source, range(6))) for e in (whole, split)]
    for expected, crops in zip(*made, strict=True):
        assert not torch.equal(crops.a, expected.a)
        a, b = colour(views, crops, crops.step // 3, torch.device("cpu"))
        assert torch.equal(a, expected.a)
        assert torch.equal(b, expected.b)
