"""`doctor --cluster` of a storage that takes connections and never answers: it ends, in time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simclr_ray.distributed.cluster_health import cluster_result

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.timeout(400)]

IMPORTS_S = 60.0  # of a command on a loaded machine, before its minute begins


def test_a_storage_that_never_answers_is_said_and_the_command_ends(
    ray_cluster: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        storage = f"s3://key:hidden@bucket/runs?region=x&endpoint_override={endpoint}"
        command = [sys.executable, "-m", "simclr_ray", "doctor", "--cluster", "--storage", storage]
        began = time.monotonic()
        done = subprocess.run(
            [*command, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"],
            capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False,
            env=os.environ | {"RAY_ADDRESS": ray_cluster},
        )  # fmt: skip
    assert time.monotonic() - began < 60 + IMPORTS_S
    said = done.stdout
    assert done.returncode == 1, said + done.stderr
    assert "storage: no answer within 20 s" in said, said + done.stderr
    assert "gradient: not tried: workers cannot start" in said, said
    assert "nodes: 1 answered, all with the same versions" in said, said
    assert "Traceback" not in said + done.stderr
    assert "hidden" not in said + done.stderr
    assert str(cluster_result()).startswith("failed: gradient, storage; ")
