"""Kills at random steps, a seed each: `python -m tests.faults.kills --state FILE`.

Even seeds run one worker, and have to end with its losses and weights to the last bit; odd ones run
two. What is done stands in the file, a line a seed; the same command goes on after it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import psutil

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.train.resolve import resolve
from tests.faults.curves import (
    Curve,
    check_equal,
    check_same,
    last_step,
    repeated,
    tree_of,
    undisturbed,
)
from tests.ray.images import write_splits

Victim = Literal["worker", "driver"]
SEEDS: dict[Victim, int] = {"worker": 20, "driver": 10}
EPOCHS, STEPS = 6, 60
INTERVAL = 5  # steps between checkpoints
WAIT_S = 400.0


class Pretrain:
    """A `pretrain` in a process of its own, with a Ray of its own."""

    def __init__(self, config: Path, log: Path) -> None:
        env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        with log.open("a") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "simclr_ray", "pretrain", str(config)],
                stdout=out, stderr=out, env=env,
            )  # fmt: skip
        self.log = log

    def below(self, part: str = "") -> list[psutil.Process]:
        """Return the processes that it has started whose command line contains `part`."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if part in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def wait_for(self, until: Callable[[], bool]) -> None:
        """Return when something holds; an `AssertionError` says that it ended before."""
        deadline = time.monotonic() + WAIT_S
        while not until():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def end(self) -> None:
        """Wait until it ends well."""
        assert self.process.wait(timeout=WAIT_S) == 0, self.log.read_text()


def kill_at_random(
    victim: Victim, seed: int, folder: Path, tree: dict[str, Any], expected: Curve
) -> dict[str, Any]:
    """Kill one worker, or the driver and all below it, at a random step; return what was seen."""
    chance = random.Random(f"{victim} {seed}")
    workers = 1 + seed % 2
    tree = tree | {
        "storage": str(folder / f"{victim}-{seed}"),
        "scaling": {
            "num_workers": workers,
            "cpus_per_worker": 0.5,
            "cpus_per_data_actor": 0.3,
            "threads_per_worker": 1,
        },  # as `undisturbed`
    }
    config = folder / f"{victim}-{seed}.yaml"
    config.write_text(cfg.dump_yaml(tree))
    run_folder = Path(resolve(cfg.validate(Experiment, tree)).folder.uri)
    at = chance.randint(1, STEPS - 6)
    began = time.monotonic()
    run = Pretrain(config, folder / f"{victim}-{seed}.log")
    try:
        run.wait_for(lambda: last_step(run_folder) >= at)
        time.sleep(chance.random() * 0.1)
        if victim == "worker":
            title = "RayTrainWorker" if workers > 1 else "LoneWorker"
            chance.choice(run.below(title)).kill()
        else:
            everything = [*run.below(), psutil.Process(run.process.pid)]
            for process in reversed(everything):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            run.process.wait()
            run = Pretrain(config, run.log)
        killed_at = last_step(run_folder)
        run.end()
    finally:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGKILL)
    again = repeated(run_folder)
    assert len(again) <= INTERVAL, again
    if workers == 1:
        check_same(run_folder, expected)
    else:
        check_equal(run_folder, tree, expected.losses)
    return {
        "victim": victim, "seed": seed, "workers": workers, "step": killed_at,
        "repeated": len(again), "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def main() -> int:
    """Do what is not yet done of the seeds; 1 where one has failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--state", type=Path, required=True, help="what is done, a line a seed")
    given = parser.parse_args()
    folder = given.state.resolve().parent / f"{given.state.stem}-runs"
    folder.mkdir(parents=True, exist_ok=True)
    lines = given.state.read_text().splitlines() if given.state.exists() else []
    done = {(line["victim"], line["seed"]) for line in map(json.loads, lines) if line["passed"]}
    tree = tree_of(
        write_splits(folder, 330), folder / "x", epochs=EPOCHS,
        checkpoint={"every_steps": INTERVAL},
    )  # fmt: skip
    expected = undisturbed(tree)
    failed = 0
    for victim, number in SEEDS.items():
        for seed in range(number):
            if (victim, seed) in done:
                continue
            try:
                seen = kill_at_random(victim, seed, folder, tree, expected) | {"passed": True}
            except AssertionError as error:
                seen = {
                    "victim": victim,
                    "seed": seed,
                    "passed": False,
                    "error": str(error)[-2000:],
                }
                failed += 1
            with given.state.open("a") as out:
                out.write(json.dumps(seen) + "\n")
            sys.stdout.write(f"{seen}\n")
            sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
