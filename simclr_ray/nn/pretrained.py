"""Weights of other runs: to start from, or of a teacher; and state dicts of other programs.

Weights elsewhere are for images less a mean and over a deviation; ours are in [0, 1]. Both are
folded into the first convolution, exact but for the border that it pads (`nn.foreign_weights`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.imports import permit_code
from simclr_ray.config.moves import relocated_run, stored_tree
from simclr_ray.config.wording import counted
from simclr_ray.errors import CheckpointError, ConfigError, ConfigIssue, one_line
from simclr_ray.nn.authors_weights import by_own_names, is_authors
from simclr_ray.nn.build import SimCLRModel, build_model
from simclr_ray.nn.encoders import RGB, EncoderFamily, Statistics, family_of
from simclr_ray.nn.foreign_weights import DEVIATION, MEAN, MatchedWeights, fit, fold_input
from simclr_ray.storage import checkpoint
from simclr_ray.storage.run_folder import RunFolder

FILES = (".pth", ".pt", ".ckpt", ".bin", ".tar", ".safetensors", ".npz")
FOLDER_CONFIG, FOLDER_INDEX = "config.json", "model.safetensors.index.json"  # Hugging Face's
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
PREPROCESSOR = "preprocessor_config.json"
# What `export` writes, of encoders that take [0, 1], and the card that lies beside it.
OWN_CARD, OWN_FILES = "encoder.json", ("model.safetensors", "torchvision.pth", "timm.safetensors")
TRAINED_WITH = ("encoder", "head", "init", "loss", "optimizer", "schedule", "batch_size", "epochs")
INIT_WEIGHTS_KEY, TEACHER = "init.weights", "loss.teacher"


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
    tree = relocated_run(stored_tree(record["experiment"]), folder.parent)
    values, _ = cfg.parse_overrides(overrides)
    fixed = [path for path, _ in values if path.split(".")[0] in TRAINED_WITH]
    if fixed:
        problem = f"is what {folder.name} was trained with; here it cannot be changed"
        raise ConfigError([ConfigIssue(path, problem) for path in fixed])
    whole = cfg.apply_overrides(tree, overrides, Experiment)
    permit_code(whole, tree, str(folder))
    return cfg.validate(Experiment, whole)


def _model_in(kept: checkpoint.Checkpoint) -> SimCLRModel:
    model = build_model(cfg.validate(Experiment, stored_tree(kept.record["experiment"])))
    checkpoint.restore_model(kept.tensors, model)
    return model.to(torch.float32).eval()


def load_teacher(experiment: Experiment) -> SimCLRModel:
    """Return the teacher of a distillation, in float32 and eval mode."""
    assert experiment.distillation is not None
    with open_checkpoint(experiment.distillation.teacher, TEACHER) as (_, folder):
        return load_model(folder)


def teacher_classes(experiment: Experiment) -> tuple[str, ...]:
    """Return the names of the classes that the teacher of a distillation knows.

    Empty where they have numbers alone, or nothing is distilled.

    Raises:
        CheckpointError: It names more classes than it has.
    """
    if experiment.distillation is None:
        return ()
    with open_checkpoint(experiment.distillation.teacher, TEACHER) as (where, folder):
        record = checkpoint.read_record(folder)
    return tuple(names_in(record, record["experiment"]["head"]["num_classes"], where))


def names_in(record: Mapping[str, Any], num_classes: int, where: Path | str) -> list[str]:
    """Return the names of a classifier's classes that a checkpoint's record holds.

    Args:
        record: Of the checkpoint.
        num_classes: K.
        where: The checkpoint, for the message.

    Raises:
        CheckpointError: There are more names than classes.
    """
    names: list[str] = record.get("class_names", [])
    if len(names) > num_classes:
        raise CheckpointError(
            f"{where} names {counted(len(names), 'class', 'classes')} and its classifier has "
            f"{num_classes}: which is which is not known"
        )
    return names


def load_init(model: SimCLRModel, experiment: Experiment) -> None:
    """Load what `experiment.init` names into `model`, in place.

    That is the encoder, and a classifier's hidden layers as well.

    Raises:
        CheckpointError: The weights do not fit.
    """
    weights = experiment.init.weights
    if not weights:
        return
    if weight_files(weights):
        foreign = foreign_weights(model.encoder, experiment)
        model.encoder.load_state_dict(foreign.tensors, strict=False)  # all are there but constants
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
def open_checkpoint(weights: str, option: str = INIT_WEIGHTS_KEY) -> Iterator[tuple[str, Path]]:
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
                raise ConfigError.of(option, problem) from error
            yield folder.uri, here
            return
        newest = stack.enter_context(folder.newest_checkpoint())
        if newest is None:
            raise ConfigError.of(option, _why_not(weights, folder))
        yield folder.below(newest.name), newest


def _why_not(weights: str, folder: RunFolder) -> str:
    """Return why a path or URI without a whole checkpoint gives no weights."""
    if folder.checkpoints():
        return f"{weights} holds no whole checkpoint"
    if folder.local is not None and not folder.local.exists():
        return f"there is no file or folder {weights}, so no checkpoint"
    if folder.read_text(FOLDER_CONFIG) is not None:
        return f"{weights} holds {FOLDER_CONFIG} and no weights ({', '.join(FOLDER_FILES)})"
    return f"{weights} holds no checkpoint, and no folder of Hugging Face's ({FOLDER_CONFIG})"


class ForeignWeights(NamedTuple):
    """Weights of another program, ready for an encoder of ours."""

    tensors: dict[str, Tensor]
    line: str  # what was loaded and what was left out


def foreign_weights(encoder: nn.Module, experiment: Experiment) -> ForeignWeights:
    """Return the tensors of `init.weights`, a file or a folder of another program's, by our names.

    Args:
        encoder: Its names and shapes are looked at.
        experiment: Of it.

    Raises:
        CheckpointError: They cannot be read without running code, or do not fit.
    """
    init, family = experiment.init, family_of(experiment.encoder)
    tree: dict[str, Any] = {}
    for path in weight_files(init.weights):
        tree |= checkpoint.read_file(path)
    try:
        authors = is_authors(tree)
        if authors:
            tree = by_own_names(encoder, tree)
        fitted = fit(
            encoder,
            tree,
            partial(family.resized, encoder),
            names={n: n for n in encoder.state_dict()} if authors else family.file_names(encoder),
            children=family.file_children(encoder),
        )
        wrong = checkpoint.first_not_finite(fitted.tensors.items())
        if wrong:
            raise CheckpointError(f"cannot be trained from: {wrong} is not finite")
        if init.mean:
            mean, std = tuple(init.mean), tuple(init.std)
        elif authors or _is_exported(Path(init.weights)):
            mean, std = _no_shift(experiment.data.channels)
        else:
            mean, std = _folder_statistics(Path(init.weights)) or _usual_statistics(family, fitted)
        fold_input(encoder, fitted.tensors, mean, std)
    except CheckpointError as error:
        raise CheckpointError(f"{Path(init.weights).name} {error}") from error
    shown = ", ".join(f"{m:g}" for m in mean), ", ".join(f"{d:g}" for d in std)
    line = f"{fitted.line()}; for images less ({shown[0]}) over ({shown[1]})"
    return ForeignWeights(fitted.tensors, line)


def _no_shift(channels: int) -> Statistics:
    """Return mean and deviation of images in [0, 1]."""
    return (0.0,) * channels, (1.0,) * channels


def _usual_statistics(family: EncoderFamily[Any], fitted: MatchedWeights) -> Statistics:
    """Return mean and deviation for weights that say nothing of them.

    Raises:
        CheckpointError: There is no usual one, and a guess would be wrong without a word.
    """
    usual = family.input_statistics()
    if usual is None:
        mean, std = (",".join(map(str, values)) for values in (MEAN, DEVIATION))
        shown = f"init.mean=[{mean}] init.std=[{std}]"  # no blanks: to be copied into a shell
        raise CheckpointError(
            "does not say what its images had taken off, and of such an encoder nobody knows: say "
            f"{shown} for ImageNet's, init.mean=[0,0,0] init.std=[1,1,1] for images in [0, 1]"
        )
    return (MEAN, DEVIATION) if fitted.is_nested else usual


def _is_exported(path: Path) -> bool:
    """Return whether a file of weights is one that `export` wrote."""
    return path.name in OWN_FILES and (path.parent / OWN_CARD).is_file()


def weight_files(weights: str) -> list[Path]:
    """Return the files of another program's weights; none where it is a run or a checkpoint.

    Args:
        weights: A file, or a folder as Hugging Face's libraries write it.

    Raises:
        CheckpointError: The folder's index of files cannot be read.
    """
    if weights.endswith(FILES):
        return [Path(weights)]
    folder = Path(weights)
    if not (folder / FOLDER_CONFIG).is_file():
        return []
    if (folder / FOLDER_INDEX).is_file():
        places = _json_of(folder / FOLDER_INDEX).get("weight_map")
        names = set(places.values()) if isinstance(places, dict) else set()
        if not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
            raise CheckpointError(f"{folder / FOLDER_INDEX} names no files of this folder")
        return [folder / name for name in sorted(names)]
    return [folder / name for name in FOLDER_FILES if (folder / name).is_file()][:1]


def _json_of(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {one_line(error)}") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} holds a {type(tree).__name__}, not keys and values")
    return tree


def _folder_statistics(folder: Path) -> Statistics | None:
    """Return mean and deviation that a Hugging Face folder names, of timm's there as well."""
    for name, keys in (
        (PREPROCESSOR, ("image_mean", "image_std")),
        (FOLDER_CONFIG, ("mean", "std")),
    ):
        if (folder / name).is_file():
            tree = _json_of(folder / name)
            inner = tree.get("pretrained_cfg")
            tree = inner if isinstance(inner, dict) else tree
            if not tree.get("do_normalize", True):
                return _no_shift(RGB)
            if all(key in tree for key in keys):
                mean, std = (_numbers_of(tree[key], f"{name}: {key}") for key in keys)
                return mean, std
    return None


def _numbers_of(value: object, key: str) -> tuple[float, ...]:
    if not isinstance(value, list) or not value or not all(type(v) in (int, float) for v in value):
        problem = "is no list of numbers; say init.mean and init.std"
        raise CheckpointError(f"{key} {json.dumps(value)} {problem}")
    return tuple(map(float, value))
