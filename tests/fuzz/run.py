"""Fuzzing: broken input gives an error of ours or none, in bounded time and memory.

    python -m tests.fuzz.run --seconds 600 --seed 0 --state fuzz.json

Case k of a target is drawn by (seed, target, k) alone: `--target parquet --case 17` shows it again.
With a state file a later call goes on behind the last case. Each target runs in a process of its
own, whose memory may grow by `LIMIT_MIB`; a case takes at most `CASE_S`. A process that is killed
(by a segmentation fault, say) costs its case, which is a finding, and goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from simclr_ray.augment.decode import ImageError
from simclr_ray.errors import SimclrRayError

OURS = (SimclrRayError, ImageError)
LIMIT_MIB = 512
CASE_S = 20
CHUNK_S = 30.0  # of a target, before the next has its turn


def run_case(name: str, seed: int, case: int) -> str:
    """Run one case; return what is wrong, or nothing."""
    from tests.fuzz.targets import TARGETS

    draw = random.Random(f"{seed}/{name}/{case}")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        try:
            TARGETS[name].run(draw, Path(folder))
        except OURS:
            return ""
        except Exception as error:  # noqa: BLE001 - this is what is looked for
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if "/simclr_ray/" in frame.filename]
            at = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
            return f"{type(error).__name__} at {at}: {str(error)[:200]}"
    return ""


def work(name: str, seed: int, first: int, seconds: float) -> None:
    """Run cases from `first` on; print a line of JSON before and after each."""
    import warnings

    from tests.fuzz import targets  # imported before memory is limited

    warnings.simplefilter("ignore")
    run_case(name, seed, 10**9)  # what is imported late, and caches
    assert targets.TARGETS
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_MIB * 2**20, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process
    deadline, case = time.monotonic() + seconds, first
    while time.monotonic() < deadline:
        print(json.dumps({"begin": case}), flush=True)
        signal.alarm(CASE_S)
        found = run_case(name, seed, case)
        signal.alarm(0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps({"end": case, "found": found, "peak_mib": peak}), flush=True)
        case += 1


def one_chunk(name: str, seed: int, state: dict[str, Any], seconds: float) -> list[str]:
    """Run cases of a target in a process of its own, from where the state says; update it."""
    about = state.setdefault(name, {"next": 0, "found": [], "peak_mib": 0})
    command = [
        sys.executable, "-m", "tests.fuzz.run", "--work", name, "--seed", str(seed),
        "--case", str(about["next"]), "--seconds", str(seconds),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = [f"{name} {line['end']}: {line['found']}" for line in lines if line.get("found")]
    begun = [line["begin"] for line in lines if "begin" in line]
    ended = [line["end"] for line in lines if "end" in line]
    if len(begun) > len(ended):
        how = "took more than" if done.returncode == -signal.SIGALRM else "ended by"
        what = f"{CASE_S} s" if done.returncode == -signal.SIGALRM else f"code {done.returncode}"
        found.append(f"{name} {begun[-1]}: the process {how} {what}: {done.stderr[-300:]}")
    elif not begun:
        found.append(f"{name}: the process did not start: {done.stderr[-500:]}")
    about["next"] = begun[-1] + 1 if begun else about["next"]
    about["found"] += found
    about["peak_mib"] = max([about["peak_mib"], *(line.get("peak_mib", 0) for line in lines)])
    return found


def main() -> int:
    """Run targets in turn until the time is over; return 1 if something was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("FUZZ_S", "600")))
    parser.add_argument("--seed", type=int, default=int(os.environ.get("FUZZ_SEED", "0")))
    parser.add_argument("--state", type=Path, default=os.environ.get("FUZZ_STATE"))
    parser.add_argument("--target", action="append", default=[])
    parser.add_argument("--case", type=int, default=-1)
    parser.add_argument("--work", default="")
    given = parser.parse_args()
    if given.work:
        work(given.work, given.seed, given.case, given.seconds)
        return 0
    from tests.fuzz.targets import TARGETS

    names = given.target or list(TARGETS)
    if given.case >= 0:
        print(run_case(names[0], given.seed, given.case) or "nothing found")
        return 0
    state: dict[str, Any] = {}
    if given.state and given.state.exists():
        state = json.loads(given.state.read_text())
        if state.pop("seed") != given.seed:
            parser.error(f"{given.state} is of another seed")
    chunk = min(CHUNK_S, given.seconds / len(names))
    deadline, turn = time.monotonic() + given.seconds, 0
    while time.monotonic() < deadline:
        for line in one_chunk(names[turn % len(names)], given.seed, state, chunk):
            print(f"found: {line}", flush=True)
        turn += 1
        if given.state:
            given.state.write_text(json.dumps({"seed": given.seed, **state}, indent=1))
    for name, about in state.items():
        shown = f"{about['next']:>8,} cases  {len(about['found'])} found"
        print(f"{name:<16} {shown}  peak {about['peak_mib']:,} MiB")
    return 1 if any(about["found"] for about in state.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
