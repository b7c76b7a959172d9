"""Make the small run folder that a release leaves behind, to be read by those after it.

    python -m tests.formats.make tests/formats/format_3

Trains the smallest encoder for two epochs of drawn images by a real `sr.pretrain`, and takes the
paths of this machine out of what it wrote. Run once a format, at its first release; `test_formats`
reads each of them.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch

import simclr_ray as sr
from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.storage import checkpoint
from tests.ray.images import write_shapes

TREE = {
    "name": "small",
    "encoder": {"name": "resnet", "depth": 10, "width": 0.0625, "stem": "strided"},
    "head": {"name": "mlp", "dim": 8},
    "batch_size": 16,
    "epochs": 2,
    "schedule": {"warmup_epochs": 0.0},
    "tracking": {"system_metrics": False, "log_every_steps": 2},
    "checkpoint": {"keep": 1},
}
KEPT = ("experiment.yaml", "run.json", "metrics.jsonl")


def main(target: Path) -> None:
    """Write the run folder and the features of one image."""
    with tempfile.TemporaryDirectory() as scratch:
        place = str(Path(scratch).resolve())
        write_shapes(Path(scratch) / "train.parquet", 64)
        tree = TREE | {"data": {"train": f"{place}/train.parquet"}, "storage": f"{place}/runs"}
        run = sr.pretrain(cfg.validate(Experiment, tree))
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(run.checkpoint, target / run.checkpoint.name)
        for name in KEPT:
            shutil.copy(Path(run.folder) / name, target / name)
        for file in target.rglob("*"):
            if file.suffix in (".yaml", ".json", ".jsonl"):
                text = file.read_text(encoding="utf-8").replace(place, "/somewhere")
                file.write_text(text, encoding="utf-8")
                if file.name == checkpoint.RECORD:  # it names its own hash
                    checkpoint.sign(file, json.loads(text))
        features = sr.load_encoder(run.checkpoint)(
            torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)
        )
        numbers = {"features": features[0].tolist(), "run": run.name}
        (target / "expected.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
