"""The curve that a run without faults gives, and how far another may be from it.

What one worker computes is compared to the last bit. Another number of workers sums in another
order: its losses agree within 1e-9 for 50 steps at least, and after that go apart no faster than
those of two runs of one worker of which one begins 1e-15 away in one weight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.batches import local_batches
from simclr_ray.nn.build import build_loss, build_model
from simclr_ray.storage import checkpoint
from simclr_ray.storage.metrics_log import read_records
from simclr_ray.train import loop
from simclr_ray.train.resolve import resolve
from simclr_ray.train.worker import prepare_training

CLOSE, STEPS_CLOSE = 1e-9, 50
# one pair of runs is one draw of how fast they part: another pair parts this many times faster
LUCK = 1e3


def tree_of(folder: Path, storage: Path, *, epochs: int, **sections: Any) -> dict[str, Any]:
    """Return a run in float64 of 10 steps an epoch on 330 shapes; sections replace their like."""
    tree = {
        "name": "faults",
        "data": {"train": str(folder / "train.parquet"), "test": ""},
        "augment": {"name": "simclr", "size": 32, "blur": 0.5},
        "encoder": {"name": "resnet", "depth": 10, "width": 0.125, "stem": "strided"},
        "head": {"name": "mlp", "dim": 16},
        "batch_size": 32,
        "epochs": epochs,
        "loss": {"name": "ntxent", "temperature": 1.0},  # at 0.1 roundings grow by 1e6 in 100 steps
        "health": {"on_collapse": "warn"},  # it learns little
        "precision": "float64",
        "schedule": {"learning_rate": 0.5, "warmup_steps": 5},
        "evaluation": {"every_epochs": 0},
        "checkpoint": {"every_epochs": 1},
        "tracking": {"log_every_steps": 1, "system_metrics": False},
        "storage": str(storage),
    }
    return tree | sections


class Curve(NamedTuple):
    """What a run without faults gives."""

    losses: list[float]
    tensors: dict[str, torch.Tensor]  # of encoder and head, after the last step


def undisturbed(tree: Mapping[str, Any], *, moved_by: float = 0.0) -> Curve:
    """Return what one worker computes in this process, one weight moved by so much before."""
    resolved = resolve(cfg.validate(Experiment, dict(tree)))
    experiment, source = resolved.config, resolved.source
    torch.set_num_threads(1)
    model = build_model(experiment)
    optimizer = prepare_training(model, experiment, torch.device("cpu"))
    with torch.no_grad():
        next(model.parameters())[0, 0, 0, 0] += moved_by
    losses: list[float] = []
    loop.train(
        model,
        build_loss(experiment),
        optimizer,
        local_batches(experiment, source, range(resolved.total_steps)),
        loop.StepSchedule(
            steps_per_epoch=resolved.steps_per_epoch,
            total_steps=resolved.total_steps,
            warmup_steps=resolved.warmup_steps,
            peak_learning_rate=experiment.peak_learning_rate(),
            global_batch_size=experiment.batch_size,
            log_every=1,
            config=experiment.schedule,
        ),
        loop.Callbacks(lambda m: losses.append(m.loss), lambda *_: None, lambda *_: None),
        precision=experiment.precision,
        seed=experiment.seed,
        num_groups=experiment.num_groups,
        clip_norm=experiment.optimizer.clip_norm,
    )
    return Curve(losses, {name: t.clone() for name, t in model.state_dict().items()})


def last_step(run_folder: Path) -> int:
    """Return the last step in a run's log; 0 where there is none yet."""
    log = run_folder / "metrics.jsonl"
    records = read_records(log.read_text(encoding="utf-8")) if log.exists() else []
    return int(records[-1]["step"]) if records else 0


def logged_losses(run_folder: Path) -> list[tuple[int, float]]:
    """Return step and loss of each record in the order of the log, repeated steps included."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["step"], r["train/loss"]) for r in records if "train/loss" in r]


def repeated(run_folder: Path) -> list[int]:
    """Return the steps that were made more than once, once for each further time."""
    steps = [step for step, _ in logged_losses(run_folder)]
    return [step for place, step in enumerate(steps) if step in steps[:place]]


def check_same(run_folder: Path, expected: Curve) -> None:
    """Hold all that a run of one worker has logged and kept to `expected`, to the last bit."""
    logged = logged_losses(run_folder)
    assert {step for step, _ in logged} == set(range(1, len(expected.losses) + 1))
    for step, loss in logged:
        assert loss == expected.losses[step - 1], step
    (newest,) = run_folder.glob(f"step-{len(expected.losses):08d}-*")
    kept = checkpoint.read(newest).tensors
    weights = {name[6:]: t for name, t in kept.items() if name.startswith("model.")}
    assert weights.keys() == expected.tensors.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected.tensors[name]), name


def check_equal(run_folder: Path, tree: Mapping[str, Any], expected: Sequence[float]) -> None:
    """Hold every loss that a run with any number of workers has logged against `expected`."""
    beside = undisturbed(tree, moved_by=1e-15).losses
    apart = [abs(a - b) / abs(b) for a, b in zip(beside, expected, strict=True)]
    allowed = [max(CLOSE, LUCK * most) for most in accumulate(apart, max)]
    logged = logged_losses(run_folder)
    assert {step for step, _ in logged} == set(range(1, len(expected) + 1))
    for step, loss in logged:
        distance = abs(loss - expected[step - 1]) / abs(expected[step - 1])
        limit = CLOSE if step <= STEPS_CLOSE else allowed[step - 1]
        assert distance <= limit, (step, distance, limit)
