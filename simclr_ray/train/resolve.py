"""The door of a run: what a config leaves to the data and to other runs, checked and filled in."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import torch

from simclr_ray import config as cfg
from simclr_ray.augment import native
from simclr_ray.config.experiment import DataConfig, Experiment
from simclr_ray.config.imports import imports_in
from simclr_ray.config.moves import stored_tree
from simclr_ray.data.aligned import align_labels, map_to_classifier
from simclr_ray.data.batches import build_plan
from simclr_ray.data.classes import NO_LABEL
from simclr_ray.data.decoding import (
    evaluation_decoder,
    resolve_decoder,
    resolve_white,
    training_decoder,
)
from simclr_ray.data.image_groups import open_grouped
from simclr_ray.data.overlap import overlap_line
from simclr_ray.data.sample import CHECK_SECONDS, Sample, check_sample
from simclr_ray.data.source import Source
from simclr_ray.errors import CheckpointError, ConfigError, DataError, one_line
from simclr_ray.nn.build import build_encoder
from simclr_ray.nn.pretrained import (
    INIT_WEIGHTS_KEY,
    TEACHER,
    foreign_weights,
    open_checkpoint,
    teacher_classes,
    weight_files,
)
from simclr_ray.storage import checkpoint
from simclr_ray.storage.filesystem import check_makeable
from simclr_ray.storage.provenance import sha256
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.tracking.store import store_uri
from simclr_ray.train.encoder_check import check_encoder
from simclr_ray.train.image_folders import resolve_folders
from simclr_ray.train.imports import resolve_imports
from simclr_ray.train.registrable import check_registrable, check_registry
from simclr_ray.train.rollback import check_policy
from simclr_ray.train.scaling import resolve_scaling

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class ResolvedExperiment:
    """An experiment with nothing left open, and the images that it is trained on. It pickles.

    Attributes:
        config: Its classes are counted; first weights and teacher are one checkpoint and its hash.
        source: The training images, opened.
        teacher_classes: Their names, where a teacher's are learned and have names.
    """

    config: Experiment
    source: Source
    teacher_classes: tuple[str, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes that its classifier tells apart: a teacher's, or the images'."""
        return self.teacher_classes if self.config.distillation else self.source.class_names

    @property
    def digest(self) -> str:
        """What decides the result, as 16 hex digits; `Experiment.digest`."""
        return self.config.digest()

    @property
    def identity(self) -> dict[str, str]:
        """What the record of a checkpoint says of the run that wrote it."""
        return {"digest": self.digest, "fingerprint": self.source.fingerprint}

    @property
    def run_name(self) -> str:
        """The name under which the run is stored.

        The same command on the same images continues the run; anything that changes the result
        starts another.
        """
        digest = cfg.digest_of({"experiment": self.digest, "data": self.source.fingerprint})
        return f"{self.config.name}-{digest[:8]}"

    @property
    def folder(self) -> RunFolder:
        """The folder of the run."""
        return RunFolder.of(self.config.storage, self.run_name)

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch."""
        return self.config.steps_per_epoch(self.source.num_pairs)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.total_steps(self.source.num_pairs)

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return self.config.warmup_steps(self.source.num_pairs)


def enter(
    experiment: Experiment,
    run: Callable[Concatenate[ResolvedExperiment, P], T],
    *args: P.args,
    **options: P.kwargs,
) -> T:
    """Return what `run` makes of the experiment, resolved: each entry point comes here, once.

    What stands below an entry point takes a `ResolvedExperiment`, so that nothing resolves twice:
    resolving opens the data, hashes checkpoints, and runs the checks of imported code.
    """
    return run(resolve(experiment), *args, **options)


def resolve(experiment: Experiment) -> ResolvedExperiment:
    """Return the experiment with nothing left open, and fail now for what would fail in hours.

    Raises:
        ConfigError: First weights, a teacher or a decoder are not there or do not fit, imported
            code breaks its contract, an encoder of others that is to be registered cannot be, or
            $SIMCLR_RAY_NATIVE is invalid.
        DataError: The images cannot be read, none of a sample can be used, they fill no batch, or
            lack labels that the loss takes; or those of `data.test` are of classes that the
            classifier does not know.
        CheckpointError: The teacher names more classes than it has.
        TrackingError: MLflow cannot keep the run, or not under the alias that is asked for.
    """
    native.check_setting()  # read by the actors that make views, on other nodes and minutes later
    experiment = resolve_imports(resolve_scaling(experiment))
    if experiment.encoder.is_tried and not any(w == "encoder" for w, _ in imports_in(experiment)):
        check_encoder(experiment)
    experiment = resolve_folders(experiment)
    data = experiment.data
    source = open_grouped(data.train, data.columns, data.limit)
    sample = Sample(source)
    experiment = experiment.model_copy(
        update={"data": resolve_decoder(resolve_white(data, sample))}
    )
    config, source = resolve_classes(resolve_teacher(resolve_init(experiment)), source)
    build_plan(config, source)  # fails here when the rows fill no batch
    resolved = ResolvedExperiment(config, source, teacher_classes(config))
    _check_evaluation(resolved)
    _check_images(config.data, sample)
    check_registry(config.registry)
    RunFolder.of(config.storage, config.name)  # fails here for a file in its place
    store_uri(config.tracking.uri, config.storage)
    check_registrable(config)
    check_policy(resolved)
    if resolved.folder.local is not None and not resolved.folder.local.exists():
        try:
            check_makeable(resolved.folder.local)
        except OSError as error:
            problem = f"{config.storage} cannot be made: {error.strerror or one_line(error)}"
            raise ConfigError.of("storage", problem) from error
    return resolved


def _check_images(data: DataConfig, train: Sample) -> None:
    """Decode a sample of the images of each split, as the run will."""
    decoder = training_decoder(data)
    check_sample(train, decoder, max_bad_fraction=data.max_bad_fraction)
    for uri in dict.fromkeys((data.test, data.eval_train)):
        if uri and uri != data.train:
            sample = Sample(Source.open(uri, data.columns))
            check_sample(sample, evaluation_decoder(data), seconds=CHECK_SECONDS / 2)


def _check_evaluation(resolved: ResolvedExperiment) -> None:
    """Open the splits that are read after the training, and compare what can be compared."""
    data, head = resolved.config.data, resolved.config.classifier
    overlap = overlap_line(data)
    if overlap:
        log.warning("%s", overlap)
    bank = Source.open(data.eval_train, data.columns) if data.eval_train else resolved.source
    if not data.test:
        return
    test = Source.open(data.test, data.columns)
    if head is not None and test.has_labels:
        map_to_classifier(test, resolved.class_names, head.num_classes)
    elif test.has_labels and bank.has_labels:
        align_labels(bank, test)
    elif bank.has_labels:
        log.warning("%s %s: no kNN and no linear scores", test.shown_uri, test.unlabelled)


def resolve_classes(experiment: Experiment, source: Source) -> tuple[Experiment, Source]:
    """Return the experiment, and the images with labels that count the classes that there are.

    The number of classes is filled in where the head is a classifier.

    Raises:
        DataError: The loss takes labels and the images have none; of a classifier, where an
            image has none, there are fewer than two classes, or more than `head.num_classes`.
    """
    if not experiment.takes_labels:
        return experiment, source
    if not source.has_labels:
        raise DataError(
            f"loss.name={experiment.loss.name} needs labels, and {source.shown_uri} "
            f"{source.unlabelled} (data.columns.label)"
        )
    head = experiment.classifier
    if head is None:
        return experiment, source
    labels = source.labels() if head.num_classes else None  # K is chosen: gaps and all
    if labels is None or labels.max() >= head.num_classes:
        (source,) = align_labels(source)
        labels = source.labels()
    if (labels == NO_LABEL).any() or labels.min() < 0:
        raise DataError(
            f"{int((labels < 0).sum())} of {len(labels)} rows of {source.shown_uri} have no label; "
            "a classifier is trained on labelled rows alone"
        )
    num_classes = max(len(source.class_names), int(labels.max()) + 1)
    if len(np.unique(labels)) < 2:
        problem = "are of one class; there is nothing to learn"
        raise DataError(f"all rows of {source.shown_uri} {problem}")
    if head.num_classes and num_classes > head.num_classes:
        raise DataError(
            f"{source.shown_uri} has {num_classes} classes, more than "
            f"head.num_classes={head.num_classes} allows"
        )
    filled = head.model_copy(update={"num_classes": head.num_classes or num_classes})
    return experiment.model_copy(update={"head": filled}), source


def resolve_init(experiment: Experiment) -> Experiment:
    """Return the experiment with `init` naming one checkpoint or file, and its hash.

    Raises:
        ConfigError: There is nothing, or it is of another encoder or head.
    """
    weights = experiment.init.weights
    if not weights:
        return experiment
    try:
        files = weight_files(weights)
    except CheckpointError as error:
        raise _issue(str(error)) from error
    if files:
        for path in files:
            if not path.is_file():
                raise _issue(f"no file {path}")
        init_line(experiment)  # fails here where they do not fit
        hashes = [sha256(path) for path in files]
        update = {"weights": weights, "sha256": hashes[0] if len(files) == 1 else _joint(hashes)}
    else:
        with open_checkpoint(weights) as (where, folder):
            record = checkpoint.read_record(folder)
            _check_fits(experiment, record["experiment"])
            update = {"weights": where, "sha256": record["files"][checkpoint.STATE]["sha256"]}
    init = experiment.init.model_copy(update=update)
    return experiment.model_copy(update={"init": init})


def init_line(experiment: Experiment) -> str:
    """Return how the tensors of `init.weights`, another program's, serve the encoder.

    Raises:
        ConfigError: They do not.
    """
    device = "cpu" if any(w == "encoder" for w, _ in imports_in(experiment)) else "meta"
    with torch.device(device):  # names and shapes are enough, but imported code may refuse
        encoder = build_encoder(
            experiment.encoder, size=experiment.augment.size, channels=experiment.data.channels
        )
    try:
        return foreign_weights(encoder, experiment).line
    except CheckpointError as error:
        raise _issue(str(error)) from error


def _joint(hashes: list[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


NO_CLASSIFIER = "is a run without a classifier: `simclr-ray model finetune` trains one from it"


def resolve_teacher(experiment: Experiment) -> Experiment:
    """Return the experiment, its teacher one checkpoint, and as many classes as that knows.

    Raises:
        ConfigError: The teacher is no classifier, or knows other classes.
    """
    loss = experiment.distillation
    if loss is None:
        return experiment
    with open_checkpoint(loss.teacher, TEACHER) as (where, folder):
        record = checkpoint.read_record(folder)
    head = cfg.validate(Experiment, stored_tree(record["experiment"])).classifier
    if head is None:
        raise ConfigError.of(TEACHER, f"{loss.teacher} {NO_CLASSIFIER}")
    own, channels = experiment.classifier, experiment.data.channels
    assert own is not None
    if _channels_of(record["experiment"]) != channels:
        problem = f"takes {_channels_of(record['experiment'])} channels, data.channels={channels}"
        raise ConfigError.of(TEACHER, problem)
    if own.num_classes not in (0, head.num_classes):
        problem = f"knows {head.num_classes} classes, head.num_classes={own.num_classes}"
        raise ConfigError.of(TEACHER, problem)
    teacher = {"teacher": where, "sha256": record["files"][checkpoint.STATE]["sha256"]}
    update = {
        "loss": loss.model_copy(update=teacher),
        "head": own.model_copy(update={"num_classes": head.num_classes}),
    }
    return experiment.model_copy(update=update)


def _check_fits(experiment: Experiment, other: Mapping[str, object]) -> None:
    encoder = cfg.to_tree(experiment.encoder)
    theirs = other["encoder"]
    assert isinstance(theirs, dict)
    kind = type(experiment.encoder)
    apart = (
        cfg.differences(cfg.to_tree(cfg.validate(kind, theirs)), encoder)
        if (theirs.get("name") == encoder["name"])
        else [f"name: {theirs.get('name')} -> {encoder['name']}"]
    )
    channels = experiment.data.channels
    if _channels_of(other) != channels:
        apart.append(f"data.channels: {_channels_of(other)} -> {channels}")
    if apart:
        raise _issue(f"is of another encoder: {'; '.join(apart)}")
    head, brought = experiment.classifier, other["head"]
    assert isinstance(brought, dict)
    hidden = int(brought.get("layers", 0))
    if brought["name"] != "classifier":  # an mlp counts its last layer as well
        hidden = max(0, hidden - 1)
    if head is not None and head.layers > hidden:
        raise _issue(
            f"head.layers={head.layers} hidden layers are to come from a head that has {hidden}"
        )


def _channels_of(tree: Mapping[str, object]) -> int:
    """Return `data.channels` of a stored experiment, which earlier releases did not have."""
    data = tree["data"]
    assert isinstance(data, dict)
    return int(data.get("channels", 3))


def _issue(problem: str) -> ConfigError:
    return ConfigError.of(INIT_WEIGHTS_KEY, problem)
