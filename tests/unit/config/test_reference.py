"""Every key says what it means, what it takes and what it is where nobody sets it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.reference import Key, described, keys, keys_at
from simclr_ray.errors import ConfigError
from tests.unit.cli.in_turn import run_in_turn

ALL = keys()


@pytest.mark.parametrize("key", ALL, ids=lambda key: f"{key.path}-{key.variant}")
def test_every_key_has_a_sentence(key: Key) -> None:
    assert key.says.strip()
    assert key.takes.strip()
    assert "<class" not in key.takes


def test_no_key_is_left_out() -> None:
    paths = {key.path for key in ALL}
    for preset in cfg.preset_names():
        tree = cfg.to_tree(Experiment.load(preset))
        leaves = {re.sub(r"\.\d+\.", "[].", path) for path in cfg.leaves(tree)}
        assert {re.sub(r"\.options\..*", ".options", path) for path in leaves} <= paths, preset
    assert len({(key.path, key.variant) for key in ALL}) == len(ALL)


def test_a_key_is_that_of_each_variant_which_has_it() -> None:
    (margin,) = keys_at("loss.margin")
    assert margin == Key(
        "loss.margin", "triplet", "a number from 0 to 100", "0.8", "m; B.10 tried 0, 0.4, 0.8, 1.6."
    )
    assert [key.variant for key in keys_at("loss.sigma")] == ["dcl"]
    (learned,) = keys_at("loss.learn_temperature")
    assert (learned.takes, learned.default) == ("true or false", "false")
    (negatives, _, _) = keys_at("loss.negatives")
    assert negatives.takes == "one of both, other"
    assert [key.path for key in keys_at("evaluation.knn")] == [
        "evaluation.knn.k", "evaluation.knn.temperature",
    ]  # fmt: skip
    assert keys_at("augment.b[1].hue") == keys_at("augment.shared[].hue")
    assert described(margin).splitlines() == [
        "loss.margin  (of `triplet`)",
        "  m; B.10 tried 0, 0.4, 0.8, 1.6.",
        "  takes a number from 0 to 100; default 0.8",
    ]
    tree = cfg.to_tree(Experiment.load("cifar10_cpu", "data.train=x", "loss.temperature=0.3"))
    (first, *others) = (described(key, "mine", tree) for key in keys_at("loss.temperature"))
    assert first.endswith("is 0.3 in mine")
    assert not any("in mine" in text for text in others)
    assert {key.path for key in keys_at("augment.shared")} >= {"augment.shared[].strength"}
    with pytest.raises(ConfigError, match=r"is no key; did you mean loss\.margin"):
        keys_at("loss.margins")


def test_the_command_says_the_same(tmp_path: Path) -> None:
    known, unknown = run_in_turn(
        ["config", "--explain", "loss.margin"], ["config", "--explain", "none"], cwd=tmp_path
    )
    assert known.stdout.rstrip("\n") == described(keys_at("loss.margin")[0])
    assert unknown.returncode == 2
    assert "error: none: is no key" in unknown.stderr
