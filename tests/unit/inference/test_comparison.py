"""Networks are compared on the same images, which are decoded once for all of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from simclr_ray import config as cfg
from simclr_ray.augment.decode import ImageDecoder, Pixels
from simclr_ray.config.experiment import Experiment
from simclr_ray.evaluation import scores as rows
from simclr_ray.evaluation.evaluate import score_networks
from simclr_ray.inference.comparison import (
    Contender,
    EncoderScores,
    paired_bootstrap,
    score_all,
    standard_errors,
    table,
)
from simclr_ray.inference.encoder import Classifier, Encoder
from simclr_ray.inference.requirement import Facts, Requirement
from tests.ray.images import write_splits

NUM_IMAGES = 40 + 60  # of both splits
SIZE = 8


class Counting(ImageDecoder):
    """Counts what it decodes."""

    decoded: ClassVar[list[int]] = []

    def decode(self, encoded: bytes, least: tuple[int, int] = (0, 0)) -> Pixels:
        self.decoded.append(len(encoded))
        return super().decode(encoded, least)


class MeanColor(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    data = write_splits(tmp_path, 40)
    tree: dict[str, Any] = {
        "name": "t", "batch_size": 8, "augment": {"size": SIZE},
        "data": {"train": f"{data}/train.parquet", "test": f"{data}/test.parquet"},
        "evaluation": {"knn": {"k": 5}, "linear": {"epochs": 5}},
    }  # fmt: skip
    return cfg.validate(Experiment, tree)


def test_networks_of_the_same_views_have_each_image_decoded_once(experiment: Experiment) -> None:
    Counting.decoded.clear()
    same = [
        Contender(name, network, SIZE, Counting())
        for name, network in (("a", MeanColor()), ("b", rows.RawPixelEncoder()), ("c", MeanColor()))
    ]
    score_all(same, experiment)
    assert len(Counting.decoded) == NUM_IMAGES
    Counting.decoded.clear()
    score_all([*same, same[0]._replace(size=2 * SIZE)], experiment)
    assert len(Counting.decoded) == 2 * NUM_IMAGES


def test_scores_are_those_of_the_evaluation_in_the_order_of_the_networks(
    experiment: Experiment,
) -> None:
    decoder = ImageDecoder()
    contenders = [
        Contender("a", MeanColor(), SIZE, decoder),
        Contender("large", MeanColor(), 2 * SIZE, decoder),
        Contender("pixels", rows.RawPixelEncoder(), SIZE, decoder),
    ]
    first, large, pixels = score_all(contenders, experiment)
    own, plain = score_networks(
        experiment, {"a": MeanColor(), "pixels": rows.RawPixelEncoder()}, ("knn", "linear")
    )
    assert first.metrics == own.numbers()
    assert pixels.metrics == plain.numbers()
    tree = cfg.to_tree(experiment) | {"augment": {"size": 2 * SIZE}}
    (expected,) = score_networks(
        cfg.validate(Experiment, tree), {"large": MeanColor()}, ("knn", "linear")
    )
    assert large.metrics == expected.numbers()
    ids, hits = first.hits["knn_top1"]
    assert ids.tolist() == list(range(1000, 1060))
    assert hits.mean() == first.metrics["knn_top1"]


COLORS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200), "yellow": (200, 201, 0)}
# what is shown and what the label says: one is wrong, and one of a class that nobody learned
SHOWN = [*["red"] * 4, *["green"] * 3, *["blue"] * 2, "yellow", "red"]
SAID = [*SHOWN[:-1], "blue"]
IDS = [7, 3, 9, 1, 5, 11, 0, 2, 10, 4, 6]
RIGHT = sorted(IDS[:9])  # of eleven


def colored(path: Path, shown: list[str], labels: pa.Array, ids: list[int], names: str) -> str:
    """Write images of one color each, labels counted by `names`; return the path."""
    images = []
    for color in shown:
        out = io.BytesIO()
        Image.new("RGB", (SIZE, SIZE), COLORS[color]).save(out, "PNG")
        images.append(out.getvalue())
    columns = {"id": pa.array(ids, pa.int64()), "image": pa.array(images, pa.binary())}
    made = pa.table(columns | {"label": labels})
    if names:
        made = made.replace_schema_metadata({"class_names": names})
    pq.write_table(made, path)
    return str(path)


def colored_splits(folder: Path, kind: str) -> Experiment:
    """Return an experiment whose test split has classes as text, by names, or by numbers alone."""
    bank = ["blue", "green", "red"] * 4
    test = [*COLORS] if kind == "numbers" else sorted(COLORS)  # another order than the classifier's
    if kind == "text":
        bank_labels, test_labels, names = pa.array(bank), pa.array(SAID), ("", "")
    else:
        bank_names = [*COLORS][:3] if kind == "numbers" else ["blue", "green", "red"]
        bank_labels = pa.array([bank_names.index(name) for name in bank], pa.int64())
        test_labels = pa.array([test.index(name) for name in SAID], pa.int64())
        names = ("", "") if kind == "numbers" else (",".join(bank_names), ",".join(test))
    data = {
        "train": colored(folder / "train.parquet", bank, bank_labels, [*range(12)], names[0]),
        "test": colored(folder / "test.parquet", SHOWN, test_labels, IDS, names[1]),
    }
    tree: dict[str, Any] = {
        "name": "t", "batch_size": 4, "augment": {"size": SIZE}, "data": data,
        "evaluation": {"knn": {"k": 1}, "linear": {"epochs": 1}, "batch_size": 4},
    }  # fmt: skip
    return cfg.validate(Experiment, tree)


def classifier(class_names: tuple[str, ...] = ("red", "green", "blue")) -> Classifier:
    """Return one that names the brightest channel."""
    encoder = Encoder(MeanColor(), config={}, size=SIZE, feature_dim=3)
    return Classifier(encoder, head=nn.Identity(), head_config={}, class_names=class_names)


@pytest.mark.parametrize("kind", ["text", "names", "numbers"])
def test_a_classifier_is_scored_by_its_own_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    experiment = colored_splits(tmp_path, kind)
    (scored,) = score_all([Contender.of("models:/m/1", classifier())], experiment)
    assert scored.metrics["classifier_top1"] == pytest.approx(9 / 11)
    ids, hits = scored.hits["classifier_top1"]
    assert ids[hits].tolist() == RIGHT
    missing = "3" if kind == "numbers" else "yellow"
    text = "1 of 11 test images are of classes that its classifier does not have"
    assert f"models:/m/1: {text} and count as wrong: {missing}" in caplog.text


def test_a_classifier_with_no_class_of_the_images_names_none_rightly(tmp_path: Path) -> None:
    experiment = colored_splits(tmp_path, "names")
    contender = Contender.of("m", classifier(("cat", "dog", "frog")))
    (scored,) = score_all([contender], experiment)
    assert scored.metrics["classifier_top1"] == 0.0


def test_two_classifiers_are_compared_and_an_encoder_without_one_says_so(tmp_path: Path) -> None:
    experiment = colored_splits(tmp_path, "text")
    swapped = classifier(("green", "red", "blue"))
    contenders = [
        Contender.of("one", classifier()),
        Contender.of("other", swapped),
        Contender.of("none", Encoder(MeanColor(), config={}, size=SIZE, feature_dim=3)),
    ]
    one, other, none = score_all(contenders, experiment)
    assert other.metrics["classifier_top1"] == pytest.approx(2 / 11)  # the blue ones
    error = paired_bootstrap(np.isin(IDS, RIGHT), np.isin(IDS, [2, 10]))
    assert standard_errors(one, other)["classifier_top1"] == error
    (row,) = (row for row in table(["one", "other"], [one, other]) if row[0] == "classifier_top1")
    assert row == ["classifier_top1", "0.8182", "0.1818", "+0.6364", f"{error:.4f}"]
    assert "classifier_top1" not in [row[0] for row in table(["one", "none"], [one, none])]
    rule = Requirement.parse("classifier_top1 >= champion - 0.2 * se")

    def tested(candidate: EncoderScores, champion: EncoderScores | None) -> tuple[bool, str]:
        facts = Facts(candidate.metrics, None, {}, candidate.absent)
        if champion is not None:
            facts = Facts(
                candidate.metrics,
                champion.metrics,
                standard_errors(candidate, champion),
                candidate.absent,
                champion.absent,
            )
        verdict = rule.check(facts)
        return verdict.holds, verdict.lines[0].partition(": ")[2]

    assert tested(one, other)[0]
    assert tested(one, None) == (True, "holds, there is no champion yet")
    text = "was not measured"
    said = f"classifier_top1 {text} (the version has no classifier)"
    assert tested(none, None) == (False, said)
    said = f"classifier_top1, se {text} (the version has no classifier)"
    assert tested(none, other) == (False, said)
    assert tested(one, none) == (False, f"champion, se {text} (the champion has no classifier)")
