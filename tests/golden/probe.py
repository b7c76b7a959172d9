"""Numbers that no move or renaming may change, computed by whichever simclr_ray is imported.

    python tests/golden/probe.py OUT_FOLDER

writes `numbers.json` and `tensors.safetensors`. `compare.py` runs this file over two commits, so it
finds each name by where it lies in either layout (`NAMES`), and each config key likewise (`KEYS`).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

NUM_IMAGES, BATCH_SIZE, STEPS = 160, 32, 20  # five steps an epoch, four epochs
NUM_ROWS = 50_000  # of which learning rates are told
LATER = (  # presets that earlier commits lack
    *("bands_resnet18", "gray16_resnet18", "cifar10_laptop", "photos_gpu"),
    *("imagenet_convnext_tiny", "imagenet_vit_small"),
)
Tree = dict[str, Any]

# name here -> places, the newest layout first
NAMES = {
    "BatchPlan": ("data.plan:BatchPlan",),
    "Experiment": ("config.experiment:Experiment", "experiment:Experiment"),
    "Source": ("data.source:Source",),
    "TwoViews": ("augment.views:TwoViews",),
    "build_loss": ("nn.build:build_loss", "model:build_loss"),
    "build_model": ("nn.build:build_model", "model:build_model"),
    "build_optimizer": ("optim:build_optimizer", "model:build_optimizer"),
    "effective_rank": ("evaluation.label_free:effective_rank",),
    "extract_features": ("evaluation.features:extract_features",),
    "knn_scores": ("evaluation.knn:knn_scores",),
    "learning_rate_at": ("optim:learning_rate_at",),
    "load_split": ("evaluation.features:load_split",),
    "local_batches": ("data.batches:local_batches", "data.maker:local_batches"),
    "loop": ("train.loop", "loop"),
    "place": ("nn.precision:prepare_model", "nn.precision:place", "loop:place"),
    "preset_names": ("config.loader:preset_names", "config:preset_names"),
    "render": ("data.shapes:render",),
    "to_tree": ("config.loader:to_tree", "config:to_tree"),
    "validate": ("config.loader:validate", "config:validate"),
}


def find(name: str) -> Any:
    """Return what `name` means in the layout at hand."""
    for place in NAMES[name]:
        module, _, attribute = place.partition(":")
        with suppress(ImportError, AttributeError):
            found = importlib.import_module(f"simclr_ray.{module}")
            return getattr(found, attribute) if attribute else found
    raise LookupError(f"{name} is at none of {NAMES[name]}")


def has_new_words() -> bool:
    """Return whether config keys are those of format 2."""
    return "init" in find("Experiment").model_fields


def tree_of(data: Path, **other: Any) -> Tree:
    """Return a small experiment, by the words of the layout at hand."""
    tree: Tree = {
        "name": "golden",
        "seed": 3,
        "data": {"train": str(data), "shuffle_rows": 64},
        "augment": {"name": "simclr", "size": 32},
        "encoder": {"name": "resnet", "depth": 10, "width": 0.125, "stem": "strided"},
        "head": {"name": "mlp", "dim": 16},
        "batch_size": BATCH_SIZE,
        "epochs": 4,
        "precision": "float64",
        "schedule": {"learning_rate": 1.0, "warmup_steps": 5},
    }
    return tree | other


def group_size(images: int) -> Tree:
    """Return the batch norm section that asks for gradient caching."""
    return {"group_size" if has_new_words() else "images": images}


def color_stage() -> Tree:
    """Return the stage of color distortion."""
    return {"name": "color" if has_new_words() else "colour", "strength": 0.5}


def cases(data: Path) -> Iterator[tuple[str, Tree, int]]:
    """Yield name, experiment and number of steps of each training."""
    yield "ntxent", tree_of(data), STEPS
    yield "ntxent_float32", tree_of(data, precision="float32"), STEPS
    yield "cached", tree_of(data, batch_norm=group_size(8)), 5
    yield "one_view_negatives", tree_of(data, loss={"name": "ntxent", "negatives": "other"}), 3
    yield "learned_tau", tree_of(data, loss={"name": "ntxent", "learn_temperature": True}), 3
    yield "logistic", tree_of(data, loss={"name": "ntlogistic", "semi_hard": True}), 3
    yield "triplet", tree_of(data, loss={"name": "triplet"}), 3
    yield "dcl", tree_of(data, loss={"name": "dcl", "sigma": 0.5}), 3
    yield "sgd", tree_of(data, optimizer={"name": "sgd", "nesterov": True}), 3
    yield "adamw", tree_of(data, optimizer={"name": "adamw"}, head={"name": "linear"}), 3
    stages = [
        {"name": "crop"}, color_stage(), {"name": "blur"}, {"name": "rotate", "p": 0.5},
        {"name": "cutout"}, {"name": "noise"}, {"name": "solarize"}, {"name": "equalize"},
    ]  # fmt: skip
    pipeline = {"name": "pipeline", "size": 32, "a": stages}
    yield "pipeline", tree_of(data, augment=pipeline, precision="float32"), 3
    kernels = {"name": "resnet", "depth": 50, "width": 0.125, "selective_kernel": 0.0625}
    yield "selective_kernel", tree_of(data, encoder={**kernels, "stem": "cifar"}), 2
    torchvision = {"name": "torchvision", "model": "shufflenet_v2_x0_5"}  # drops nothing
    yield "torchvision", tree_of(data, encoder=torchvision), 2


def write_images(path: Path) -> None:
    """Write drawn images, losslessly, in row groups of 16."""
    images = []
    labels = []
    for index in range(NUM_IMAGES):
        drawn = find("render")(index, 7)
        out = io.BytesIO()
        Image.fromarray(drawn.pixels).save(out, "PNG")
        images.append(out.getvalue())
        labels.append(drawn.label)
    ids = pa.array(range(100, 100 + NUM_IMAGES), pa.int64())
    table = pa.table({"id": ids, "image": images, "label": pa.array(labels, pa.int64())})
    pq.write_table(table, path, row_group_size=16)


def sha256(*arrays: Any) -> str:
    """Return a digest of arrays or tensors: shapes, dtypes and bytes."""
    found = hashlib.sha256()
    for array in arrays:
        plain = np.ascontiguousarray(np.asarray(array))
        found.update(f"{plain.dtype.str}{plain.shape}".encode())
        found.update(plain.tobytes())
    return found.hexdigest()[:32]


def plan_numbers() -> Tree:
    """Return rows of steps of some plans."""
    plans = {
        "one lane": ((7, 9, 16), 8, 5, 16),
        "lanes": ((10,) * 400, 64, 0, 1024),
        "large": ((1000,) * 500, 4096, 2**32 - 1, 65_536),
    }
    return {
        name: {
            str(step): sha256(find("BatchPlan")(*arguments).rows(step)) for step in (0, 1, 3, 250)
        }
        for name, arguments in plans.items()
    }


def rates(experiment: Any) -> list[float]:
    """Return the learning rate at eleven places of a run."""
    total = experiment.total_steps(NUM_ROWS)
    rate = find("learning_rate_at")
    if "constant" in inspect.signature(rate).parameters:  # earlier commits
        rate = partial(rate, constant=experiment.schedule.decay == "constant")
    else:
        rate = partial(rate, config=experiment.schedule)
    return [
        rate(
            min(total - 1, total * tenth // 10),
            experiment.peak_learning_rate(),
            experiment.warmup_steps(NUM_ROWS),
            total,
        )
        for tenth in range(11)
    ]


def rate_numbers() -> Tree:
    """Return the learning rates of each preset."""
    return {
        name: rates(find("Experiment").load(name, "data.train=x"))
        for name in find("preset_names")()
        if name not in LATER
    }


def view_numbers() -> Tree:
    """Return digests of compiled views: whole gray levels, so the same on any processor."""
    images = [find("render")(index, 3, 48).pixels for index in range(40)]
    ids = np.arange(40, dtype=np.int64) * 7
    out = {}
    for size in (24, 32, 64):
        for epoch in (0, 9):
            views = find("TwoViews").simclr(size, seed=11)
            out[f"{size} px, epoch {epoch}"] = sha256(*views(images, ids, epoch))
    return out


def batch_numbers(data: Path) -> Tree:
    """Return ids and pixels of six steps, as one rank has them and as two do."""
    experiment = find("validate")(find("Experiment"), tree_of(data))
    source = find("Source").open(str(data))
    steps = range(6)
    found = {}
    for ranks in (1, 2):
        streams = [find("local_batches")(experiment, source, steps, r, ranks) for r in range(ranks)]
        batches = list(zip(*streams, strict=True))
        found[f"{ranks} ranks"] = [
            sha256(*(torch.cat([getattr(part, c) for part in parts]) for c in ("ids", "a", "b")))
            for parts in batches
        ]
    return found


def draw_weights(model: torch.nn.Module) -> None:
    """Draw every matrix and kernel from numpy, with variance 1/fan-in, in place.

    NumPy keeps the stream of a seeded bit generator; torch draws other first weights from one seed
    in another release.
    """
    random = np.random.Generator(np.random.Philox(17))  # float32 stays within 1e-5 for five steps
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                bound = (3 / parameter[0].numel()) ** 0.5
                drawn = bound * (2 * random.random(tuple(parameter.shape)) - 1)
                parameter.copy_(torch.from_numpy(drawn))


def train(
    tree: Tree, data: Path, steps: int, *, drawn: bool = False
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the losses and the last weights of a training in this process.

    With `drawn`, it begins at `draw_weights`, else where the package has it begin.
    """
    loop = find("loop")
    experiment = find("validate")(find("Experiment"), tree)
    source = find("Source").open(str(data))
    model = find("build_model")(experiment)
    if drawn:
        draw_weights(model)
    find("place")(model, torch.device("cpu"), experiment.precision)
    optimizer = find("build_optimizer")(model, experiment.optimizer)
    losses = []
    schedule = getattr(loop, "StepSchedule", None) or loop.Timetable
    callbacks = getattr(loop, "Callbacks", None) or loop.Hooks
    loop.train(
        model,
        find("build_loss")(experiment),
        optimizer,
        find("local_batches")(experiment, source, range(steps)),
        schedule(
            steps_per_epoch=experiment.steps_per_epoch(source.num_rows),
            total_steps=experiment.total_steps(source.num_rows),
            warmup_steps=experiment.warmup_steps(source.num_rows),
            peak_learning_rate=experiment.peak_learning_rate(),
            global_batch_size=experiment.batch_size,
            log_every=1,
        ),
        callbacks(lambda metrics: losses.append(metrics.loss), lambda *_: None, lambda *_: None),
        precision=experiment.precision,
        seed=experiment.seed,
        num_groups=experiment.num_groups,
    )
    return losses, {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}


