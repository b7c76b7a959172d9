"""The score table: one code for encoders and pixels, and what it says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from simclr_ray.config.experiment import (
    DataConfig,
    EvaluationConfig,
    Experiment,
    KNNConfig,
    LinearConfig,
)
from simclr_ray.config.imports import PERMISSION
from simclr_ray.config.protocols import DEFAULT_PROTOCOLS, PROTOCOLS, Protocol
from simclr_ray.errors import ConfigError, DataError, RunError
from simclr_ray.evaluation.encoded_splits import encode
from simclr_ray.evaluation.evaluate import score_networks
from simclr_ray.evaluation.features import Split, extract_features
from simclr_ray.evaluation.label_free import label_free
from simclr_ray.evaluation.scores import (
    PIXELS,
    RawPixelEncoder,
    Score,
    format_table,
    score_features,
    short_table,
    table,
)

EXPERIMENT = Experiment(
    name="table",
    data=DataConfig(train="unused"),
    evaluation=EvaluationConfig(knn=KNNConfig(k=5), linear=LinearConfig(epochs=20, batch_size=32)),
)


def split(seed: int, rows: int, side: int = 4) -> Split:
    """Return images whose class is which channel is bright, half of the pixels being noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, rows)
    images = rng.integers(0, 200, (rows, 3, side, side))
    images[np.arange(rows), labels] += 55
    return Split(
        torch.from_numpy(images.astype(np.uint8)),
        torch.from_numpy(labels),
        torch.arange(rows),
        [],
    )


def score_encoder(
    name: str,
    encoder: nn.Module,
    bank: Split,
    test: Split | None,
    experiment: Experiment,
    protocols: Sequence[str] = DEFAULT_PROTOCOLS,
) -> Score:
    encoded = encode(encoder, bank, test, experiment)
    return score_features(name, *encoded, experiment, protocols)


