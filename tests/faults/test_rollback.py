"""A gradient that is not finite under `rollback`: the run ends well, at half the rate."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest

from simclr_ray.storage import checkpoint
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.train.step_schedule import StepSchedule
from tests.faults.test_divergence import ended, env_of, only_run, sick_run
from tests.ray.test_pretrain import losses_of

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

AT, BACK_TO, TOTAL, MULTIPLIER = 17, 16, 30, 0.5
POLICY = ["health.on_divergence=rollback", "registry.name=forms"]


def rates_of(folder: Path) -> dict[int, float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {r["step"]: r["train/learning_rate"] for r in records if "train/learning_rate" in r}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_gradient_of_one_rank_is_gone_back_from_and_every_place_says_so(
    workers: int, tmp_path: Path, ray_cluster: str
) -> None:
    """And a run that is killed after the rollback goes on at the same rates, to the last bit."""
    program, _ = sick_run(tmp_path / "whole", AT, once=True, workers=workers)
    code, said, status = ended([*program, *POLICY], tmp_path / "whole", workers)
    assert (code, status) == (0, "FINISHED"), said
    assert f"going back to the checkpoint of step {BACK_TO}, and on at 0.5 times" in said
    folder = only_run(tmp_path / "whole")
    plain = StepSchedule(10, TOTAL, 5, 0.01 * 32 / 256, 32)
    rates = rates_of(Path(folder.uri))
    for done in range(1, TOTAL + 1):
        expected = plain.learning_rate(done - 1) * (MULTIPLIER if done > BACK_TO else 1.0)
        assert rates[done] == expected, done
    record = RunRecord.read(folder)
    assert (record.rollbacks, record.rate_multiplier) == (1, MULTIPLIER)
    with folder.newest_checkpoint() as newest:
        assert newest is not None
        kept = checkpoint.read(newest).record
    assert (kept["rollbacks"], kept["rate_multiplier"], kept["halved_at"]) == (1, 0.5, [BACK_TO])
    wanted = {("rollbacks", "1"), ("rate_multiplier", "0.5")}
    with closing(sqlite3.connect(record.tracking_uri.removeprefix("sqlite:///"))) as store:
        for table in ("tags", "model_version_tags"):  # of the run, of the registered version
            assert wanted <= set(store.execute(f"select key, value from {table}")), table

    program, _ = sick_run(tmp_path / "killed", AT, once=True, workers=workers)
    _kill_after(program, tmp_path / "killed", 22, workers)
    code, said, status = ended([*program, *POLICY], tmp_path / "killed", workers)
    assert (code, status) == (0, "FINISHED"), said
    again = Path(only_run(tmp_path / "killed").uri)
    assert rates_of(again) == rates
    assert losses_of(again) == losses_of(Path(folder.uri))


def _kill_after(program: list[str], folder: Path, step: int, workers: int) -> None:
    """Kill the driver once the run was rolled back and has a later checkpoint than `step`."""
    driver = subprocess.Popen(
        [*program, *POLICY], cwd=folder, env=env_of(workers),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 400
    while driver.poll() is None and time.monotonic() < deadline:
        runs = list(folder.glob("runs/*/rollbacks.json"))
        names = only_run(folder).checkpoints() if runs else []
        if names and checkpoint.step_of(names[0]) >= step:
            break
        time.sleep(0.05)
    assert driver.poll() is None, "the driver outran the kill"
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not list(folder.glob("runs/*/outcome.json"))