def evaluation_tensors(data: Path) -> dict[str, torch.Tensor]:
    """Return features of an untrained encoder, its kNN votes and effective rank."""
    experiment = find("validate")(find("Experiment"), tree_of(data, precision="float32"))
    split = find("load_split")(find("Source").open(str(data)), 32)
    features = find("extract_features")(find("build_model")(experiment).encoder, split.images)
    votes = find("knn_scores")(features[:120], split.labels[:120], features[120:], 20, 0.1, 10)
    rank = torch.tensor(find("effective_rank")(features), dtype=torch.float64)
    return {"features": features, "votes": votes, "rank": rank}


def quick_numbers(data: Path) -> Tree:
    """Return what is equal everywhere, and the two curves that a test holds."""
    chosen = [case for case in cases(data) if case[0] in CURVES]
    curves = {name: train(tree, data, steps, drawn=True)[0] for name, tree, steps in chosen}
    return {
        "rows": plan_numbers(),
        "learning_rates": rate_numbers(),
        "views": view_numbers(),
        "batches": batch_numbers(data),
        "curves": curves,
    }


CURVES = ("ntxent", "ntxent_float32")


def main(folder: Path) -> None:
    """Write everything."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    losses = {}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "images.parquet"
        write_images(data)
        numbers = quick_numbers(data)
        for name, tree, steps in cases(data):
            losses[name], state = train(tree, data, steps)
            tensors |= {f"{name}/{key}": value for key, value in state.items()}
        found = evaluation_tensors(data)
    tensors |= {f"evaluation/{name}": tensor for name, tensor in found.items()}
    numbers["losses"] = losses
    (folder / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    save_file(tensors, folder / "tensors.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
