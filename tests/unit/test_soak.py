"""What a soak makes of its samples: slopes with their errors, and what grows or is left."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks.soak import (
    MIB,
    MOST_MIB_PER_HOUR,
    Sample,
    Trend,
    memory_of,
    problems,
    report,
    sample_of,
    trend,
    what_is_left,
)

SECONDS = np.arange(0, 2700, 5.0)


def test_the_slope_and_its_error_are_those_of_least_squares() -> None:
    values = 300 + 20 * SECONDS / 3600 + np.random.default_rng(0).normal(0, 3, len(SECONDS))
    line = trend(SECONDS.tolist(), values.tolist())
    of_blocks = [values[block == SECONDS // 60].mean() for block in range(45)]
    at = [SECONDS[block == SECONDS // 60].mean() / 3600 for block in range(45)]
    fit, covariance = np.polyfit(at, of_blocks, 1, cov=True)
    assert line.blocks == 45
    assert line.slope == pytest.approx(fit[0], rel=1e-9)
    assert line.error == pytest.approx(np.sqrt(covariance[0, 0]), rel=1e-6)
    assert abs(line.slope - 20) < 3 * line.error


def test_noise_is_no_growth_and_a_leak_is() -> None:
    draw = np.random.default_rng(1)
    for seed in range(20):
        noise = draw.normal(300, 20, len(SECONDS))
        assert not trend(SECONDS.tolist(), noise.tolist()).grows(MOST_MIB_PER_HOUR), seed
    leak = draw.normal(300, 2, len(SECONDS)) + 30 * SECONDS / 3600
    assert trend(SECONDS.tolist(), leak.tolist()).grows(MOST_MIB_PER_HOUR)


def samples(mib_per_hour: float, sessions: int = 1) -> list[Sample]:
    names = ("storage_files", "storage_bytes", "temporary_files", "ray_bytes", "shared_files")
    found = []
    for second in SECONDS.tolist():
        session = 1 + int(second * sessions / 2700)
        process = {"pid": 7, "role": "driver", "rss": 0, "files": 9, "threads": 3}
        process["anonymous"] = process["pss"] = int(MIB * (300 + mib_per_hour * second / 3600))
        brief = process | {"pid": int(second), "role": "brief"}  # each lives for one sample
        listed = [process, brief]
        counts = dict.fromkeys(names, 5)
        found.append({"session": session, "second": second, "processes": listed, **counts})
    return found


def test_what_grows_ends_early_or_is_left_is_a_problem() -> None:
    fine = {"exit_code": 75, "ended_early": False, "left": {"processes": []}}
    assert problems(report(samples(2.0)) | fine) == []
    (line,) = problems(report(samples(40.0)) | fine)
    assert line.startswith("anonymous_mib of driver grow: 40.0 +- 0.0 an hour")
    left = fine | {"exit_code": 1, "ended_early": True, "left": {"processes": ["12"]}}
    lines = problems(report(samples(2.0)) | left)
    assert lines[0] == "the run ended early, with exit code 1"
    assert lines[-1] == "left: processes: ['12']"


def test_a_process_of_before_an_interruption_is_another_one() -> None:
    assert len(report(samples(2.0))["processes"]) == 1
    assert report(samples(2.0, sessions=3))["processes"] == []  # none lives for half of the time


def test_this_process_is_sampled_with_its_memory_and_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(10))
    sample = sample_of(os.getpid(), tmp_path, tmp_path)
    (own,) = (p for p in sample["processes"] if p["pid"] == os.getpid())
    assert own["role"] == "driver"
    assert 0 < own["anonymous"] <= own["pss"] <= 1.1 * own["rss"]
    assert abs(own["anonymous"] - memory_of(os.getpid())["anonymous"]) < 64 * MIB
    assert (sample["storage_files"], sample["storage_bytes"]) == (1, 10)


def test_what_a_run_leaves_is_named(tmp_path: Path) -> None:
    temporary, storage = tmp_path / "t", tmp_path / "s"
    for path in (
        "t/simclr_ray-x",
        "t/ray/session_1",
        *(f"s/r/step-0000000{k}-a" for k in range(3)),
    ):
        (tmp_path / path).mkdir(parents=True)
    (storage / "r" / ".run.json.1.tmp").touch()
    for k in range(3):
        (storage / "r" / f"step-0000000{k}-a" / "record.json").touch()
    own = psutil.Process()
    left = what_is_left({own.pid: own.create_time() - 60}, temporary, storage)  # given again
    assert left["temporary_folders"] == ["simclr_ray-x"]
    assert left["unfinished_files"] == ["r/.run.json.1.tmp"]
    assert left["checkpoints_beyond_two"] == ["step-00000000-a"]
    assert not left["processes"]


def test_a_line_of_too_few_blocks_says_nothing() -> None:
    assert not Trend(*trend([0.0, 5.0], [1.0, 1000.0])).grows(0.0)
