"""A run whose encoder, loss and op are a user's own: shipped to two workers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from simclr_ray import config as cfg
from simclr_ray.storage.run_folder import CONFIG_FILE
from tests.outside import own_components
from tests.ray.images import write_shapes

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
PARTS = """
import os
from pathlib import Path
from own_nets.components import Invert, PullLoss, small_net

def net(seen):
    Path(seen, str(os.getpid())).write_text(__file__)
    return small_net()

class Loss(PullLoss):
    pass

class Op(Invert):
    def __init__(self, seen):
        super().__init__()
        Path(seen, f"op-{os.getpid()}").write_text(__file__)
"""
# Workers of this machine find the driver's folders, those of others do not: so it is taken away.
PROGRAM = """
import os
import ray
import simclr_ray as sr

start = ray.init

def start_elsewhere(*args, **options):
    started = start(*args, **options)
    os.rename("own_nets", "not_on_other_machines")
    return started

ray.init = start_elsewhere
run = sr.pretrain(sr.Experiment.load("own.yaml", allow_code=True))
print(run.folder)
"""


def test_own_components_reach_all_workers(tmp_path: Path, ray_cluster: str) -> None:
    write_shapes(tmp_path / "train.parquet", 64)
    package, seen = tmp_path / "own_nets", tmp_path / "seen"
    package.mkdir()
    seen.mkdir()
    shutil.copy(own_components.__file__, package / "components.py")
    (package / "__init__.py").touch()
    (package / "parts.py").write_text(PARTS)
    own = {"name": "import", "path": "own_nets.parts:Op", "options": {"seen": str(seen)}}
    tree = {
        "name": "own",
        "data": {"train": "train.parquet"},
        "augment": {"name": "pipeline", "size": 16, "a": [{"name": "crop"}, own]},
        "encoder": own | {"path": "own_nets.parts:net"},
        "loss": {"name": "import", "path": "own_nets.parts:Loss", "options": {"weight": 0.5}},
        "head": {"name": "linear", "dim": 4},
        "batch_size": 32,
        "epochs": 1,
        "schedule": {"warmup_epochs": 0.0},
        "evaluation": {"every_epochs": 0},
        "scaling": {"num_workers": 2, "cpus_per_data_actor": 0.3},
        "tracking": {"log_every_steps": 1, "system_metrics": False},
    }
    (tmp_path / "own.yaml").write_text(cfg.dump_yaml(tree))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ray_cluster},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.split()[-1])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "train/loss" in r] == [1, 2]
    files = {path.name: Path(path.read_text()) for path in seen.iterdir()}
    shipped = {name for name, path in files.items() if not path.is_relative_to(tmp_path)}
    assert len([name for name in shipped if name.startswith("op-")]) == 2  # of each data actor
    assert len([name for name in shipped if not name.startswith("op-")]) == 2  # of each worker
    stored = cfg.parse_yaml((folder / CONFIG_FILE).read_text())
    hashes = {stored[part]["sha256"] for part in ("encoder", "loss")}
    assert len(hashes) == 1
    assert len(hashes.pop()) == 64
