"""`status` of a run with a long log answers within two seconds, from a folder and from a bucket."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from benchmarks.bucket import KEYS, NAME, serving
from simclr_ray.storage.last_error import LastError
from simclr_ray.storage.rank_states import RANKS, RankState, RankStates
from simclr_ray.storage.run_folder import METRICS, RunFolder
from tests.formats.test_formats import HERE as FORMATS

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

MOST_S = 2.0
TRIES = 5  # the best counts: others use this machine as well
RECORDS = 200_000  # 25 MB


def write_run(folder: Path) -> None:
    """Make a run that has reported often and whose ranks are up."""
    shutil.copytree(FORMATS / "format_2", folder)
    with (folder / METRICS).open("w") as log:
        for n in range(1, RECORDS + 1):
            record = {"time": 1e9 + n, "step": 10 * n, "epoch": n / 100, "total": 4 * 10**6}
            log.write(json.dumps(record | {"train/loss": 5.0, "train/mean_loss": 5.1}) + "\n")
    run = RunFolder.at(str(folder))
    ranks = [RankState(n, f"10.0.0.{n}", "step", 2_000_000, 0.5) for n in range(256)]
    run.write_text(RANKS, RankStates.now(ranks).text)
    LastError.of("DivergedError", "the loss is not finite").write(run)


def status_of(place: str) -> str:
    """Return what the verb prints, which takes it two seconds at most.

    Where more processes run than this machine has cores, its own seconds of a core count.
    """
    walls, cpus, command = [], [], [sys.executable, "-m", "simclr_ray", "status", place]
    printed = ""
    for _ in range(TRIES):
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        walls.append(time.perf_counter() - began)
        cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0, done.stderr
        printed = " ".join(done.stdout.split())
    sys.stdout.write(f"{place}: {min(walls):.2f} s, {min(cpus):.2f} s of a core\n")
    is_crowded = os.getloadavg()[0] > (os.cpu_count() or 1)
    assert min(cpus if is_crowded else walls) <= MOST_S
    return printed


def test_status_answers_within_two_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runs" / "small-0123"
    write_run(folder)
    local = status_of(str(folder))
    for name in (*KEYS, "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # which `serving` sets for good
    with serving(tmp_path / "services") as bucket:
        s3 = pafs.S3FileSystem(
            endpoint_override=bucket.address, scheme="http", allow_bucket_creation=True
        )
        s3.create_dir(NAME)
        pafs.copy_files(str(folder), f"{NAME}/runs/small-0123", None, s3)
        uri = f"{bucket.uri}/runs/small-0123"
        with RunFolder.at(uri).lock():
            remote = status_of(uri)
        sent = sum(read.size for read in bucket.reads())
    assert "state stopped; no driver holds it" in local
    assert "state running; held by a driver" in remote
    assert "time left 55:33:20, until about " in remote  # 200,000 reports of a second each
    for printed in (local, remote):
        assert "steps 2,000,000 of 4,000,000, epoch 2000.00" in printed
        assert "DivergedError: the loss is not finite" in printed
        assert "256 ranks, " in printed
    assert sent < TRIES * 6 * 2**20  # not the whole log
