"""What the evaluation of a run takes, timed on a part of its splits before it begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeVar

import torch

from simclr_ray.config.experiment import Experiment
from simclr_ray.config.protocols import PROBE
from simclr_ray.data.decoding import evaluation_decoder
from simclr_ray.data.source import Source
from simclr_ray.evaluation.encoded_splits import evaluated_rows, first_splits
from simclr_ray.evaluation.evaluate import PROBE_ROWS, probed_source
from simclr_ray.evaluation.features import Features, Split, extract_features, load_split
from simclr_ray.evaluation.online import OnlineEvaluation, encoded_rows
from simclr_ray.evaluation.probes import probe, probe_class
from simclr_ray.evaluation.scores import TRAINED, RawPixelEncoder, score_features
from simclr_ray.nn.build import SimCLRModel

ENCODED: Final = 1024  # images of a part: a second, by a small encoder
LEARNED_FROM: Final = 20_000  # features of a part, and half of them that are asked about
PROBED: Final = 512
T = TypeVar("T")


class EvaluationSeconds(NamedTuple):
    """What each part of evaluation takes.

    Attributes:
        read: To decode what is evaluated, once a process that keeps it.
        start: Before the first step.
        epoch: At the end of an epoch that is evaluated.
        final: After the training, by the protocols.
        baselines: Of the untrained encoder and of raw pixels, by the protocols.
    """

    read: float
    start: float
    epoch: float
    final: float
    baselines: float


def evaluation_seconds(
    experiment: Experiment, source: Source, model: SimCLRModel, protocols: Sequence[str]
) -> EvaluationSeconds:
    """Return the seconds that one process takes, of the device where the model is.

    Args:
        experiment: Its splits and settings.
        source: The training images.
        model: As it is trained; left as it is.
        protocols: Names of `config.protocols`, or import paths, or `probe`.

    Raises:
        DataError: A split cannot be read.
    """
    device = next(p.device for p in model.parameters())
    online, read = _timed(lambda: OnlineEvaluation(experiment, source, 0, 1, device))
    start = epoch = 0.0
    if experiment.evaluation.every_epochs:
        online(model)  # allocates
        _, start = _timed(lambda: online.before_training(model))
        _, epoch = _timed(lambda: online(model))
    if not protocols:
        return EvaluationSeconds(read, start, epoch, 0.0, 0.0)
    model.eval()
    part, part_read = _timed(lambda: _SampledSplits(*first_splits(experiment, ENCODED)))
    final = baselines = 0.0
    if scored := [name for name in protocols if name != PROBE]:
        times = evaluated_rows(experiment, source).num / part.num
        read += times * part_read
        final, baselines = _final_s(experiment, model, part, times, scored)
    if PROBE in protocols:
        final += _probe_s(experiment, model, part, part_read / part.num)
    model.train()
    return EvaluationSeconds(read, start, epoch, final, baselines)


class OnlineSeconds(NamedTuple):
    """What evaluation beside the training takes of one process, the decoding aside.

    Attributes:
        start: Before the first step.
        epoch: At the end of an epoch that is evaluated.
    """

    start: float
    epoch: float


def online_seconds(
    experiment: Experiment, source: Source, model: SimCLRModel, most: int
) -> OnlineSeconds:
    """Return the seconds by those of encoding a few images: nearly all that it does is to encode.

    Args:
        experiment: Its splits and settings.
        source: The training images.
        model: As it is trained; left as it is.
        most: Images that are encoded.

    Raises:
        DataError: A split cannot be read.
    """
    if not experiment.evaluation.every_epochs:
        return OnlineSeconds(0.0, 0.0)
    size, decoder = experiment.evaluation_size, evaluation_decoder(experiment.data)
    split = load_split(source, size, max(2, most), decoder)
    _encoded(model, split.at(torch.arange(1)), None, experiment)  # allocates
    _, seconds = _timed(lambda: _encoded(model, split, None, experiment))
    rows = encoded_rows(experiment, source)
    each = seconds / len(split.images)
    return OnlineSeconds(each * rows.label_free, each * (rows.label_free + rows.knn))


class _SampledSplits(NamedTuple):
    """Some images of what is learned from and, where there are labels, of what is asked about."""

    bank: Split
    test: Split | None

    @property
    def num(self) -> int:
        return len(self.bank.images) + (len(self.test.images) if self.test else 0)


def _final_s(
    experiment: Experiment,
    model: SimCLRModel,
    part: _SampledSplits,
    times: float,
    scored: Sequence[str],
) -> tuple[float, float]:
    """Return what protocols take of an encoder, and of the untrained one and pixels."""
    bank, test = part
    features = _encoded(model, bank.at(torch.arange(2)), None, experiment)[0]
    final = times * _timed(lambda: _encoded(model, bank, test, experiment))[1]
    if test is None:
        return final, 0.0
    labels = torch.cat([bank.labels, test.labels])
    final += _scores_s(experiment, features.shape[1], labels, scored)
    pixels = RawPixelEncoder()(bank.images[:1].float()).shape[1]
    return final, final + _scores_s(experiment, pixels, labels, scored)


def _timed(action: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    result = action()
    return result, time.perf_counter() - began


def _encoded(
    model: SimCLRModel, bank: Split, test: Split | None, experiment: Experiment
) -> list[torch.Tensor]:
    device = next(p.device for p in model.parameters())
    size, precision = experiment.evaluation.batch_size, experiment.precision
    parts = [bank] if test is None else [bank, test]
    return [extract_features(model.encoder, s.images, size, device, precision) for s in parts]


def _scores_s(
    experiment: Experiment, width: int, labels: torch.Tensor, protocols: Sequence[str]
) -> float:
    """Return what protocols take on features of the whole splits: their time grows with the rows.

    By features that are drawn: what is timed does the same with any.
    """
    rows = evaluated_rows(experiment).num
    learned = min(LEARNED_FROM, rows)
    classes = int(labels.max()) + 1
    generator = torch.Generator().manual_seed(0)

    def drawn(num: int) -> Features:
        labels = torch.arange(num) % classes
        return Features(torch.randn(num, width, generator=generator), labels)

    num_scored = max(2, learned // 5)
    features = drawn(learned), drawn(num_scored)
    _, seconds = _timed(lambda: score_features(TRAINED, *features, experiment, protocols))
    return seconds * rows / (learned + num_scored)


def _probe_s(
    experiment: Experiment, model: SimCLRModel, part: _SampledSplits, read_image_s: float
) -> float:
    """Return what the probes of Table 3 take, and the class's; their time grows with the images.

    They decode what they ask about themselves, of each encoder.
    """
    size, precision = experiment.evaluation.batch_size, experiment.precision

    def answer(num: int) -> int:
        some = part.bank.at(torch.arange(min(num, len(part.bank.images))))
        half = some.at(torch.arange(max(1, len(some.images) // 2)))
        probe(model, some.images, half.images, batch_size=size, precision=precision)
        labelled = some.labelled()
        if part.test is not None and len(labelled.labels):
            linear = experiment.evaluation.linear
            probe_class(model, labelled, labelled, linear, batch_size=size, precision=precision)
        return len(some.images)

    answer(PROBED // 16)  # the first solver of a process imports torch's compiler, for seconds
    num, seconds = _timed(lambda: answer(PROBED))
    rows = min(PROBE_ROWS, probed_source(experiment.data).num_rows)
    return rows * (seconds / num + 1.5 * read_image_s)  # half as many are of the test split
