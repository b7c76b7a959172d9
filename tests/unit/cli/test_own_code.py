"""A user's own code on the command line: what is typed is permitted, what a file names is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tests.outside
from simclr_ray import config as cfg
from tests.ray.images import write_shapes

OWN = "own_components"
ROOT = Path(__file__).parents[3]


def typed(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Return what `simclr-ray ARGUMENTS` gives where `own_components` is on the Python path."""
    folder = tests.outside.__file__
    assert folder is not None
    paths = os.pathsep.join((str(Path(folder).parent), str(ROOT)))
    return subprocess.run(
        [sys.executable, "-m", "simclr_ray", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_shapes(tmp_path / "train.parquet", 32)
    tree = {
        "name": "own",
        "data": {"train": "train.parquet"},
        "augment": {"size": 16},
        "encoder": {"name": "import", "path": f"{OWN}:small_net"},
        "batch_size": 16,
        "epochs": 1,
        "schedule": {"warmup_epochs": 0.0},
    }
    (tmp_path / "own.yaml").write_text(cfg.dump_yaml(tree))
    return tmp_path


def test_code_of_a_file_needs_the_flag_anywhere_on_the_line(config: Path) -> None:
    refused = typed("pretrain", "own.yaml", "--dry-run", cwd=config)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1] == (
        f"error: own.yaml: imports {OWN}:small_net, which would run that code; permit it by "
        "--allow-code (in Python: allow_code=True of Experiment.load or load_study)"
    )
    done = typed("pretrain", "--allow-code", "own.yaml", "--dry-run", cwd=config)
    assert done.returncode == 0, done.stderr
    assert "torch.export takes the encoder" in done.stdout
    assert typed("config", "own.yaml", "--allow-code", cwd=config).returncode == 0


def test_code_that_is_typed_is_permitted(config: Path) -> None:
    (config / "own.yaml").write_text(
        (config / "own.yaml").read_text().replace("small_net", "no_features")
    )
    done = typed("pretrain", "own.yaml", f"encoder.path={OWN}:small_net", "--dry-run", cwd=config)
    assert done.returncode == 0, done.stderr
    missing = typed("pretrain", "own.yaml", "encoder.path=nowhere.at:all", "--dry-run", cwd=config)
    assert missing.returncode == 2
    assert "nowhere.at:all: there is no module 'nowhere'" in missing.stderr
    assert "Traceback" not in missing.stderr


@pytest.mark.distributed
def test_doctor_passes_a_loss_of_the_global_batch_and_fails_one_of_its_rank(tmp_path: Path) -> None:
    right = typed("doctor", "--loss", f"{OWN}:PullLoss", "weight=0.3", cwd=tmp_path)
    assert right.returncode == 0, right.stderr
    assert right.stdout.startswith(f"ok  loss: {OWN}:PullLoss on 2 processes and on one")
    wrong = typed("doctor", "--loss", f"{OWN}:LocalNTXent", "temperature=0.5", cwd=tmp_path)
    assert wrong.returncode == 1
    assert wrong.stdout.startswith(f"FAIL  loss: {OWN}:LocalNTXent")
    assert "gather z of all ranks" in wrong.stdout
    none = typed("doctor", "--loss", f"{OWN}:small_net", cwd=tmp_path)
    assert none.returncode == 2
    assert "Traceback" not in none.stderr
