"""Checkpoints of 100 MB to a store that takes 10 MB a second: how long training stands still."""

from __future__ import annotations

import json
import statistics
import sys

import pytest

from simclr_ray import config as cfg
from tests.cluster.nodes import Network
from tests.cluster.services import S3
from tests.faults.curves import tree_of
from tests.ray.images import write_splits

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]
STORE_BYTES_PER_S = 10e6
EVERY = 100  # steps between checkpoints
READ = """
import json, sys, tempfile, time
from pathlib import Path
from simclr_ray.config.experiment import Experiment
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.train.resolve import resolve
folder = resolve(Experiment.load(sys.argv[1])).folder
records = [json.loads(line) for line in folder.read_text("metrics.jsonl").splitlines()]
times = {r["step"]: r["time"] for r in records if "train/loss" in r}
name = folder.checkpoints()[0]
with folder.fetched(name) as local:
    size = sum(file.stat().st_size for file in local.iterdir())
    began = time.monotonic()
    RunFolder.of(folder.storage, "synchronous").put_checkpoint(local, name)
    print(json.dumps([times, size, time.monotonic() - began]))
"""


def test_a_checkpoint_to_a_slow_store_does_not_hold_training_up(network: Network, s3: S3) -> None:
    tree = tree_of(
        write_splits(network.folder, 330), network.folder / "x", epochs=30,
        precision="float32", encoder={"name": "resnet", "depth": 18, "stem": "strided"},
        batch_size=8, checkpoint={"every_epochs": 30, "every_steps": EVERY},
        scaling={"num_workers": 1, "cpus_per_worker": 0.5, "cpus_per_data_actor": 0.5},
        tracking={"uri": f"sqlite:///{network.folder}/m.db", "log_every_steps": 1,
                  "system_metrics": False},
    ) | {"storage": s3.uri("runs")}  # fmt: skip
    config = network.folder / "run.yaml"
    config.write_text(cfg.dump_yaml(tree))
    with network.node("head", head=True, cpus=2) as head:
        s3.slow(0.0, bytes_per_s=STORE_BYTES_PER_S)
        ours = [sys.executable, "-m", "simclr_ray", "pretrain", str(config)]
        done = head.run(ours, env=s3.env, timeout_s=1200)
        assert done.returncode == 0, done.stdout + done.stderr
        read = head.run([sys.executable, "-c", READ, str(config)], env=s3.env)
        assert read.returncode == 0, read.stderr
    times, size, synchronous_s = json.loads(read.stdout.splitlines()[-1])
    at = {int(step): time for step, time in times.items()}
    took = {step: at[step] - at[step - 1] for step in at if step - 1 in at}
    usual = statistics.median(took.values())
    # a checkpoint is written after the step is logged; the last one is waited for
    saved = [step for step in range(EVERY, max(at), EVERY) if step + 1 in took]
    pauses = [took[step + 1] - usual for step in saved]
    fraction = statistics.median(pauses) / synchronous_s
    sys.stdout.write(
        f"{size / 1e6:.0f} MB in {synchronous_s:.1f} s; pauses {[f'{p:.2f}' for p in pauses]} s "
        f"beside steps of {usual:.2f} s: {fraction:.3f}\n"
    )
    assert len(pauses) >= 5
    assert size > 80e6
    assert fraction <= 0.15
