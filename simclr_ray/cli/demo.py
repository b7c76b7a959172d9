"""The demo verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simclr_ray.cli.console import loading
from simclr_ray.config.experiment import Experiment

DEMO_TRAIN_IMAGES, DEMO_TEST_IMAGES = 6_000, 2_000


def demo(
    folder: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo"),
) -> None:
    """Prepare shapes, pretrain with two workers, evaluate, register, and show its use."""
    loading("torch", "ray")
    from simclr_ray.cli.dataset import prepare_shards
    from simclr_ray.cli.pretrain import run_experiment
    from simclr_ray.distributed.ray_cluster import connect

    folder.mkdir(parents=True, exist_ok=True)  # fails here where it cannot be
    connect(Experiment.load("shapes_demo"))  # one cluster for preparing and training
    for split, images, seed in (("train", DEMO_TRAIN_IMAGES, 0), ("test", DEMO_TEST_IMAGES, 1)):
        place = str(folder / "shapes" / split)
        prepare_shards("shapes", place, f"num_images={images}", f"seed={seed}")
    image = folder / "shape.png"
    _write_shape(image)
    experiment = Experiment.load(
        "shapes_demo",
        f"data.train={folder / 'shapes' / 'train'}",
        f"data.test={folder / 'shapes' / 'test'}",
        f"storage={folder / 'runs'}",
    )
    run_experiment(experiment, image=str(image))


def _write_shape(path: Path) -> None:
    from PIL import Image

    from simclr_ray.data.shapes import render

    Image.fromarray(render(0, 2).pixels).save(path)
