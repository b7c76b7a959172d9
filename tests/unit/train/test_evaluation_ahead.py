"""What an evaluation needs is made from the first report on; an error of it costs nothing."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from PIL import Image

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import DataError
from simclr_ray.evaluation import encoded_splits, features
from simclr_ray.evaluation.decoded import DECODED
from simclr_ray.evaluation.encoded_splits import encode_splits
from simclr_ray.evaluation.scores import RawPixelEncoder
from simclr_ray.train import evaluation_ahead
from simclr_ray.train.evaluation_ahead import EvaluationAhead
from simclr_ray.train.resolve import ResolvedExperiment, resolve
from tests.ray.images import write_splits
from tests.ray.test_pretrain import tree_of


@pytest.fixture
def resolved(tmp_path: Path) -> ResolvedExperiment:
    write_splits(tmp_path, 60)
    return resolve(cfg.validate(Experiment, tree_of(tmp_path, "runs", 1, "float32")))


def count_decoding(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    decoded: list[int] = []
    usual = features._decoded_rows

    def counting(*arguments: object) -> features.Split:
        split = usual(*arguments)  # type: ignore[arg-type] # as given
        decoded.append(len(split.images))
        return split

    monkeypatch.setattr(features, "_decoded_rows", counting)
    return decoded


def test_splits_are_decoded_once_and_views_drawn_after_the_first_report(
    resolved: ResolvedExperiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = count_decoding(monkeypatch)
    reports: list[dict[str, float]] = []
    with EvaluationAhead(resolved, reports.append) as ahead:
        for step in range(3):
            ahead.report({"step": float(step)})
        views = ahead.views()
        assert views is not None
        assert Image.open(views).width > 100
        assert sorted(decoded) == [60, 60]
        list(encode_splits(resolved.config, [RawPixelEncoder()]))
        assert len(decoded) == 2
    assert [report["step"] for report in reports] == [0, 1, 2]
    assert not views.exists()
    assert DECODED.most == 0
    list(encode_splits(resolved.config, [RawPixelEncoder()]))
    assert len(decoded) == 4  # nothing is kept


def test_without_a_report_nothing_is_made_and_an_error_is_left_to_the_evaluation(
    resolved: ResolvedExperiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = count_decoding(monkeypatch)
    with EvaluationAhead(resolved, None) as ahead:
        assert ahead.views() is None
    assert decoded == []

    def refuse(*_: object) -> None:
        raise DataError("gone")

    monkeypatch.setattr(evaluation_ahead, "decode_splits", refuse)
    with EvaluationAhead(resolved, None) as ahead:
        ahead.report({})
        assert ahead.views() is None


def test_large_splits_are_not_held_while_it_trains(
    resolved: ResolvedExperiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = count_decoding(monkeypatch)
    monkeypatch.setattr(evaluation_ahead, "MOST_BYTES", 3 * 32 * 32 * 100)
    with EvaluationAhead(resolved, None) as ahead:
        ahead.report({})
        assert ahead.views() is not None
    assert decoded == []
    assert encoded_splits.VIEWS_BYTES > evaluation_ahead.MOST_BYTES


def test_a_run_that_ends_meanwhile_leaves_nothing_in_memory(
    resolved: ResolvedExperiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, over = threading.Event(), threading.Event()

    def late(config: Experiment) -> object:
        begun.set()
        over.wait(30)
        return encoded_splits.evaluated_rows(config)

    monkeypatch.setattr(evaluation_ahead, "evaluated_rows", late)
    decoded = count_decoding(monkeypatch)
    ahead = EvaluationAhead(resolved, None)
    with ahead:
        ahead.report({})
        assert begun.wait(30)
    over.set()
    ahead._thread.join(30)
    assert DECODED.most == 0
    assert decoded == []
