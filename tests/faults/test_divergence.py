"""A gradient that is not finite: no run ends well with it, and the same command goes on."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from simclr_ray import config as cfg
from simclr_ray.storage import checkpoint
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.storage.run_record import RunRecord
from tests.outside import own_components
from tests.ray.driver import own_ray
from tests.ray.images import write_splits
from tests.ray.test_pretrain import tree_of

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

# While the file is there, the last rank's gradient of a step is NaN; the loss itself is finite.
SICK = """
from pathlib import Path
from simclr_ray.distributed import collectives
from own_nets.components import PullLoss

class Loss(PullLoss):
    def __init__(self, file, at, once=False, *, global_batch_size=0):
        super().__init__(global_batch_size=global_batch_size)
        self.file, self.at, self.calls, self.once = Path(file), at, 0, once

    def forward(self, z1, z2, labels=None):
        self.calls += 1
        is_last = collectives.rank() == collectives.world_size() - 1
        if self.calls == self.at and is_last and self.file.exists():
            if self.once:
                self.file.unlink()
            z1.register_hook(lambda gradient: gradient * float("nan"))
        return super().forward(z1, z2, labels)
"""


def sick_run(
    folder: Path, at: int, *, once: bool = False, workers: int = 2
) -> tuple[list[str], Path]:
    """Return a command whose last rank has a NaN in its gradient of step `at`, and its file.

    With `once` the file goes with it.
    """
    folder.mkdir(exist_ok=True)
    write_splits(folder, 330)
    package = folder / "own_nets"
    package.mkdir()
    shutil.copy(own_components.__file__, package / "components.py")
    (package / "__init__.py").touch()
    (package / "sick.py").write_text(SICK)
    file = folder / "sick"
    file.touch()
    tree = tree_of(folder, "runs", workers, "float64")
    options = {"file": str(file), "at": at, "once": once}
    tree["loss"] = {"name": "import", "path": "own_nets.sick:Loss", "options": options}
    tree["schedule"] = {"learning_rate": 0.01, "warmup_steps": 5}
    tree["checkpoint"] = {"every_steps": 2}
    (folder / "sick.yaml").write_text(cfg.dump_yaml(tree))
    program = [sys.executable, "-m", "simclr_ray", "pretrain", "sick.yaml", "--allow-code"]
    return program, file


def env_of(workers: int) -> dict[str, str]:
    """Return the environment of a run: one worker has a Ray of its own, and needs no Ray Train."""
    own = own_ray() if workers == 1 else dict(os.environ)
    return own | {"PYTHONPATH": str(Path.cwd())}


def ended(program: list[str], folder: Path, workers: int = 2) -> tuple[int, str, str]:
    """Return exit code, what was said, and the MLflow run's status."""
    done = subprocess.run(
        program, cwd=folder, env=env_of(workers),
        capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    record = RunRecord.read(only_run(folder))
    with closing(sqlite3.connect(record.tracking_uri.removeprefix("sqlite:///"))) as store:
        asked = "select status from runs where run_uuid = ?"
        (status,) = store.execute(asked, (record.mlflow_run_id,)).fetchone()
    return done.returncode, done.stderr, status


def only_run(folder: Path) -> RunFolder:
    (path,) = folder.glob("runs/*/run.json")
    return RunFolder.at(str(path.parent))


@pytest.mark.parametrize(("at", "workers"), [(7, 2), (30, 2), (7, 1)])
def test_a_nan_of_one_rank_stops_all_names_a_weight_and_costs_no_finite_step(
    at: int, workers: int, tmp_path: Path, ray_cluster: str
) -> None:
    """At a step within an epoch, and at the last one of the run."""
    program, file = sick_run(tmp_path, at, workers=workers)
    code, said, status = ended(program, tmp_path, workers)
    assert (code, status) == (1, "FAILED"), said
    last = said.splitlines()[-1]
    assert "is not finite at step" in last, said
    assert "Traceback" not in said
    assert checkpoint.step_of(only_run(tmp_path).checkpoints()[0]) == (at - 1) // 2 * 2
    assert not (tmp_path / "runs" / only_run(tmp_path).name / "outcome.json").exists()
    file.unlink()
    code, said, status = ended(program, tmp_path, workers)
    assert (code, status) == (0, "FINISHED"), said
    assert checkpoint.step_of(only_run(tmp_path).checkpoints()[0]) == 30