class MeanColor(nn.Module):
    """An encoder that sees what matters."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


def test_an_encoder_that_sees_the_class_beats_raw_pixels_in_both_protocols() -> None:
    bank, test = split(1, 200), split(2, 100)
    encoded = score_encoder("color", MeanColor(), bank, test, EXPERIMENT)
    pixels = score_encoder(PIXELS, RawPixelEncoder(), bank, test, EXPERIMENT)
    assert pixels.name == "raw pixels"
    assert encoded.knn_top1 is not None
    assert encoded.linear_top1 is not None
    assert pixels.knn_top1 is not None
    assert pixels.linear_top1 is not None
    assert encoded.linear_top1 > 0.9
    assert encoded.knn_top1 > 0.8
    assert 1 / 3 < pixels.knn_top1 < encoded.knn_top1
    assert pixels.linear_top1 > 1 / 3


def test_an_encoder_that_passes_pixels_on_scores_exactly_as_raw_pixels() -> None:
    bank, test = split(3, 80), split(4, 40)
    encoded = score_encoder("raw pixels", nn.Flatten(), bank, test, EXPERIMENT)
    assert encoded == score_encoder(PIXELS, RawPixelEncoder(), bank, test, EXPERIMENT)


def test_without_a_test_split_or_a_protocol_only_the_rest_is_filled() -> None:
    bank, test = split(5, 60), split(6, 30)
    alone = score_encoder("h", MeanColor(), bank, None, EXPERIMENT)
    assert (alone.knn_top1, alone.linear_top1) == (None, None)
    expected = label_free(bank.images.float().div(255).mean((2, 3)))
    found = (alone.uniformity, alone.effective_rank, alone.feature_std)
    assert found == pytest.approx(tuple(expected), rel=1e-5)
    assert score_encoder(PIXELS, RawPixelEncoder(), bank, None, EXPERIMENT).knn_top1 is None
    only = score_encoder("h", MeanColor(), bank, test, EXPERIMENT, ["knn"])
    assert only.knn_top1 is not None
    assert only.linear_top1 is None


def test_rows_without_labels_are_not_scored_and_none_at_all_is_an_error() -> None:
    bank, test = split(7, 60), split(8, 30)
    partly = test._replace(labels=torch.where(torch.arange(30) < 10, test.labels, -1))
    first = Split(test.images[:10], test.labels[:10], test.ids[:10], [])
    assert score_encoder(PIXELS, RawPixelEncoder(), bank, partly, EXPERIMENT) == score_encoder(
        PIXELS, RawPixelEncoder(), bank, first, EXPERIMENT
    )
    with pytest.raises(DataError, match="test split has no labelled rows"):
        score_encoder(
            PIXELS, RawPixelEncoder(), bank, test._replace(labels=torch.full((30,), -1)), EXPERIMENT
        )


def test_an_encoder_that_diverged_is_named() -> None:
    class Broken(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3)) * torch.nan

    with pytest.raises(RunError, match="trained encoder gives values that are no numbers"):
        score_encoder("trained encoder", Broken(), split(9, 20), split(10, 10), EXPERIMENT)


def test_pixels_of_large_views_are_averaged_down() -> None:
    large = split(11, 7, side=64)
    features = extract_features(RawPixelEncoder(), large.images, batch_size=3)
    assert features.shape == (7, 3 * 32 * 32)
    pairs = large.images.numpy().reshape(7, 3, 32, 2, 32, 2).mean((3, 5)) / 255
    np.testing.assert_allclose(features.numpy(), pairs.reshape(7, -1), atol=1e-6)


def test_the_table_reads_as_markdown_with_one_line_a_row() -> None:
    rows = [
        Score("trained encoder", -2.5, 40.25, 0.05, {"knn_top1": 0.8123, "linear_top1": 0.9}),
        Score("raw pixels", -1.0, 3.0, 0.1),
    ]
    head, rule, *lines = format_table(rows).splitlines()
    assert [head, rule, *lines] == [
        "| features        | kNN top-1 | linear top-1"
        " | uniformity ↓ | effective rank ↑ | feature std ↑ |",
        "| :-------------- | --------: | -----------:"
        " | -----------: | ---------------: | ------------: |",
        "| trained encoder |    81.2 % |       90.0 %"
        " |        -2.50 |             40.2 |        0.0500 |",
        "| raw pixels      |         - |            -"
        " |        -1.00 |              3.0 |        0.1000 |",
    ]


def test_rows_without_a_label_are_not_encoded_where_labels_are_scored() -> None:
    seen: list[int] = []

    class Counting(MeanColor):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(len(images))
            return super().forward(images)

    bank, test = split(7, 60), split(8, 30)
    bank.labels[10:] = -1
    score_encoder("h", Counting(), bank, test, EXPERIMENT)
    assert sum(seen) == 10 + 30


def test_a_protocol_from_outside_has_a_column_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PERMISSION, "tests.outside.own_components:nearest_mean")
    bank, test = split(9, 60), split(10, 30)
    own = "tests.outside.own_components:nearest_mean"
    score = score_encoder("h", MeanColor(), bank, test, EXPERIMENT, ["knn", own])
    assert list(score.accuracies) == ["knn_top1", "nearest_mean_top1"]
    assert score.accuracies["nearest_mean_top1"] > 0.8
    assert score.numbers()["nearest_mean_top1"] == score.accuracies["nearest_mean_top1"]
    head = [cell.strip() for cell in format_table([score]).splitlines()[0].split("|")]
    assert head[1:5] == ["features", "kNN top-1", "linear top-1", "nearest_mean top-1"]
    assert short_table([score])[0][3] == "nearest_mean top-1"
    wrong = "tests.outside.own_components:percent"
    with pytest.raises(ConfigError, match="would run code"):
        score_encoder("h", MeanColor(), bank, test, EXPERIMENT, [wrong])
    monkeypatch.setenv(PERMISSION, wrong)
    with pytest.raises(ConfigError, match=r"returned 93\.0; expected a float in \[0, 1\]"):
        score_encoder("h", MeanColor(), bank, test, EXPERIMENT, [wrong])


@pytest.mark.parametrize(
    "names", [["knn", "my.module:knn"], ["a.b:score", "c.d:score"], ["linear", "linear"]]
)
def test_two_protocols_of_one_metric_are_refused_before_anything_is_computed(
    names: list[str],
) -> None:
    said = f"{names[0]} and {names[1]} are both called {names[0].rpartition(':')[2]}_top1"
    networks = {"h": MeanColor()}
    with pytest.raises(ConfigError, match=said):
        score_networks(EXPERIMENT, networks, names)  # whose splits are not there
    with pytest.raises(ConfigError, match=said):
        score_encoder("h", MeanColor(), split(1, 9), split(2, 9), EXPERIMENT, names)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: p.name)
def test_every_protocol_of_the_table_scores(protocol: Protocol) -> None:
    score = score_encoder("h", MeanColor(), split(1, 90), split(2, 45), EXPERIMENT, [protocol.name])
    assert list(score.accuracies) == [protocol.metric]
    assert score.accuracies[protocol.metric] > 0.8
    assert protocol.label in short_table([score])[0]


def test_one_row_has_no_label_free_metrics() -> None:
    assert label_free(torch.ones(1, 4)) == (None, None, None)
    score = Score("encoder", *label_free(torch.ones(1, 4)), accuracies={"knn_top1": 1.0})
    assert table([score])[1][-3:] == ["-", "-", "-"]
    assert score.numbers() == {"knn_top1": 1.0}
    assert Score.from_tree(score.as_tree()) == score


def test_the_images_that_were_scored_are_counted_and_no_accuracy() -> None:
    bank, test = split(1, 90), split(2, 45)
    test.labels[40:] = -1
    score = score_encoder("h", MeanColor(), bank, test, EXPERIMENT)
    assert score.num_images == 40
    tree = score.as_tree()
    assert Score.from_tree(tree) == score
    del tree["num_images"]  # of an earlier release
    assert Score.from_tree(tree).num_images == 0
    assert "num_images" not in {**score.numbers(), **score.accuracies}
    assert table([score]) == table([Score.from_tree(tree)])
