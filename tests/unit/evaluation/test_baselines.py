"""Baselines are kept for the same question on the same images alone, and never half."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.evaluation import baselines
from simclr_ray.evaluation.baselines import baseline_digest, baseline_scores, score_run
from simclr_ray.evaluation.scores import PIXELS, TRAINED, UNTRAINED, Score
from tests.ray.images import noise_png

PROTOCOLS = ("knn",)


def write_split(path: Path, first_seed: int = 0) -> None:
    images = pa.array([noise_png(first_seed + i, 8) for i in range(8)], pa.binary())
    labels = pa.array([0, 1] * 4, pa.int64())
    pq.write_table(pa.table({"image": images, "label": labels}), path)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = {}
    for seed, split in enumerate(("train", "test")):
        write_split(tmp_path / f"{split}.parquet", 100 * seed)
        data[split] = str(tmp_path / f"{split}.parquet")
    encoder = {"name": "resnet", "depth": 10, "width": 0.25, "stem": "cifar"}
    augment = {"name": "simclr", "size": 8}
    return {"name": "t", "data": data, "augment": augment, "encoder": encoder, "batch_size": 4}


def experiment_of(tree: dict[str, Any], *overrides: str) -> Experiment:
    changed = json.loads(json.dumps(tree))
    for override in overrides:
        key, _, value = override.partition("=")
        *path, last = key.split(".")
        node = changed
        for part in path:
            node = node.setdefault(part, {})
        node[last] = json.loads(value)
    return cfg.validate(Experiment, changed)


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "simclr_ray" / "baselines").iterdir())


def no_work(*_: object) -> list[Score]:
    raise AssertionError("computed again")


def test_kept_rows_are_those_that_were_computed(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = experiment_of(tree)
    computed = baseline_scores(experiment, PROTOCOLS)
    assert [row.name for row in computed] == [UNTRAINED, PIXELS]
    assert len(entries(tmp_path)) == 1
    monkeypatch.setattr(baselines, "score_networks", no_work)
    assert baseline_scores(experiment_of(tree, "epochs=7"), PROTOCOLS) == computed
    own = Score(TRAINED, 0.0, 1.0, 0.5)
    monkeypatch.setattr(baselines, "evaluate_trained", lambda *_: own)
    monkeypatch.setattr(baselines, "evaluate_experiment", no_work)
    assert score_run(experiment, tmp_path, PROTOCOLS) == [own, *computed]


def test_a_first_run_keeps_the_rows_below_its_own(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        Score(name, 0.1, 1 / 3, 0.5, {"knn_top1": 0.1}) for name in (TRAINED, UNTRAINED, PIXELS)
    ]
    monkeypatch.setattr(baselines, "evaluate_experiment", lambda *_: rows)
    assert score_run(experiment_of(tree), tmp_path, PROTOCOLS) == rows
    monkeypatch.setattr(baselines, "score_networks", no_work)
    assert baseline_scores(experiment_of(tree), PROTOCOLS) == rows[1:]


@pytest.mark.parametrize(
    "override",
    [
        "seed=1", "encoder.depth=18", "encoder.width=0.5", "augment.size=16", "batch_size=2",
        "evaluation.knn.k=3", "evaluation.batch_size=2", "evaluation.size=16", "precision=\"bf16\"",
        "data.limit=4",
    ],
)  # fmt: skip
def test_what_decides_the_rows_makes_another_entry(tree: dict[str, Any], override: str) -> None:
    usual = baseline_digest(experiment_of(tree), PROTOCOLS)
    changed = baseline_digest(experiment_of(tree, override), PROTOCOLS)
    assert usual
    assert changed != usual


def test_other_images_code_libraries_and_machines_make_other_entries(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = experiment_of(tree)
    seen = [baseline_digest(experiment, PROTOCOLS), baseline_digest(experiment, ("linear",))]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    seen.append(baseline_digest(experiment, PROTOCOLS))
    torch.set_num_threads(threads)
    for name, value in (
        ("code_digest", lambda: "other"),
        ("versions_of", lambda names: dict.fromkeys(names, "0")),
    ):
        with monkeypatch.context() as other:
            other.setattr(baselines, name, value)
            seen.append(baseline_digest(experiment, PROTOCOLS))
    with monkeypatch.context() as other:
        other.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
        seen.append(baseline_digest(experiment, PROTOCOLS))
    write_split(tmp_path / "test.parquet", 200)
    seen.append(baseline_digest(experiment, PROTOCOLS))
    assert len(set(seen)) == len(seen)


def test_how_a_run_is_trained_decides_nothing(tree: dict[str, Any]) -> None:
    usual = baseline_digest(experiment_of(tree), PROTOCOLS)
    for override in ("epochs=3", "loss.temperature=0.3", 'name="u"', 'storage="elsewhere"'):
        named = ('loss.name="ntxent"', override) if override.startswith("loss") else (override,)
        assert baseline_digest(experiment_of(tree, *named), PROTOCOLS) == usual


def test_code_of_others_is_not_kept(tree: dict[str, Any]) -> None:
    assert baseline_digest(experiment_of(tree), ("their.module.protocol",)) == ""


@pytest.mark.parametrize("text", ["", "{", "[]", "[1, 2]", '[{"name": "untrained encoder"}]', "\0"])
def test_a_broken_entry_is_computed_again_and_mended(
    tree: dict[str, Any], tmp_path: Path, text: str
) -> None:
    experiment = experiment_of(tree)
    computed = baseline_scores(experiment, PROTOCOLS)
    (entry,) = entries(tmp_path)
    whole = entry.read_text()
    entry.write_text(text)
    assert baseline_scores(experiment, PROTOCOLS) == computed
    assert entry.read_text() == whole


def test_writers_at_once_leave_one_whole_entry(tmp_path: Path) -> None:
    entry = tmp_path / "baselines" / "e.json"
    rows = [Score(name, -1.5, 1 / 3, 0.1, {"knn_top1": 0.7}) for name in (UNTRAINED, PIXELS)]

    def use(_: int) -> bool:
        baselines._write(entry, rows)
        return baselines._read(entry) == rows

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(200)))
    assert list(entry.parent.iterdir()) == [entry]


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    rows = [Score(name, None, None, None) for name in (UNTRAINED, PIXELS)]
    baselines._write(tmp_path / "file" / "e.json", rows)
    assert baselines._read(tmp_path / "file" / "e.json") is None
