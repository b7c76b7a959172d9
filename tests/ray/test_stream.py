"""The stream through Ray Data is the plan, batch by batch, whatever the ranks and actors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simclr_ray import config as cfg
from simclr_ray.data.maker import join, local_batches
from simclr_ray.data.source import Source
from simclr_ray.data.stream import stream
from simclr_ray.experiment import Experiment
from tests.ray.pictures import write_shapes

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(("num_ranks", "actors"), [(1, 2), (2, 1), (3, 1)])
def test_ids_and_pixels_of_every_global_batch_are_those_of_one_process(
    ray_cluster: str, tmp_path: Path, num_ranks: int, actors: int
) -> None:
    write_shapes(tmp_path / "shapes.parquet", 200, row_group_size=9)  # two lanes
    tree = {
        "name": "t",
        "data": {"train": str(tmp_path / "shapes.parquet")},
        "batch_size": 22,
        "scaling": {"data_actors_per_worker": actors, "cpus_per_data_actor": 0.3},
    }
    experiment = cfg.validate(Experiment, tree)
    source = Source.open(experiment.data.train)
    steps = range(5, 21)  # from within an epoch, over two of its ends
    streams = [stream(experiment, source, steps, r, num_ranks) for r in range(num_ranks)]
    seen = 0
    for alone, *parts in zip(local_batches(experiment, source, steps), *streams, strict=True):
        together = join(parts)
        assert together.step == alone.step == steps[seen]
        assert torch.equal(together.ids, alone.ids)
        assert torch.equal(together.a, alone.a)
        assert torch.equal(together.b, alone.b)
        seen += 1
    assert seen == len(steps)
