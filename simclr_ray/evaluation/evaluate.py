"""Evaluation of a run: the trained encoder, the untrained one and raw pixels, by one code."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from simclr_ray.config.experiment import (
    DataConfig,
    Experiment,
    NoHeadConfig,
    NTXentConfig,
)
from simclr_ray.config.protocols import DEFAULT_PROTOCOLS, protocols_named
from simclr_ray.data.aligned import align_labels, map_to_classifier
from simclr_ray.data.decoding import evaluation_decoder
from simclr_ray.data.overlap import overlap_line
from simclr_ray.data.source import Source
from simclr_ray.errors import DataError
from simclr_ray.evaluation.classification import Classification, classification
from simclr_ray.evaluation.encoded_splits import encode_split, encode_splits
from simclr_ray.evaluation.features import load_split
from simclr_ray.evaluation.probes import Probe, probe, probe_class
from simclr_ray.evaluation.scores import (
    PIXELS,
    TRAINED,
    UNTRAINED,
    RawPixelEncoder,
    Score,
    score_features,
)
from simclr_ray.nn.build import SimCLRModel, build_model
from simclr_ray.nn.precision import best_device
from simclr_ray.nn.pretrained import load_model, load_trained
from simclr_ray.storage import checkpoint

log = logging.getLogger(__name__)

PROBE_ROWS = 20_000  # of 3·size² bytes, four times over


def evaluate(
    folder: Path,
    protocols: Sequence[str] = DEFAULT_PROTOCOLS,
    *overrides: str,
) -> list[Score]:
    """Return one score row each for the trained encoder, the untrained one, and raw pixels.

    Args:
        folder: A checkpoint.
        protocols: Names of `config.protocols`, or import paths; without labelled splits all are
            left out, and only the label-free columns are filled.
        overrides: Of the experiment that the checkpoint holds, such as `data.test=DIR`.

    Raises:
        CheckpointError: The checkpoint is not whole.
        ConfigError: A protocol or an override is unknown.
        ClusterError: `evaluation.actors` ask for more than the cluster has.
        DataError: A split cannot be read.
    """
    experiment, model = load_trained(folder, *overrides)
    overlap = overlap_line(experiment.data)
    if overlap:
        log.warning("%s", overlap)
    return _score_all(experiment, model, protocols)


def evaluate_experiment(
    experiment: Experiment, folder: Path, protocols: Sequence[str] = DEFAULT_PROTOCOLS
) -> list[Score]:
    """Return what `evaluate` does, by the splits and settings of `experiment`."""
    return _score_all(experiment, load_model(folder), protocols)


def evaluate_trained(experiment: Experiment, folder: Path, protocols: Sequence[str]) -> Score:
    """Return the row of the trained encoder alone. Same as `evaluate_experiment` otherwise."""
    return score_networks(experiment, {TRAINED: load_model(folder).encoder}, protocols)[0]


def _score_all(
    experiment: Experiment, trained: SimCLRModel, protocols: Sequence[str]
) -> list[Score]:
    networks = {
        TRAINED: trained.encoder,
        UNTRAINED: untrained_encoder(experiment),
        PIXELS: RawPixelEncoder(),
    }
    return score_networks(experiment, networks, protocols)


def untrained_encoder(experiment: Experiment) -> nn.Module:
    """Return the encoder that the experiment's seed begins with."""
    alone = experiment.model_copy(update={"head": NoHeadConfig(), "loss": NTXentConfig()})
    return build_model(alone).encoder


def score_networks(
    experiment: Experiment, networks: Mapping[str, nn.Module], protocols: Sequence[str]
) -> list[Score]:
    """Return a row of each network, name -> encoder, by the splits of an experiment.

    Raises:
        ClusterError: `evaluation.actors` ask for more than the cluster has.
        ConfigError: A protocol is unknown, or two have one metric.
        DataError: A split cannot be read.
    """
    for protocol in protocols_named(protocols):
        protocol.load()  # fails here for one that is unknown
    encoded = encode_splits(experiment, list(networks.values()))
    return [
        score_features(name, *splits, experiment, protocols)
        for name, splits in zip(networks, encoded, strict=True)
    ]


def score_classifier(folder: Path, experiment: Experiment) -> Classification:
    """Return how the classifier in a checkpoint does on the labelled rows of `data.test`.

    Images are resized and cropped in the middle, without augmentation.

    Raises:
        CheckpointError: The checkpoint is not whole.
        DataError: The split cannot be read, or has no labels.
    """
    model = load_model(folder)
    network = nn.Sequential(model.encoder, model.head)
    data = experiment.data
    test = Source.open(data.test, data.columns)
    if not test.has_labels:
        raise DataError(f"{data.test} has no labels to test a classifier by")
    head, names = experiment.classifier, checkpoint.read_record(folder).get("class_names", ())
    assert head is not None
    test = map_to_classifier(test, names, head.num_classes)
    scores, _ = encode_split(test, network, experiment)  # [Q, K]
    return classification(scores.rows[:], scores.labels)


def probe_run(folder: Path, *overrides: str) -> list[Probe]:
    """Return what h and g(h) of a checkpoint know of transformations (Table 3).

    The MLPs learn from `data.eval_train` (or `data.train`) and are asked about `data.test`;
    without a test split, about the last fifth of the rows. Of larger splits a sample is taken. No
    labels are needed; where both splits have some, the class is asked about as well, by linear
    evaluation. Of a run with a learned temperature, g(h) is what the loss sees, of length 1/√τ.

    Raises:
        CheckpointError: The checkpoint is not whole.
        ConfigError: An override is unknown.
        DataError: A split cannot be read.
    """
    return _probe(*load_trained(folder, *overrides))


def probe_experiment(experiment: Experiment, folder: Path) -> list[Probe]:
    """Return what `probe_run` does, by the splits and settings of `experiment`."""
    return _probe(experiment, load_model(folder))


def _probe(experiment: Experiment, model: SimCLRModel) -> list[Probe]:
    data, size = experiment.data, experiment.evaluation_size
    decoder = evaluation_decoder(data)
    train = probed_source(data)
    model = model.to(best_device())
    evaluation, precision = experiment.evaluation, experiment.precision
    if not data.test:
        images = load_split(train, size, PROBE_ROWS, decoder).images
        first = -(-4 * len(images) // 5)
        return probe(
            model,
            images[:first],
            images[first:],
            seed=experiment.seed,
            batch_size=evaluation.batch_size,
            precision=precision,
        )
    test = Source.open(data.test, data.columns)
    have_labels = train.has_labels and test.has_labels
    if have_labels:
        try:
            train, test = align_labels(train, test)
        except DataError as error:  # the other questions need no labels
            log.warning("the class is not asked about: %s", error)
            have_labels = False
    seen = load_split(train, size, PROBE_ROWS, decoder)
    unseen = load_split(test, size, PROBE_ROWS // 2, decoder)
    probes = probe(
        model,
        seen.images,
        unseen.images,
        seed=experiment.seed,
        batch_size=evaluation.batch_size,
        precision=precision,
    )
    seen, unseen = seen.labelled(), unseen.labelled()
    if have_labels and len(seen.labels) and len(unseen.labels):
        probes.append(
            probe_class(
                model,
                seen,
                unseen,
                evaluation.linear,
                seed=experiment.seed,
                batch_size=evaluation.batch_size,
                precision=precision,
            )
        )
    return probes


def probed_source(data: DataConfig) -> Source:
    """Return the images that probes learn from, of which `PROBE_ROWS` are taken at most."""
    return Source.open(
        data.eval_train or data.train, data.columns, 0 if data.eval_train else data.limit
    )
