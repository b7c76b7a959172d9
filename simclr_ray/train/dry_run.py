"""What a config means in numbers, before anything runs: `--dry-run`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from simclr_ray.config.experiment import Experiment
from simclr_ray.config.imports import ImportConfig, imports_in, is_installed
from simclr_ray.config.sections.running import ScalingConfig
from simclr_ray.config.wording import MIB, counted
from simclr_ray.data.batches import build_plan
from simclr_ray.data.image_groups import groups_line
from simclr_ray.data.slices import joined_groups
from simclr_ray.distributed.machine import cores
from simclr_ray.distributed.machine_limits import check_fits
from simclr_ray.distributed.object_store import store_line
from simclr_ray.distributed.ray_address import names_cluster
from simclr_ray.errors import ClusterError
from simclr_ray.inference.export_others import exports_line
from simclr_ray.nn.build import build_loss, build_model
from simclr_ray.nn.ntxent import TILE
from simclr_ray.nn.precision import DTYPES, unusable_gpu
from simclr_ray.nn.pretrained import weight_files
from simclr_ray.optim import state_per_parameter
from simclr_ray.storage.space import sized
from simclr_ray.train.advice import advise_before_start, memory_advice
from simclr_ray.train.disk_space import checkpoint_bytes, counting_device
from simclr_ray.train.evaluation_plan import evaluation_plan
from simclr_ray.train.imports import export_problem
from simclr_ray.train.resolve import ResolvedExperiment, init_line
from simclr_ray.train.scaling import can_train_in_process

SAMPLE = 4  # images in the pass that is counted; the result is per image


class StepMemory(NamedTuple):
    """Bytes that one step takes on the rank with the largest local batch."""

    weights: int  # weights, gradients and optimizer state
    activations: int  # kept for backward, both views
    loss: int  # gathered z and one tile
    images: int  # that pass the model at once

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.activations + self.loss


def derived(resolved: ResolvedExperiment) -> dict[str, str]:
    """Return the run's arithmetic as name -> text."""
    experiment, source = resolved.config, resolved.source
    plan = build_plan(experiment, source)
    memory = step_memory(experiment)
    total = resolved.total_steps
    warmup = resolved.warmup_steps
    rows = {
        "run": resolved.run_name,
        "images": f"{source.num_rows:,} in {counted(len(source.files), 'file')}, "
        f"{counted(len(joined_groups(source.row_groups)), 'row group')}, "
        f"{counted(plan.num_lanes, 'lane')}",
        **({"groups": groups_line(source)} if source.num_groups else {}),
        "global batch": f"{experiment.batch_size:,} {'pairs' if source.num_groups else 'images'}, "
        f"{_views(experiment) * experiment.batch_size:,} views",
        **_of_the_loss(experiment),
        "local batch": " to ".join(
            _local_batch(experiment, number)
            for number in sorted({experiment.scaling.min_workers, experiment.scaling.max_workers})
        ),
        "steps": f"{plan.steps_per_epoch:,} per epoch, {total:,} in "
        f"{counted(experiment.epochs, 'epoch')}",
        "device": device_line(experiment.scaling),
        "warm-up": counted(warmup, "step"),
        "peak learning rate": f"{experiment.peak_learning_rate():g} "
        f"({experiment.schedule.scaling} scaling of {experiment.schedule.learning_rate:g})",
        "parameters": f"{num_parameters(experiment) / 1e6:,.2f} M",
        "memory of a step": f"{memory.total / MIB:,.0f} MiB on the largest worker: "
        f"activations {memory.activations / MIB:,.0f}, weights {memory.weights / MIB:,.0f}, "
        f"loss {memory.loss / MIB:,.0f}",
        **_of_the_store(experiment),
        "scores at the end": evaluation_plan(experiment, source).text,
        "checkpoint": f"{sized(checkpoint_bytes(experiment))}, "
        f"{experiment.checkpoint.keep} of them kept",
        "exports": exports_line(experiment.encoder, experiment.evaluation_size),
    }
    rows |= _of_imports(experiment)
    if weight_files(experiment.init.weights):
        rows["first weights"] = init_line(experiment)
    if experiment.num_groups > 1:
        rows["gradient caching"] = (
            f"{experiment.num_groups} groups of {experiment.batch_norm.group_size:,} images "
            "a step, each passed forward twice"
        )
    rows |= _of_this_machine(experiment)
    per_image = memory.activations // max(memory.images, 1)
    notes = advise_before_start(resolved)
    notes += filter(None, [memory_advice(resolved, per_image, memory.weights + memory.loss)])
    return rows | {f"note {k}" if k > 1 else "note": text for k, text in enumerate(notes, 1)}


def _of_the_store(experiment: Experiment) -> dict[str, str]:
    if can_train_in_process(experiment) and experiment.scaling.data_actors_per_worker == 1:
        return {}  # its process makes the views itself
    line = store_line(experiment)
    return {"object store": line} if line else {}


