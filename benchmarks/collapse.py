"""Whether runs that do not learn are told from those that do, and the cause is named.

    python -m benchmarks.collapse [--only healthy causes rollback] [--seed 0] [--state FOLDER]

Healthy runs of many settings, of which none may be stopped; injected causes, each of which is to be
named; and rates too high for a run, from which `health.on_*=rollback` is to save it. CIFAR-10
images of 12 px and a ResNet-10 of an eighth of the width, `$SIMCLR_RAY_DATA/cifar10`. Runs of the
first two kinds take place in this process, without Ray; those of the third are `pretrain`.

What is done is kept in `--state`, so that the same command goes on. The result is stored as
`benchmarks/results/collapse.json`, for all three and seed 0. Thresholds were chosen on runs of
`--seed 100`, whose weights, order and views are others.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.collapse_cases import CAUSES, HEALTHY, ROLLBACKS, Case, Cause, Settings
from benchmarks.record import portable, store
from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.batch import Batch
from simclr_ray.data.batches import local_batches
from simclr_ray.data.source import Source
from simclr_ray.errors import UnhealthyRunError
from simclr_ray.evaluation.online import OnlineEvaluation
from simclr_ray.nn.build import build_loss, build_model
from simclr_ray.storage.run_folder import METRICS, RunFolder
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.train import loop
from simclr_ray.train.health import HealthWatch
from simclr_ray.train.worker import prepare_training
from simclr_ray.train.worker_batches import finish_batches

CPU = torch.device("cpu")
LOG_EVERY = 10
PARTS = ("healthy", "causes", "rollback")
SAVED_MARGIN = 0.1  # of cosines: what a run that learns has after some hundred steps

Row = dict[str, Any]


def main() -> None:
    """Run what is left, and store all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=Path("runs/collapse"))
    parser.add_argument("--case", default="", help="one alone, which is not stored")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.state.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Row]] = {part: [] for part in args.only}
    for part in args.only:
        for number, case in enumerate(_cases(part)):
            if not args.case or args.case == case.name:
                rows[part].append(_done(part, case, args.seed + number, args))
        _say(part, rows[part])
    if tuple(args.only) == PARTS and args.seed == 0 and not args.case:
        command = portable(f"SIMCLR_RAY_DATA={os.environ['SIMCLR_RAY_DATA']} make collapse")
        store("collapse", {"command": command.removeprefix("SIMCLR_RAY_DATA=$SIMCLR_RAY_DATA "),
                           **rows})  # fmt: skip


def _cases(part: str) -> tuple[Case, ...]:
    return {"healthy": HEALTHY, "causes": CAUSES, "rollback": ROLLBACKS}[part]


def _done(part: str, case: Case, seed: int, args: argparse.Namespace) -> Row:
    """Return the result of a case, stored or run now."""
    file = args.state / f"{part}-{case.name}-{seed}.json"
    if file.is_file() and not args.case:
        row: Row = json.loads(file.read_text())
        return row
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        if part == "rollback":
            row = rolled_back(case, seed, Path(scratch))
        else:
            records: list[Row] = []
            row = alone(case, seed, Path(scratch), records)
            lines = "\n".join(json.dumps(record) for record in records)
            file.with_suffix(".jsonl").write_text(lines)
    row = {"name": case.name, "seed": seed, **row, "seconds": round(time.monotonic() - began, 1)}
    if isinstance(case, Cause):
        row["named"] = case.named in row["said"]
    file.write_text(json.dumps(row))
    print(json.dumps(row), flush=True)
    return row


def _say(part: str, rows: list[Row]) -> None:
    good = {
        "healthy": ("stopped", sum(bool(row["said"]) for row in rows)),
        "causes": ("named", sum(row.get("named", False) for row in rows)),
        "rollback": ("saved", sum(row.get("saved", False) for row in rows)),
    }[part]
    print(f"{part}: {good[1]} of {len(rows)} {good[0]}", flush=True)


def experiment_of(settings: Settings, seed: int, folder: Path) -> Experiment:
    """Return the experiment of a case; what is not said is CIFAR-10's."""
    data = {"train": f"{os.environ['SIMCLR_RAY_DATA']}/cifar10/train", "limit": 320}
    tree: dict[str, Any] = {
        "name": "collapse",
        "seed": seed,
        "data": data,
        "augment": {"name": "simclr", "size": 12, "strength": 0.5, "blur": 0.0, "min_area": 0.2},
        "encoder": {"name": "resnet", "depth": 10, "width": 0.125, "stem": "cifar"},
        "head": {"name": "mlp", "layers": 2, "dim": 64},
        "loss": {"name": "ntxent", "temperature": 0.2},
        "optimizer": {"name": "lars", "weight_decay": 1e-4},
        "schedule": {"learning_rate": 6.0, "scaling": "linear", "warmup_epochs": 1.0},
        "batch_size": 16,
        "epochs": 13,
        "evaluation": {"every_epochs": 2},
        "tracking": {"log_every_steps": LOG_EVERY, "system_metrics": False},
        "storage": str(folder / "runs"),
    }
    for path, value in settings.items():
        *above, key = path.split(".")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[key] = {**value} if isinstance(value, dict) else value
    return cfg.validate(Experiment, tree)


