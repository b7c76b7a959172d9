"""What a study of small trials takes beside the arithmetic of its trials, and whether it is theirs.

    python -m benchmarks.trials $SIMCLR_RAY_DATA/cifar10/train $SIMCLR_RAY_DATA/cifar10/test

Runs a study of 20 trials (five temperatures, four seeds) by its command, and the bare arithmetic of
each trial, views, steps and evaluation, in plain processes without Ray, MLflow and files: as many
at a time as the study runs. Every number of every trial is compared. Then the study is run anew,
with a trial that diverges, and with a process killed in the middle of a trial: the others, and the
one that was killed, are to have the same numbers. Writes `benchmarks/results/trials.json`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.record import portable, store
from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.metrics import EPOCH_METRICS
from simclr_ray.data.batches import local_batches
from simclr_ray.evaluation.decoded import DECODED
from simclr_ray.evaluation.evaluate import score_networks
from simclr_ray.evaluation.online import OnlineEvaluation
from simclr_ray.evaluation.scores import TRAINED
from simclr_ray.nn.build import build_loss, build_model
from simclr_ray.studies.files import load_study
from simclr_ray.studies.folder import StudyFolder, TrialOutcome
from simclr_ray.studies.plan import base_tree
from simclr_ray.studies.trials import plan
from simclr_ray.train import loop
from simclr_ray.train.resolve import resolve
from simclr_ray.train.rollback import Rollbacks
from simclr_ray.train.step_schedule import schedule_of
from simclr_ray.train.worker import prepare_process, prepare_training

STUDY: dict[str, Any] = {
    "name": "trials",
    "question": "What do small trials take?",
    "base": "cifar10_study_cpu",
    "set": {"data.limit": 4096, "epochs": 4, "augment.size": 16, "evaluation.size": 16},
    "space": {"loss.temperature": {"grid": [0.05, 0.1, 0.2, 0.5, 1.0]}},
    "seeds": [0, 1, 2, 3],
    "metric": "final/linear_top1",
    "protocols": ["knn", "linear"],
}
DIVERGING = {"optimizer.name": "sgd", "schedule.learning_rate": 1e30}
ACTOR = "ray::ImplicitFunc"  # as Tune calls the processes that trials share


def main() -> None:
    """Measure, compare, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--at-a-time", type=int, default=os.cpu_count())
    args = parser.parse_args()
    data = [f"data.train={args.train}", f"data.test={args.test}"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        wall_s, outcomes = _run(folder / "whole", STUDY, data)
        bare_s, bare = _bare(folder / "whole", data, args.at_a_time)
        space = {"loss.temperature": STUDY["space"]["loss.temperature"]}
        cases = {f"{t}": {"loss.temperature": t} for t in space["loss.temperature"]["grid"]}
        broken = {**STUDY, "space": {"setting": {"cases": {**cases, "diverging": DIVERGING}}}}
        _, disturbed = _run(folder / "broken", broken, data, kill="setting-0.2_seed-1")
    arithmetic = sum(bare_s.values()) / args.at_a_time
    result = {
        "command": portable("python -m benchmarks.trials " + " ".join([args.train, args.test])),
        "trials": len(outcomes),
        "at_a_time": args.at_a_time,
        "wall_s": round(wall_s, 1),
        "arithmetic_s": round(arithmetic, 1),
        "ratio": round(wall_s / arithmetic, 3),
        "seconds_of_a_trial": round(sum(bare_s.values()) / len(bare_s), 2),
        "equal_to_bare": sum(_facts(outcomes[name]) == bare[name] for name in bare),
        **_after_trouble(outcomes, disturbed),
    }
    print(json.dumps(result, indent=1))
    store("trials", result)


def _run(
    folder: Path, study: dict[str, Any], data: list[str], kill: str = ""
) -> tuple[float, dict[str, TrialOutcome]]:
    """Run a study by its command; return its seconds, from start to exit, and outcomes."""
    folder.mkdir()
    path = folder / "study.yaml"
    path.write_text(cfg.dump_yaml(study))
    where = StudyFolder(str(folder / "studies"), study["name"])
    called = [sys.executable, "-m", "simclr_ray", "study", "run", str(path), *data]
    began = time.perf_counter()
    process = subprocess.Popen(
        [*called, f"storage={folder}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    if kill:
        _kill(process.pid, where, kill)
    code = process.wait()
    if code:
        raise SystemExit(f"the study ended with exit code {code}")
    return time.perf_counter() - began, {o.trial: o for o in where.outcomes()}


def _kill(driver: int, study: StudyFolder, trial: str) -> None:
    """Kill all processes that run trials, once the run of one has a checkpoint."""
    while True:
        run = study.runs().get(trial)
        if run is not None and run.checkpoints():
            break
        time.sleep(0.01)
    for process in psutil.Process(driver).children(recursive=True):
        if ACTOR in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)


def _bare(
    folder: Path, data: list[str], at_a_time: int
) -> tuple[dict[str, float], dict[str, tuple[Any, ...]]]:
    """Return the seconds of each trial's arithmetic, and its numbers."""
    study = load_study(str(folder / "study.yaml"), "", *data, f"storage={folder}/bare")
    trials = plan(study, base_tree(study))
    trees = [(t.name, cfg.to_tree(t.experiment), list(study.protocols)) for t in trials]
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(at_a_time, mp_context=spawned) as pool:
        results = list(pool.map(_arithmetic, trees))
    return {name: s for name, s, _ in results}, {name: facts for name, _, facts in results}


def _arithmetic(
    trial: tuple[str, dict[str, Any], list[str]],
) -> tuple[str, float, tuple[Any, ...]]:
    """Return the seconds of one trial's views, steps and evaluation; reading is not counted."""
    name, tree, protocols = trial
    DECODED.keep(2**30)
    resolved = resolve(cfg.validate(Experiment, tree))
    experiment, source = resolved.config, resolved.source
    device = torch.device("cpu")
    prepare_process(experiment, 1)
    model = build_model(experiment)
    optimizer = prepare_training(model, experiment, device)
    evaluation = OnlineEvaluation(experiment, source, 0, 1, device)
    curve: dict[int, dict[str, float]] = {}
    training: dict[str, float] = {}

    def report(metrics: loop.Metrics) -> None:
        training["train/mean_loss"] = metrics.mean_loss

    def epoch_end(epoch: int, _: int) -> None:
        values = {**training, **evaluation(model)}
        curve[epoch] = {k: v for k, v in values.items() if k in EPOCH_METRICS}

    steps = range(resolved.total_steps)
    began = time.perf_counter()
    evaluation.before_training(model)
    loop.train(
        model,
        build_loss(experiment),
        optimizer,
        local_batches(experiment, source, steps),
        schedule_of(resolved, Rollbacks().halved_at),
        loop.Callbacks(report, epoch_end, lambda _: None),
        seed=experiment.seed,
    )
    seconds = time.perf_counter() - began
    score_networks(experiment, {}, protocols)  # reads what is read once
    began = time.perf_counter()
    scored = build_model(experiment)  # as from a checkpoint: its memory is laid out anew
    scored.load_state_dict(model.state_dict())
    (score,) = score_networks(experiment, {TRAINED: scored.encoder}, protocols)
    seconds += time.perf_counter() - began
    final = {f"final/{key}": value for key, value in score.numbers().items()}
    return name, seconds, ("finished", final, curve)


def _facts(outcome: TrialOutcome) -> tuple[Any, ...]:
    """Return the numbers of an outcome that the bare arithmetic has as well."""
    final = {k: v for k, v in outcome.metrics.items() if k.startswith("final/")}
    curve = {
        epoch: {k: v for k, v in values.items() if k == "train/mean_loss" or "eval/" in k}
        for epoch, values in outcome.curve.items()
    }
    return outcome.status, final, curve


def _after_trouble(
    whole: dict[str, TrialOutcome], disturbed: dict[str, TrialOutcome]
) -> dict[str, object]:
    """Return how many trials are the same after a kill and a divergence beside them."""
    same = [
        _facts(outcome) == _facts(whole[name.replace("setting-", "temperature-")])
        for name, outcome in disturbed.items()
        if "diverging" not in name
    ]
    collapsed = [n for n, o in disturbed.items() if o.status == "collapsed"]
    return {"equal_after_a_kill": sum(same), "collapsed": collapsed}


if __name__ == "__main__":
    main()
