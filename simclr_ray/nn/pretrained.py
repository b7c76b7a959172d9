"""Weights of other runs: to start from, or of a teacher; and torchvision-style state dicts.

torchvision's weights are for images less a mean and over a deviation; ours are in [0, 1]. Both
are folded into the first convolution and its batch norm, exact but for the border that it pads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.imports import permit_code
from simclr_ray.errors import CheckpointError, ConfigError, ConfigIssue
from simclr_ray.nn.build import SimCLRModel, build_model
from simclr_ray.nn.encoders import family_of
from simclr_ray.storage import checkpoint
from simclr_ray.storage.run_folder import RunFolder

FILES = (".pth", ".pt", ".safetensors")
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's of ImageNet
TRAINED_WITH = ("encoder", "head", "init", "loss", "optimizer", "schedule", "batch_size", "epochs")
WHERE, TEACHER = "init.weights", "loss.teacher"


class Trained(NamedTuple):
    """What a checkpoint holds."""

    experiment: Experiment
    model: SimCLRModel  # in float32 and eval mode


def load_trained(folder: Path, *overrides: str) -> Trained:
    """Return the experiment of a checkpoint, overrides applied, and the model as it was trained.

    One reading serves both: to read is to hash the file and to look at every weight.
    """
    kept = checkpoint.read(folder)
    return Trained(_overridden(kept.record, folder, overrides), _model_in(kept))


def experiment_of(folder: Path, *overrides: str) -> Experiment:
    """Return the experiment that a checkpoint was trained by."""
    return _overridden(checkpoint.read_record(folder), folder, overrides)


def load_model(folder: Path) -> SimCLRModel:
    """Return encoder and head of a checkpoint in float32 and eval mode."""
    return _model_in(checkpoint.read(folder))


def _overridden(record: dict[str, Any], folder: Path, overrides: Sequence[str]) -> Experiment:
    tree = record["experiment"]
    given, _ = cfg.parse_overrides(overrides)
    fixed = [path for path, _ in given if path.split(".")[0] in TRAINED_WITH]
    if fixed:
        problem = f"is what {folder.name} was trained with; here it cannot be changed"
        raise ConfigError([ConfigIssue(path, problem) for path in fixed])
    whole = cfg.apply_overrides(tree, overrides, Experiment)
    permit_code(whole, tree, str(folder))
    return cfg.validate(Experiment, whole)


def _model_in(kept: checkpoint.Checkpoint) -> SimCLRModel:
    model = build_model(cfg.validate(Experiment, kept.record["experiment"]))
    checkpoint.restore_model(kept.tensors, model)
    return model.to(torch.float32).eval()


def load_teacher(experiment: Experiment) -> SimCLRModel:
    """Return the teacher of a distillation, in float32 and eval mode."""
    assert experiment.distillation is not None
    with open_checkpoint(experiment.distillation.teacher, TEACHER) as (_, folder):
        return load_model(folder)


def load_init(model: SimCLRModel, experiment: Experiment) -> None:
    """Load what `experiment.init` names into `model`, in place.

    That is the encoder, and a classifier's hidden layers as well.

    Raises:
        CheckpointError: The weights do not fit.
    """
    weights = experiment.init.weights
    if not weights:
        return
    if weights.endswith(FILES):
        _load_torchvision(model.encoder, checkpoint.read_file(Path(weights)), experiment)
        return
    with open_checkpoint(weights) as (_, folder):
        tensors = checkpoint.read(folder).tensors
    checkpoint.restore_model(tensors, model.encoder, "model.encoder.")
    head = experiment.classifier
    if head is not None and head.layers:
        kept = head.layers * (3 if head.batch_norm else 2)
        hidden = nn.Sequential(*list(model.head.children())[:kept])
        wanted = {f"model.head.{name}" for name in hidden.state_dict()}
        checkpoint.restore_model(
            {name: t for name, t in tensors.items() if name in wanted}, hidden, "model.head."
        )


def is_checkpoint(where: str) -> bool:
    """Return whether a path or URI is one checkpoint, by its name or its record, and not a run."""
    named = checkpoint.step_of(RunFolder.at(where).name) >= 0
    return named or (Path(where) / checkpoint.RECORD).is_file()


@contextmanager
def open_checkpoint(weights: str, option: str = WHERE) -> Iterator[tuple[str, Path]]:
    """Give the path or URI of a checkpoint, or of a run's newest, and where it lies here.

    Args:
        weights: Path or URI of a checkpoint or of a run folder.
        option: The key of the config that names it, for the message.

    Raises:
        ConfigError: There is no checkpoint that verifies.
    """
    folder = RunFolder.at(weights)
    with ExitStack() as stack:
        if is_checkpoint(weights):
            try:
                here = stack.enter_context(RunFolder.at(folder.storage).fetched(folder.name))
                checkpoint.read_record(here)
            except (CheckpointError, FileNotFoundError) as error:
                problem = f"{weights} is no checkpoint: {error}"
                raise ConfigError([ConfigIssue(option, problem)]) from error
            yield folder.uri, here
            return
        newest = stack.enter_context(folder.newest_checkpoint())
        if newest is None:
            raise ConfigError([ConfigIssue(option, f"{weights} holds no whole checkpoint")])
        yield f"{folder.uri}/{newest.name}", newest


def _load_torchvision(
    encoder: nn.Module, tensors: dict[str, Tensor], experiment: Experiment
) -> None:
    """Load a torchvision classifier's state dict, its last layer left out."""
    tensors = {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")}
    family = family_of(experiment.encoder)
    tensors = family.renamed(tensors)
    wanted = encoder.state_dict()
    fitting = {n: t for n, t in tensors.items() if n in wanted}
    if family.folds_input:
        convolution, norm = _first(encoder)
        if convolution in fitting and fitting[convolution].shape == wanted[convolution].shape:
            _fold_input(fitting, convolution, norm)
    try:
        encoder.load_state_dict(fitting)
    except RuntimeError as error:
        raise CheckpointError(f"{WHERE} does not fit the encoder: {error}") from error


def _first(encoder: nn.Module) -> tuple[str, str]:
    """Return the names of the first convolution's weight and of the norm that follows it."""
    names = [n for n, m in encoder.named_modules() if not list(m.children())]
    return f"{names[0]}.weight", names[1]


def _fold_input(tensors: dict[str, Tensor], convolution: str, norm: str) -> None:
    """Make the first layer take images in [0, 1] where it took them less mean, over deviation."""
    deviation = torch.tensor(DEVIATION)[:, None, None]
    weight = tensors[convolution] / deviation
    tensors[convolution] = weight
    shift = (weight * torch.tensor(MEAN)[:, None, None]).sum((1, 2, 3))
    bias = convolution.replace("weight", "bias")
    if bias in tensors:
        tensors[bias] = tensors[bias] - shift
    elif f"{norm}.running_mean" in tensors:
        tensors[f"{norm}.running_mean"] = tensors[f"{norm}.running_mean"] + shift
