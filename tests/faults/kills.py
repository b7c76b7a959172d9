"""Kills at random steps, a seed each: `python -m tests.faults.kills --state FILE`.

Even seeds run one worker, and have to end with its losses and weights to the last bit; odd ones run
two. What is done stands in the file, a line a seed; the same command goes on after it.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any, Literal

from tests.faults.curves import (
    Curve,
    check_equal,
    check_same,
    last_step,
    repeated,
    tree_of,
    undisturbed,
)
from tests.ray.driver import Driver, own_ray
from tests.ray.images import write_splits

Victim = Literal["worker", "driver"]
SEEDS: dict[Victim, int] = {"worker": 20, "driver": 10}
EPOCHS, STEPS = 6, 60
INTERVAL = 5  # steps between checkpoints


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
    at = chance.randint(1, STEPS - 6)
    began = time.monotonic()
    run = Driver(config, tree, own_ray())
    run_folder = Path(run.folder.uri)
    try:
        run.wait(lambda: last_step(run_folder) >= at)
        time.sleep(chance.random() * 0.1)
        if victim == "worker":
            title = "RayTrainWorker" if workers > 1 else "SingleWorker"
            chance.choice([p for p, line in run.below().items() if title in line]).kill()
        else:
            run.kill_all()
            run = Driver(config, tree, own_ray())
        killed_at = last_step(run_folder)
        assert run.end() == 0, run.said
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
