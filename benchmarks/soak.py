"""Whether memory, files and processes of a long run stay what they are: a real one is watched.

    python -m benchmarks.soak [--minutes 45] [--folder runs/soak] [--every 5] [--workers 2]

`simclr-ray pretrain cifar10_cpu` on the images of $SIMCLR_RAY_DATA, evaluated each epoch of 5,000
images and saved every 10 steps, is sampled until the minutes are over, and then ended by SIGTERM.
Of each process that lives for half of the time after warm-up: memory, open files, threads, with a
straight line through means of a minute, and its standard error. The bound is on anonymous memory:
PSS also moves when other programs on the machine begin or end to share libraries. Then what is
left of it: processes, files in its temporary folder and in /dev/shm, hidden files in the storage.
What was sampled lies in FOLDER: after an interruption the same command goes on with run and clock.
Writes `benchmarks/results/soak.json`; exits with 1 where a bound is not kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import psutil

from benchmarks.record import portable, store

SHARED = Path("/dev/shm")  # noqa: S108 - looked at, not written
MIB: Final = 2**20
WARM_UP: Final = 0.3  # of the time: caches fill, allocators keep what they have had
BLOCK_S: Final = 60.0  # samples within it are not independent; their mean counts once
MOST_MIB_PER_HOUR: Final = 10.0  # two standard errors below the slope: 1 GiB in four days
MOST_FILES_PER_HOUR: Final = 2.0  # of open files, and of files in the storage
LEFT_S: Final = 30.0  # for processes to end after the driver has
NEVER: Final = 100_000  # epochs
# Below the temporary folder: logs of Ray's own sessions, and who shares decoded images, of which
# the next run removes what has ended (`simclr_ray/data/image_cache.py`); torch's cache, empty.
NOT_COUNTED: Final = ("ray", "simclr_ray-images-", "torchinductor_")

Sample = dict[str, Any]


class Trend(NamedTuple):
    """A straight line through samples, by the hour."""

    mean: float
    slope: float  # per hour
    error: float  # standard error of the slope
    blocks: int

    def grows(self, most: float) -> bool:
        """Return whether the slope is above `most` by more than two standard errors."""
        return self.slope - 2 * self.error > most


def trend(seconds: Sequence[float], values: Sequence[float], block_s: float = BLOCK_S) -> Trend:
    """Return the least-squares line through means of blocks, of three blocks at least.

    Args:
        seconds: When.
        values: What.
        block_s: Samples of so many seconds count once.
    """
    blocks: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for second, value in zip(seconds, values, strict=True):
        blocks[int(second // block_s)].append((second, value))
    points = np.array([np.mean(rows, axis=0) for rows in blocks.values()])
    if len(points) < 3:
        return Trend(float(np.mean(values)), float("nan"), float("nan"), len(points))
    hours, means = points[:, 0] / 3600, points[:, 1]
    centered = hours - hours.mean()
    slope = float(centered @ means / (centered @ centered))
    rest = means - means.mean() - slope * centered
    error = float(np.sqrt(rest @ rest / (len(points) - 2) / (centered @ centered)))
    return Trend(float(means.mean()), slope, error, len(points))


def main() -> int:
    """Run, sample, store; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two samples")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--name", default="soak", help="of the file of results")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    soak = Soak(arguments.folder.resolve(), arguments.every)
    ended = soak.run(60 * arguments.minutes, command(soak.storage, arguments.workers))
    result = report(soak.samples()) | ended
    broken = problems(result)
    words = [portable(word) for word in sys.argv[1:]]
    store(
        arguments.name,
        {
            "command": " ".join(["python", "-m", "benchmarks.soak", *words]),
            "minutes": arguments.minutes,
            "bounds": {
                "mib_per_hour": MOST_MIB_PER_HOUR,
                "files_per_hour": MOST_FILES_PER_HOUR,
                "standard_errors": 2,
                "warm_up_fraction": WARM_UP,
            },
            **result,
            "problems": broken,
        },
    )
    for line in (*map(line_of, result["processes"]), *(f"problem: {text}" for text in broken)):
        print(line)
    return 1 if broken else 0


def command(storage: Path, workers: int) -> list[str]:
    """Return the command of a run that has no end, evaluates and saves often."""
    images = Path(os.environ["SIMCLR_RAY_DATA"]) / "cifar10"
    overrides = [
        f"data.train={images / 'train'}", f"data.test={images / 'test'}", f"storage={storage}",
        "data.limit=5000", f"epochs={NEVER}", "evaluation.every_epochs=1",
        "evaluation.eval_train_limit=1000", "evaluation.test_limit=500", "schedule.warmup_epochs=1",
        "checkpoint.every_steps=10", f"scaling.num_workers={workers}", "health.on_collapse=warn",
    ]  # fmt: skip
    return [sys.executable, "-m", "simclr_ray", "pretrain", "cifar10_cpu", *overrides]


