"""Passwords in a run's URIs, tokens in its environment: they are in no file and no line."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from simclr_ray import config as cfg
from tests.ray.images import write_splits
from tests.ray.test_pretrain import tree_of

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

SECRET = "p1anted-5ecret"
NAMES = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "RAY_AUTH_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
)  # fmt: skip


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Give a folder with a short path: a socket's has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def test_a_whole_run_and_a_study_write_and_say_no_secret(
    tmp_path: Path, ray_folder: Path, mlflow_server: str
) -> None:
    server = urlsplit(mlflow_server)
    tree = tree_of(write_splits(tmp_path, 330), "runs", 1, "float32")
    tree["epochs"] = 1
    tree["registry"] = {"name": "planted"}
    tree["tracking"] = {
        "uri": f"{server.scheme}://me:{SECRET}-uri@{server.netloc}",
        "system_metrics": False,
    }
    config = tmp_path / "t.yaml"
    config.write_text(cfg.dump_yaml(tree))
    study = {
        "name": "s", "question": "?", "answers": "nothing", "base": str(config),
        "space": {"loss.temperature": {"grid": [0.1, 0.5]}}, "figure": {"x": "loss.temperature"},
        "comparisons": [], "seeds": [0],
        "paper": {"source": "-", "metric": "-", "columns": ["loss.temperature"], "rows": []},
    }  # fmt: skip
    (tmp_path / "s.yaml").write_text(cfg.dump_yaml(study))
    secrets = {name: f"{SECRET}-{name}-0123456789" for name in NAMES}
    own_ray = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env = own_ray | secrets | {"MLFLOW_TRACKING_USERNAME": "me", "RAY_TMPDIR": str(ray_folder)}
    said = ""
    for arguments in (
        ["pretrain", str(config)],
        ["run", "list", str(tmp_path / "runs")],
        ["study", "run", str(tmp_path / "s.yaml")],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "simclr_ray", *arguments],
            env=env, capture_output=True, text=True, check=False, timeout=400,
        )  # fmt: skip
        said += done.stdout + done.stderr
        assert done.returncode == 0, said
    assert SECRET not in said
    config.unlink()  # where the user wrote it down
    found = {}
    for path in (*tmp_path.rglob("*"), *ray_folder.rglob("*")):
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        if SECRET.encode() in data:
            found[str(path)] = data[max(0, data.index(SECRET.encode()) - 200) :][:300]
    assert not found
    assert any((tmp_path / "runs").rglob("run.json"))
    assert any((tmp_path / "runs").rglob("tune/tuner.pkl"))
    assert any(ray_folder.rglob("raylet.out"))