def alone(case: Case, seed: int, folder: Path, records: list[Row]) -> Row:
    """Train a case in this process until its end, or until the watch stops it."""
    experiment = experiment_of(case.settings, seed, folder)
    if case.images is not None:
        case.images(folder / "train.parquet", seed)
        data = experiment.data.model_copy(update={"train": str(folder / "train.parquet")})
        experiment = experiment.model_copy(update={"data": data})
    source = Source.open(experiment.data.train, experiment.data.columns, experiment.data.limit)
    warmup = experiment.warmup_steps(source.num_pairs)
    health = HealthWatch(experiment, warmup)
    message = ""
    clock = _SlowClock(case.step_s) if case.step_s else time
    try:
        with mock.patch("simclr_ray.train.meter.time", clock):
            _train(case, experiment, source, health, records)
    except UnhealthyRunError as error:
        message = str(health.explained(error))
    last = {k: round(v, 4) for r in records for k, v in r.items() if k in SHOWN}
    return {"settings": dict(case.settings), "said": message, "step": health.last_step, **last}


SHOWN = ("eval/margin", "eval/effective_rank", "train/mean_loss", "train/images_per_s")


class _SlowClock:
    """Stands for `time` in the meter: each step takes so many seconds."""

    def __init__(self, step_s: float) -> None:
        self.step_s, self.now = step_s / 2, 0.0  # which is asked twice a step

    def perf_counter(self) -> float:
        self.now += self.step_s
        return self.now


def _train(
    case: Case, experiment: Experiment, source: Source, health: HealthWatch, records: list[Row]
) -> None:
    """Do what a worker does, and show each record to the watch as the driver does."""
    per_epoch = experiment.steps_per_epoch(source.num_pairs)
    total = experiment.total_steps(source.num_pairs)
    model = build_model(experiment)
    optimizer = prepare_training(model, experiment, CPU)
    if case.model is not None:
        case.model(model)
    loss = build_loss(experiment)
    evaluation = OnlineEvaluation(experiment, source, 0, 1, CPU)

    def send(step: int, values: dict[str, float]) -> None:
        records.append({"step": step, "epoch": step / per_epoch, **values})
        health(records[-1])

    def report(metrics: loop.Metrics) -> None:
        named = metrics._asdict()
        named[loss.top1_name] = named.pop("top1")
        step = named.pop("step")
        send(step, {f"train/{key}": v for key, v in named.items() if key != "epoch"})

    def epoch_end(epoch: int, step: int) -> None:
        if experiment.evaluation.every_epochs and epoch % experiment.evaluation.every_epochs == 0:
            send(step, evaluation(model))

    def batches() -> Iterator[Batch]:
        for batch in local_batches(experiment, source, range(total)):
            if case.before_step is not None:
                case.before_step(model, batch.step)
            yield case.batch(batch) if case.batch is not None else batch

    send(0, evaluation.before_training(model))
    schedule = loop.StepSchedule(
        per_epoch, total, experiment.warmup_steps(source.num_pairs),
        experiment.peak_learning_rate(), experiment.batch_size,
        experiment.tracking.log_every_steps, 0, experiment.schedule,
    )  # fmt: skip
    loop.train(
        model, loss, optimizer, finish_batches(experiment, source, batches(), CPU), schedule,
        loop.Callbacks(report, epoch_end, lambda _: None), precision=experiment.precision,
        seed=experiment.seed, num_groups=experiment.num_groups,
        clip_norm=experiment.optimizer.clip_norm,
    )  # fmt: skip


def rolled_back(case: Case, seed: int, folder: Path) -> Row:
    """Pretrain under `rollback`; a run is saved that ends, rolled back, and has learned."""
    from simclr_ray.train.driver import pretrain

    policy = {"health.on_divergence": "rollback", "health.on_collapse": "rollback"}
    scaling = {"scaling.num_workers": 1, "scaling.threads_per_worker": 1}
    experiment = experiment_of({**case.settings, **policy, **scaling}, seed, folder)
    message, margin = "", math.nan
    try:
        run = pretrain(experiment)
        margin = run.metrics["eval/margin"]
    except UnhealthyRunError as error:
        message = str(error)
    (name,) = (p.parent.name for p in (folder / "runs").glob("*/run.json"))
    run_folder = RunFolder(str(folder / "runs"), name)
    record = RunRecord.read(run_folder)
    history = (run_folder.read_json("rollbacks.json", dict) or {}).get("history", [])
    lines = (run_folder.read_text(METRICS) or "").count("\n")
    return {
        "settings": dict(case.settings),
        "said": message,
        "rollbacks": record.rollbacks,
        "rate_multiplier": record.rate_multiplier,
        "history": [{k: v for k, v in entry.items() if k != "to"} for entry in history],
        "records": lines,
        "eval/margin": None if math.isnan(margin) else round(margin, 4),
        "saved": not message and record.rollbacks > 0 and margin > SAVED_MARGIN,
    }


if __name__ == "__main__":
    main()