class Soak:
    """One run that is watched, and what has been sampled of it."""

    def __init__(self, folder: Path, every_s: float) -> None:
        self.storage, self.log, self.every_s = folder / "storage", folder / "samples.jsonl", every_s
        self.log_file = folder / "said"

    def samples(self) -> list[Sample]:
        """Return what has been sampled, also before an interruption."""
        if not self.log.is_file():
            return []
        return [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]

    def run(self, seconds: float, words: list[str]) -> dict[str, Any]:
        """Run until so many seconds were sampled in all; return what is left afterwards."""
        before = self.samples()
        offset = before[-1]["second"] + self.every_s if before else 0.0
        if offset >= seconds:
            raise SystemExit(f"{self.log} is complete: remove it to begin anew")
        session = 1 + max((sample["session"] for sample in before), default=0)
        temporary = Path(tempfile.mkdtemp(prefix="soak", dir="/tmp"))  # Ray's sockets: short
        seen: dict[int, float] = {}  # process -> when it began: a number is given again
        with self.log_file.open("a") as log:
            driver = subprocess.Popen(
                words, stdout=log, stderr=log, env=os.environ | {"TMPDIR": str(temporary)}
            )
        try:
            began = time.monotonic()
            while offset + time.monotonic() - began < seconds and driver.poll() is None:
                time.sleep(self.every_s)
                sample = sample_of(driver.pid, temporary, self.storage)
                seen |= {process["pid"]: process["began"] for process in sample["processes"]}
                second = round(offset + time.monotonic() - began, 1)
                with self.log.open("a") as log:
                    log.write(json.dumps({"session": session, "second": second, **sample}) + "\n")
            is_early = driver.poll() is not None
        finally:
            driver.send_signal(signal.SIGTERM)
            code = driver.wait(timeout=600)
        left = what_is_left(seen, temporary, self.storage)
        shutil.rmtree(temporary, ignore_errors=True)
        return {"exit_code": code, "ended_early": is_early, "left": left}


def sample_of(driver: int, temporary: Path, storage: Path) -> Sample:
    """Return memory, open files and threads of a process and all below it, and counts of files."""
    processes = []
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(driver)
        for process in (parent, *parent.children(recursive=True)):
            with suppress(psutil.Error, OSError):
                role = "driver" if process.pid == driver else role_of(process)
                processes.append(
                    {
                        "pid": process.pid, "began": process.create_time(), "role": role,
                        **memory_of(process.pid),
                        "rss": process.memory_info().rss, "files": process.num_fds(),
                        "threads": process.num_threads(),
                    }
                )  # fmt: skip
    names = files_in(storage)
    return {
        "processes": processes,
        "storage_files": len(names),
        "storage_bytes": sum(size for _, size in names),
        "temporary_files": len([n for n, _ in files_in(temporary) if is_own(n)]),
        "ray_bytes": sum(size for name, size in files_in(temporary) if not is_own(name)),
        "shared_files": len(list(SHARED.iterdir())),
    }


def memory_of(pid: int) -> dict[str, int]:
    """Return a process's memory in bytes, what it shares divided: `anonymous`, and all, `pss`."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    kilobytes: dict[str, str] = dict(re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE))
    anonymous = int(kilobytes.get("Pss_Anon", kilobytes["Pss"])) + int(kilobytes["SwapPss"])
    return {"anonymous": 1024 * anonymous, "pss": 1024 * int(kilobytes["Pss"])}


def role_of(process: psutil.Process) -> str:
    """Return what a process is by its command line, as Ray titles it: `RayTrainWorker`."""
    words = process.cmdline()
    titled = re.match(r"ray::([^.\s:]+)", words[0]) if words else None
    if titled:
        return titled[1]
    scripts = [Path(word).stem for word in words[:4] if word.endswith(".py")]
    return scripts[0] if scripts else Path(words[0]).name if words else process.name()


def files_in(folder: Path) -> list[tuple[str, int]]:
    """Return the files below a folder, relative, with their bytes; sockets are none."""
    entries = []
    for path in folder.rglob("*") if folder.is_dir() else ():
        with suppress(OSError):
            if path.is_file():
                entries.append((str(path.relative_to(folder)), path.stat().st_size))
    return entries


def is_own(name: str) -> bool:
    """Return whether a file of the temporary folder is to be gone when the run is."""
    return not Path(name).parts[0].startswith(NOT_COUNTED)


def what_is_left(pids: Mapping[int, float], temporary: Path, storage: Path) -> dict[str, list[str]]:
    """Return processes and files of the run that are there after its end."""
    deadline = time.monotonic() + LEFT_S
    alive = set(pids)
    while alive and time.monotonic() < deadline:
        alive = {pid for pid in alive if is_alive(pid, pids[pid])}
        time.sleep(0.5)
    shared = [path.name for path in SHARED.glob("simclr_ray-*")]
    kept = sorted({name.split("/")[1] for name, _ in files_in(storage) if "/step-" in name})
    hidden = [name for name, _ in files_in(storage) if Path(name).name.startswith(".")]
    return {
        "processes": [str(pid) for pid in sorted(alive)],
        "temporary_files": sorted(name for name, _ in files_in(temporary) if is_own(name)),
        "temporary_folders": sorted(p.name for p in temporary.iterdir() if is_own(p.name)),
        "shared_files": [name for name in shared if int(name.split("-")[1]) in set(pids)],
        "unfinished_files": [name for name in hidden if name.endswith(".tmp")],
        "lock_holders": [name for name, _ in files_in(storage) if name.endswith("lock.holder")],
        "checkpoints_beyond_two": kept[:-2],
    }


def is_alive(pid: int, began: float) -> bool:
    """Return whether the process that began then runs."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return process.create_time() == began and process.status() != psutil.STATUS_ZOMBIE
    return False


