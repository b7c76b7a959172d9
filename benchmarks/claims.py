"""Claims of the paper in short CPU runs: heads, color, and what g(h) forgets (Fig. 5, 8, Table 3).

    python -m benchmarks.claims CIFAR_FOLDER [--seeds 3] [--epochs 8] [--images 10000]

Five settings times seeds, each a process of its own with one thread, two at a time: the loop on the
views that a run would have, without Ray. Scored on the test split: linear evaluation and kNN of h,
linear evaluation of z = g(h), and the rotation probe of both. Means and standard deviations over
seeds; what a sign would need to come out does not follow from this. Writes
`benchmarks/results/claims.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.record import portable, store
from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.batches import local_batches
from simclr_ray.data.source import Source
from simclr_ray.distributed.malloc import keep_freed_memory
from simclr_ray.evaluation.features import Split, extract_features, load_split
from simclr_ray.evaluation.knn import knn_scores, top_k_accuracy
from simclr_ray.evaluation.linear import fit_linear
from simclr_ray.evaluation.probes import probe
from simclr_ray.nn.build import SimCLRModel, build_loss, build_model
from simclr_ray.nn.precision import prepare_model
from simclr_ray.optim import build_optimizer
from simclr_ray.train import loop

CROP = {"name": "crop", "min_area": 0.2}
COLOR = {"name": "color", "strength": 0.5}
MLP = {"name": "mlp", "layers": 2, "dim": 128}
SETTINGS: dict[str, dict[str, Any]] = {
    "no head": {"head": {"name": "none"}, "a": [CROP, COLOR]},
    "linear head": {"head": {"name": "linear", "dim": 128}, "a": [CROP, COLOR]},
    "nonlinear head": {"head": MLP, "a": [CROP, COLOR]},
    "nonlinear head, crop alone": {"head": MLP, "a": [CROP]},
    "nonlinear head, rotation added": {
        "head": MLP,
        "a": [CROP, COLOR, {"name": "rotate", "p": 0.75}],
    },
}
PROCESSES, CLASSES = 2, 10


class Settings(argparse.Namespace):
    """The command line."""

    folder: str
    seeds: int
    epochs: int
    images: int
    child: str
    seed: int


def main() -> None:
    """Measure and store; or, as a child, one setting with one seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    settings = parser.parse_args(namespace=Settings())
    if settings.child:
        print("ROW " + json.dumps(run(settings)), flush=True)
        return
    cases = [(name, seed) for seed in range(settings.seeds) for name in SETTINGS]
    with ThreadPoolExecutor(PROCESSES) as pool:
        rows = list(pool.map(lambda case: one(*case), cases))
    trees = {n: cfg.to_tree(experiment(settings, n, 0)) for n in SETTINGS}
    seeds: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
    for (name, _), row in zip(cases, rows, strict=True):
        seeds[name].append(row)
    result = {
        "command": "python -m benchmarks.claims " + " ".join(map(portable, sys.argv[1:])),
        "settings": json.loads(portable(json.dumps(trees))),
        "mean": {n: _over(rows, statistics.mean) for n, rows in seeds.items()},
        "standard_deviation": {n: _over(rows, statistics.stdev) for n, rows in seeds.items()},
        "seeds": seeds,
    }
    store("claims", result)
    print(json.dumps({k: result[k] for k in ("mean", "standard_deviation")}, indent=1))


def _over(rows: list[dict[str, float]], of: Any) -> dict[str, float]:
    if len(rows) < 2:
        return rows[0]
    return {key: round(of([row[key] for row in rows]), 4) for key in rows[0]}


def one(name: str, seed: int) -> dict[str, float]:
    """Run one setting with one seed in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.claims", *sys.argv[1:]]
    command += ["--child", name, "--seed", str(seed)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if not rows:
        raise SystemExit(f"{name}, seed {seed} failed:\n{done.stderr[-4000:]}")
    row: dict[str, float] = json.loads(rows[-1].removeprefix("ROW "))
    print(name, seed, json.dumps(row), flush=True)
    return row


def experiment(settings: Settings, name: str, seed: int) -> Experiment:
    """Return a setting as a config."""
    setting = SETTINGS[name]
    tree = {
        "name": "claims",
        "seed": seed,
        "data": {"train": f"{settings.folder}/train", "limit": settings.images},
        "augment": {"name": "pipeline", "size": 24, "a": setting["a"]},
        "encoder": {"name": "resnet", "depth": 10, "width": 0.25, "stem": "cifar"},
        "head": setting["head"],
        "loss": {"temperature": 0.2},
        "optimizer": {"name": "lars", "weight_decay": 1e-4},
        "schedule": {"learning_rate": 3.0, "warmup_epochs": 1.0},
        "batch_size": 256,
        "epochs": settings.epochs,
        "evaluation": {"size": 32},
        "scaling": {"threads_per_worker": 1},
    }
    return cfg.validate(Experiment, tree)


def run(settings: Settings) -> dict[str, float]:
    """Train one setting and evaluate it."""
    torch.set_num_threads(1)
    keep_freed_memory()
    trained = experiment(settings, settings.child, settings.seed)
    source = Source.open(trained.data.train, limit=trained.data.limit)
    model = build_model(trained)
    prepare_model(model, torch.device("cpu"), trained.precision)
    per_epoch, total = (
        trained.steps_per_epoch(source.num_rows),
        trained.total_steps(source.num_rows),
    )
    last: list[float] = []
    loop.train(
        model,
        build_loss(trained),
        build_optimizer(model, trained.optimizer),
        local_batches(trained, source, range(total)),
        loop.StepSchedule(
            per_epoch,
            total,
            trained.warmup_steps(source.num_rows),
            trained.peak_learning_rate(),
            trained.batch_size,
            log_every=per_epoch,
        ),
        loop.Callbacks(lambda m: last.append(m.mean_loss), lambda *_: None, lambda _: None),
        seed=trained.seed,
    )
    size = trained.evaluation_size
    bank = load_split(source, size)
    test = load_split(Source.open(f"{settings.folder}/test"), size)
    return {"last_epochs_loss": round(last[-1], 4), **scores_of(model, bank, test, trained)}


def scores_of(
    model: SimCLRModel, bank: Split, test: Split, trained: Experiment
) -> dict[str, float]:
    """Return accuracies of h and z, and of the rotation probe."""
    model.eval()
    whole = torch.nn.Sequential(model.encoder, model.head)
    rows = {}
    for name, network in (("h", model.encoder), ("z", whole)):
        bank_features = extract_features(network, bank.images)
        test_features = extract_features(network, test.images)
        linear = trained.evaluation.linear
        fitted = fit_linear(bank_features, bank.labels, CLASSES, linear, trained.seed)
        rows[f"linear_{name}"] = top_k_accuracy(fitted.logits(test_features), test.labels)
        votes = knn_scores(bank_features, bank.labels, test_features, 200, 0.1, CLASSES)
        rows[f"knn_{name}"] = top_k_accuracy(votes, test.labels)
    for probed in probe(model, bank.images, test.images[:4000], seed=trained.seed):
        rows[f"{probed.target} from h"] = probed.h
        rows[f"{probed.target} from z"] = probed.z
    return {key: round(value, 4) for key, value in rows.items()}


if __name__ == "__main__":
    main()