def device_line(scaling: ScalingConfig) -> str:
    """Return what a worker computes on; the CPU of a machine whose GPU torch cannot use is said."""
    is_here = not names_cluster()
    problem, there = unusable_gpu() if is_here else "", torch.cuda.device_count()
    if scaling.gpus_per_worker:
        line = f"GPU, {scaling.gpus_per_worker:g} a worker"
        return f"{line}; {problem}" if problem else line
    if there and is_here:
        problem = (
            f"this machine's {counted(there, 'GPU')} will idle: scaling.num_workers=auto takes "
            "them, or scaling.gpus_per_worker=1"
        )
    return f"CPU; {problem}" if problem else "CPU"


def _of_this_machine(experiment: Experiment) -> dict[str, str]:
    """Return what this machine makes slow or refuses, where the run is to be on it."""
    if names_cluster() or experiment.init.freeze:
        return {}
    rows, scaling, there = {}, experiment.scaling, cores()
    if scaling.max_workers > there and not scaling.gpus_per_worker:
        rows["workers"] = (
            f"{scaling.max_workers} share the {counted(there, 'core')} of this machine: slower "
            f"than {there}"
        )
    try:
        check_fits(experiment)
    except ClusterError as error:
        rows["refused"] = f"a run here would end at once: {error}"
    return rows


def _local_batch(experiment: Experiment, workers: int) -> str:
    least, more = divmod(experiment.batch_size, workers)
    sizes = f"{least + 1} or {least}" if more else str(least)
    return f"{sizes} images on {counted(workers, 'worker')}"


def num_parameters(experiment: Experiment) -> int:
    """Return the parameters of encoder and head together."""
    with counting_device(experiment):
        return sum(p.numel() for p in build_model(experiment).parameters())


def step_memory(experiment: Experiment) -> StepMemory:
    """Return the memory of one training step, counted on a pass over shapes alone.

    Activations are the distinct tensors that autograd saves, which is what a step holds at its
    peak, allocator slack aside. That the encoder takes the size, `resolve` has seen.
    """
    with counting_device(experiment):
        model = build_model(experiment).to(DTYPES[experiment.precision])
        views, size = _views(experiment), experiment.augment.size
        images = torch.rand(views * SAMPLE, experiment.data.channels, size, size)
        images = images.to(DTYPES[experiment.precision])
    own = {id(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}
    kept: list[Tensor] = []  # alive, so that an id is not used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own and id(storage) not in saved:  # a weight's views are no copies
            saved[id(storage)] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _, z = model.train()(images)
    largest = -(-experiment.batch_size // experiment.scaling.min_workers)
    n = -(-largest // experiment.num_groups)
    halved = 2 if experiment.precision == "bf16" else 1
    element = 8 if experiment.precision == "float64" else 4
    state = state_per_parameter(experiment.optimizer)
    weights = num_parameters(experiment) * element * (2 + state)  # itself and its gradient
    gathered = 2 * experiment.batch_size * z.shape[1] * element
    tile = min(TILE, 2 * experiment.batch_size) ** 2 * element
    return StepMemory(
        weights=weights,
        activations=sum(saved.values()) * n // SAMPLE // halved,
        loss=2 * gathered + 3 * tile,
        images=n,
    )


def _views(experiment: Experiment) -> int:
    """Return the views of an image that pass the model in a step."""
    return 1 if build_loss(experiment).one_view else 2


def _of_imports(experiment: Experiment) -> dict[str, str]:
    """Return which code is imported, and whether an encoder of it can be registered."""
    nodes = list(imports_in(experiment))
    rows = {f"imported {where}": _shipped(node) for where, node in nodes}
    if any(where == "encoder" for where, _ in nodes):
        problem = export_problem(experiment)
        rows["registration"] = (
            f"the encoder cannot be registered: torch.export fails: {problem}"
            if problem
            else "torch.export takes the encoder, so it can be registered"
        )
    return rows


def _shipped(node: ImportConfig) -> str:
    """Return what is imported, and how workers come by it."""
    way = "installed, as it must be on every node" if is_installed(node.path) else "shipped"
    return f"{node.path}, sha256 {node.sha256[:12]}, {way}"


def _of_the_loss(experiment: Experiment) -> dict[str, str]:
    """Return the negatives of an anchor, and what the loss is where nothing is learned."""
    loss, size = build_loss(experiment), experiment.batch_size
    rows, dim = {}, 0
    if experiment.classifier:
        dim = experiment.classifier.num_classes
        rows["classes"] = f"{dim:,}"
    negatives = loss.num_negatives(size)
    if negatives:
        rows["negatives"] = f"{negatives:,} per anchor"
    level = loss.chance_level(size, dim)
    if level is not None:
        rows["loss without learning"] = f"{level.value:.4f} = {level.formula}"
    return rows
