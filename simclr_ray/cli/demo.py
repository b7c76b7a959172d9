"""The demo verb."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simclr_ray.cli.console import out
from simclr_ray.config.experiment import Experiment

if TYPE_CHECKING:
    pass
from simclr_ray.cli.app import _connect, _prepare, _pretrain, app

DEMO_TRAIN_IMAGES, DEMO_TEST_IMAGES = 6_000, 2_000


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo"),
) -> None:
    """Prepare shapes, pretrain with two workers, evaluate, register, and show its use."""
    _connect(Experiment.load("shapes_demo"))  # one cluster for preparing and training
    for split, images, seed in (("train", DEMO_TRAIN_IMAGES, 0), ("test", DEMO_TEST_IMAGES, 1)):
        _prepare("shapes", str(folder / "shapes" / split), f"num_images={images}", f"seed={seed}")
    experiment = Experiment.load(
        "shapes_demo",
        f"data.train={folder / 'shapes' / 'train'}",
        f"data.test={folder / 'shapes' / 'test'}",
        f"storage={folder / 'runs'}",
    )
    _pretrain(experiment)
    image = folder / "shape.png"
    _write_shape(image)
    model = f"models:/{experiment.registry.name}@{experiment.registry.alias}"
    store = f"sqlite:///{(folder / 'runs').resolve()}/mlflow.db"
    out.print("embed an image with the registered model:", markup=False)
    program = Path(sys.argv[0])
    command = [str(program), "embed", model, str(image), "--tracking-uri", store]
    out.print("  " + shlex.join(command), markup=False, soft_wrap=True)


def _write_shape(path: Path) -> None:
    from PIL import Image

    from simclr_ray.data.shapes import render

    Image.fromarray(render(0, 2).pixels).save(path)