def report(samples: list[Sample]) -> dict[str, Any]:
    """Return trends of each process that lived long enough, and of the files, after warm-up."""
    last = samples[-1]["second"] if samples else 0.0
    kept = [sample for sample in samples if sample["second"] >= WARM_UP * last]
    seen: dict[tuple[int, int], list[tuple[float, Sample]]] = defaultdict(list)
    for sample in kept:
        for process in sample["processes"]:
            key = sample["session"], process["pid"]
            seen[key].append((sample["second"], process))
    lived = [rows for rows in seen.values() if len(rows) > len(kept) / 2]
    seconds = [sample["second"] for sample in kept]
    names = ("storage_files", "storage_bytes", "temporary_files", "ray_bytes", "shared_files")
    counts = {name: [sample[name] for sample in kept] for name in names}
    counts["number_of_processes"] = [len(sample["processes"]) for sample in kept]
    return {
        "sampled_s": last,
        "samples": len(kept),
        "sessions": len({sample["session"] for sample in samples}),
        "processes": [_process(rows) for rows in lived],
        "files": {name: trend(seconds, values)._asdict() for name, values in counts.items()},
    }


def _process(rows: list[tuple[float, Sample]]) -> dict[str, Any]:
    """Return the trends of one process."""
    seconds = [second for second, _ in rows]

    def of(key: str, unit: int = 1) -> dict[str, Any]:
        return trend(seconds, [sample[key] / unit for _, sample in rows])._asdict()

    return {
        "role": rows[-1][1]["role"],
        "anonymous_mib": of("anonymous", MIB),
        "pss_mib": of("pss", MIB),
        "rss_mib": of("rss", MIB),
        "open_files": of("files"),
        "threads": of("threads"),
    }


def problems(result: dict[str, Any]) -> list[str]:
    """Return what is not within its bounds, a line each."""
    broken = [f"the run ended early, with exit code {result['exit_code']}"] * result["ended_early"]
    broken += [f"exit code {result['exit_code']}, not 75"] * (result["exit_code"] != 75)
    broken += ["no process lived long enough"] * (not result["processes"])
    bounds = (("anonymous_mib", MOST_MIB_PER_HOUR), ("open_files", MOST_FILES_PER_HOUR))
    for process in result["processes"]:
        for key, most in bounds:
            line = Trend(**process[key])
            if line.grows(most):
                text = f"{line.slope:.1f} +- {line.error:.1f} an hour"
                broken.append(f"{key} of {process['role']} grow: {text}")
    for key in ("storage_files", "temporary_files", "number_of_processes"):
        line = Trend(**result["files"][key])
        if line.grows(MOST_FILES_PER_HOUR):
            broken.append(f"{key} grow: {line.slope:.1f} +- {line.error:.1f} an hour")
    return broken + [f"left: {what}: {names}" for what, names in result["left"].items() if names]


def line_of(process: dict[str, Any]) -> str:
    """Return a process's memory in a line."""
    memory, files = Trend(**process["anonymous_mib"]), Trend(**process["open_files"])
    return (
        f"{process['role']:28} {memory.mean:8.1f} MiB {memory.slope:+8.1f} +- {memory.error:.1f} "
        f"MiB/hour, {files.mean:.0f} open files"
    )


if __name__ == "__main__":
    sys.exit(main())
