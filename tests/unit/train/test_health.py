"""A run that has collapsed is ended or said, and its encoder is not registered unasked."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import CollapseError, DivergedError, UnhealthyRunError
from simclr_ray.evaluation.label_free import label_free
from simclr_ray.inference.gate import check_scores
from simclr_ray.storage.run_folder import CONFIG_FILE, METRICS, RunFolder
from simclr_ray.storage.run_status import SCORES
from simclr_ray.train.health import HealthWatch

N, WARMUP = 64, 100
STUCK = math.log(2 * N - 1)
START = {
    "start/effective_rank": 4.5, "start/feature_std": 0.006, "start/weight_norm": 27.0,
    "start/effective_rank_z": 3.4, "start/feature_std_z": 0.01, "start/margin": 0.001,
    "start/equal_views": 0.0, "start/blank_views": 0.0, "start/copied_images": 0.0,
}  # fmt: skip
WELL = {
    "eval/effective_rank": 32.0, "eval/feature_std": 0.03, "eval/weight_norm": 27.2,
    "eval/effective_rank_z": 35.0, "eval/feature_std_z": 0.12, "eval/margin": 0.5,
    "eval/pair_top1": 0.3,
}  # fmt: skip
EQUAL = WELL | {
    "eval/effective_rank": 1.8, "eval/feature_std": 0.001, "eval/margin": 0.0004,
    "eval/pair_top1": 0.02,
}  # fmt: skip


def watch(**changes: Any) -> HealthWatch:
    tree = {"name": "t", "data": {"train": "x"}, "batch_size": N, **changes}
    made = HealthWatch(cfg.validate(Experiment, tree), WARMUP)
    made(at(0, START))
    return made


def at(step: int, values: Mapping[str, float]) -> dict[str, float]:
    return {"step": step, "epoch": step / 100, "total": 900, **values}


def report(step: int, loss: float, top1: float = 0.3) -> dict[str, float]:
    values = {"mean_loss": loss, "contrastive_top1": top1, "grad_norm": 10.0}
    return at(step, {f"train/{name}": value for name, value in values.items()})


def ended(health: HealthWatch, records: Iterable[Mapping[str, float]]) -> UnhealthyRunError | None:
    """Return what a watch raises of records in order, if anything."""
    for record in records:
        try:
            health(record)
        except UnhealthyRunError as error:
            return error
    return None


@pytest.mark.parametrize(("steps", "ends"), [(290, False), (300, True)])
def test_a_loss_has_two_hundred_steps_after_warm_up_to_leave_that_of_equal_embeddings(
    steps: int, *, ends: bool
) -> None:
    error = ended(watch(), (report(step, STUCK) for step in range(10, steps + 1, 10)))
    assert isinstance(error, CollapseError) == ends
    if error is not None:
        assert "stuck: the loss is 4.8442" in str(error)
        assert error.good_until == WARMUP


def test_one_report_below_that_level_is_a_sign_of_life() -> None:
    losses = [STUCK + 0.1] * 20 + [STUCK - 0.2] + [STUCK + 0.1] * 19
    assert ended(watch(), (report(10 * k, v) for k, v in enumerate(losses, 1))) is None


def test_features_that_shrink_below_the_untrained_end_a_run_where_that_lasts() -> None:
    once = [at(150, WELL), at(200, EQUAL), at(250, WELL), at(300, EQUAL), at(340, EQUAL)]
    health = watch()
    assert ended(health, once) is None
    assert health.well_until == 250
    error = ended(health, [at(350, EQUAL)])
    assert isinstance(error, CollapseError)
    assert "effective rank is 1.8, before the first step 4.5" in str(error)
    assert error.good_until == 250


def test_a_margin_that_falls_back_ends_a_run_and_names_when_it_was_well() -> None:
    fallen = WELL | {"eval/margin": 0.02}
    error = ended(watch(), [at(150, WELL), at(200, fallen), at(250, fallen)])
    assert isinstance(error, CollapseError)
    assert "0.0200 (cosine), after 0.500" in str(error)
    assert error.good_until == 150


def test_features_of_one_direction_end_a_run_at_once() -> None:
    error = ended(watch(), [at(10, {**EQUAL, "eval/effective_rank": 1.02})])
    assert isinstance(error, CollapseError)
    assert "effective rank is 1.02 after epoch 0" in str(error)
    assert error.good_until == 0


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ({"equal_views": 0.95}, "the two views of 95% of the images are identical"),
        ({"blank_views": 0.6}, "60% of the images have two views of one color"),
        ({"copied_images": 0.8}, "80% of the images have exact duplicates in a batch of 64"),
        ({"equal_views": 0.5, "blank_views": 0.3, "copied_images": 0.3}, ""),
    ],
)
def test_views_that_tell_nothing_end_a_run_before_its_first_step(
    start: dict[str, float], said: str
) -> None:
    tree = {"name": "t", "data": {"train": "x"}, "batch_size": N}
    health = HealthWatch(cfg.validate(Experiment, tree), WARMUP)
    error = ended(health, [at(0, START | {f"start/{k}": v for k, v in start.items()})])
    assert said in str(error)
    assert (error is not None) == bool(said)
    assert error is None or not error.rate_may_help
    supervised = tree | {"loss": {"name": "cross_entropy"}, "head": {"name": "classifier"}}
    health = HealthWatch(cfg.validate(Experiment, supervised), WARMUP)
    assert ended(health, [at(0, START | {f"start/{k}": v for k, v in start.items()})]) is None


@pytest.mark.parametrize(
    ("evaluated", "changes", "cause"),
    [
        ({"weight_norm": 600.0}, {}, "probably the rate: 0.075 after a warm-up of 100 steps, the"),
        ({"weight_norm": 3.0}, {"optimizer": {"weight_decay": 2.0}}, "optimizer.weight_decay=2 "),
        ({"feature_std": 0.03, "feature_std_z": 1e-7}, {}, "probably the head: z hardly varies"),
        ({"feature_std": 0.03}, {}, "probably pairs that share nothing"),
        ({}, {"loss": {"temperature": 0.001}}, "loss.temperature=0.001 lengthens gradients 1,000"),
        ({}, {"loss": {"temperature": 50.0}}, "loss.temperature=50 makes all pairs count alike"),
        ({}, {}, "probably the rate"),
    ],
)
def test_the_likely_cause_is_named(
    evaluated: dict[str, float], changes: dict[str, Any], cause: str
) -> None:
    values = EQUAL | {f"eval/{name}": value for name, value in evaluated.items()}
    records = [at(step, values) for step in range(150, 500, 50)]
    error = ended(watch(**changes), records)
    assert cause in str(error)


def test_an_encoder_whose_weights_do_not_move_is_named() -> None:
    error = ended(watch(), [at(60, WELL | {"eval/weight_norm": 27.0})])
    assert "frozen: no weight of the encoder has moved in 60 steps" in str(error)
    assert error is not None
    assert not error.rate_may_help


def test_partners_that_only_training_mode_finds_are_a_leak() -> None:
    records = [report(step, 0.1, top1=0.95) for step in range(10, 260, 10)]
    records += [at(step, WELL | {"eval/pair_top1": 0.05}) for step in (150, 200, 250)]
    error = ended(watch(), sorted(records, key=lambda r: r["step"]))
    assert "95.0% of the batches in training, in 5.0% by running statistics" in str(error)


@pytest.mark.parametrize("key", ["train/grad_norm", "eval/margin"])
def test_a_metric_that_is_not_finite_is_a_divergence(key: str) -> None:
    record = report(20, 3.0) if key.startswith("train") else at(20, WELL)
    error = ended(watch(), [record | {key: math.nan}])
    assert isinstance(error, DivergedError)
    assert f"{key} is not finite at step 20" in str(error)


def test_a_single_bad_value_is_told_from_a_rate_that_is_too_high() -> None:
    steady, rising = watch(), watch()
    for step in range(10, 60, 10):
        steady(report(step, 3.0))
        rising(report(step, 3.0 * 1.5 ** (step / 10)))
    error = DivergedError("the loss is not finite at step 60")
    assert "a single bad value" in str(steady.explained(error))
    assert "probably the rate" in str(rising.explained(error))
    assert "probably the rate" in str(watch().explained(error))  # at once


def test_records_that_a_restart_makes_anew_count_once() -> None:
    health = watch()
    health.replay(report(step, STUCK) for step in range(10, 290, 10))
    assert ended(health, (report(step, STUCK) for step in range(210, 290, 10))) is None
    assert ended(health, [report(300, STUCK)]) is not None


def test_what_a_rollback_has_left_behind_tells_nothing_of_the_new_branch() -> None:
    """Neither the largest margin nor the evaluation of a collapse is of the steps made anew."""
    health = watch()
    lost = WELL | {"eval/margin": 0.001}
    assert ended(health, [at(150, WELL), at(200, lost)]) is None
    young = WELL | {"eval/margin": 0.03}
    again = [report(110, STUCK * 1.1), at(150, young), at(200, young), at(250, young)]
    assert ended(health, again) is None
    assert health.well_until == 250


def test_a_log_of_a_long_run_is_replayed_in_a_time_that_grows_with_its_length() -> None:
    def seconds(steps: int) -> float:
        health, reports = watch(), [report(step, 1.0) for step in range(10, 10 * steps, 10)]
        gc.collect()  # what other tests left would be collected in the middle
        began = time.thread_time()
        health.replay(reports)
        return time.thread_time() - began

    assert seconds(16_000) < 12 * seconds(4_000)  # 4 times; 16 where each looks at all


def test_what_would_have_ended_a_run_is_returned_unless_it_was_well_again() -> None:
    fallen = [at(200, EQUAL), at(300, EQUAL)]
    assert isinstance(watch().replay([at(150, WELL), *fallen]), CollapseError)
    assert watch().replay([at(150, WELL), *fallen, at(500, WELL)]) is None  # it went on
    late = [report(310, STUCK - 0.2), report(320, STUCK - 0.2)]  # workers ran on for a moment
    assert isinstance(watch().replay([at(150, WELL), *fallen, *late]), CollapseError)
    again = [at(160, WELL), at(200, WELL), at(300, WELL)]  # rolled back
    assert watch().replay([at(150, WELL), *fallen, *again]) is None
    assert watch().replay([at(150, WELL), *fallen, report(160, STUCK - 0.2)]) is None
    assert isinstance(watch().replay([at(150, WELL), report(300, math.nan)]), DivergedError)
    assert watch().replay([at(150, WELL)]) is None
    assert watch().replay([]) is None


def test_a_loss_without_such_a_level_is_not_held_to_it() -> None:
    health = watch(loss={"name": "triplet"})
    assert ended(health, (report(step, STUCK) for step in range(10, 900, 10))) is None
    error = ended(health, (report(step, 1.0, top1=1 / N) for step in range(900, 1500, 10)))
    assert "a view's partner is found in" in str(error)


def test_what_ends_a_run_is_no_part_of_its_digest() -> None:
    tree: dict[str, Any] = {"name": "t", "data": {"train": "x"}}
    one, other = (
        cfg.validate(Experiment, tree | {"health": {"on_collapse": policy}})
        for policy in ("stop", "warn")
    )
    assert one.digest() == other.digest() == cfg.validate(Experiment, tree).digest()


@pytest.mark.parametrize(
    ("trained", "untrained", "refused"),
    [(1.5, 2.3, True), (1.0, 1.4, True), (1.5, 1.4, False), (9.0, 11.0, False), (None, 2.0, False)],
)
def test_an_encoder_that_spans_less_than_an_untrained_one_is_not_registered(
    trained: float | None, untrained: float, tmp_path: Path, *, refused: bool
) -> None:
    folder = RunFolder(str(tmp_path), "r")
    rows = {"trained encoder": trained, "untrained encoder": untrained}
    scores = [{"name": name, "effective_rank": rank} for name, rank in rows.items()]
    folder.write_text(SCORES, json.dumps(scores))
    if not refused:
        check_scores(folder)
        return
    with pytest.raises(CollapseError, match=r"effective rank is 1\..*untrained.*--force"):
        check_scores(folder)


@pytest.mark.parametrize(
    ("better", "refused"),
    [({}, True), ({"knn_top1": 0.31}, False), ({"effective_rank": 9.1}, False),
     ({"feature_std": 0.02}, False)],
)  # fmt: skip
def test_an_encoder_that_is_better_than_the_untrained_in_nothing_is_not_registered(
    better: dict[str, float], tmp_path: Path, *, refused: bool
) -> None:
    folder = RunFolder(str(tmp_path), "r")
    before = {"knn_top1": 0.3, "effective_rank": 9.0, "feature_std": 0.01, "uniformity": -0.1}
    rows = {"trained encoder": before | {"uniformity": -3.0} | better, "untrained encoder": before}
    folder.write_text(SCORES, json.dumps([{"name": n, **row} for n, row in rows.items()]))
    if not refused:
        check_scores(folder)
        return
    with pytest.raises(CollapseError, match=r"no better than the untrained one: knn_top1 0\.3 "):
        check_scores(folder)


@pytest.mark.parametrize(("trained", "refused"), [(1.5, True), (2.2, False), (9.0, False)])
def test_a_run_without_a_table_of_scores_is_known_by_what_it_logged(
    trained: float, tmp_path: Path, *, refused: bool
) -> None:
    """A trial of a study has no such table."""
    folder = RunFolder(str(tmp_path), "r")
    records = [at(0, START), *(at(s, WELL | {"eval/effective_rank": trained}) for s in (10, 20))]
    folder.write_text(METRICS, "\n".join(map(json.dumps, records)))
    if not refused:
        check_scores(folder)  # without accuracies at the start, only its rank is compared
        return
    with pytest.raises(CollapseError, match=r"rank is 1\.50, before the first step 4\.50"):
        check_scores(folder)


CLASSES = {
    "two": torch.eye(2, 64).repeat_interleave(torch.tensor([60, 40]), 0),
    "opposite": torch.tensor([[1.0], [-1.0]]).repeat(50, 64),
    # the corners of a triangle around 0, unequally many
    "three": (torch.eye(3, 64) - torch.ones(3, 64) / 3 * (torch.arange(64) < 3)).repeat_interleave(
        torch.tensor([50, 30, 20]), 0
    ),
    "constant": torch.ones(100, 64),
}


def scores_of(features: torch.Tensor) -> dict[str, float]:
    return {k: v for k, v in label_free(features)._asdict().items() if k != "uniformity"}


def labelled(num_classes: int, loss: str = "cross_entropy") -> dict[str, Any]:
    """Return what the config of a run has besides, for so many classes; 0: without labels."""
    if loss == "supcon":
        return {"loss": {"name": loss}}
    head = {"name": "classifier", "num_classes": num_classes}
    return {"loss": {"name": loss}, "head": head} if num_classes else {}


@pytest.mark.parametrize(
    ("classes", "rank", "num_classes", "refused"),
    [("two", 1.99, 2, False), ("opposite", 1.0, 2, False), ("three", 1.98, 3, False),
     ("two", 1.99, 0, True), ("two", 1.99, 100, True),
     ("constant", 1.0, 2, True), ("constant", 1.0, 0, True), ("constant", 1.0, 100, True)],
)  # fmt: skip
def test_an_encoder_that_tells_few_classes_apart_needs_few_dimensions(
    classes: str, rank: float, num_classes: int, tmp_path: Path, *, refused: bool
) -> None:
    """Neural collapse: the features of a class are one point, those of all images never are."""
    noise = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    before, now = scores_of(1 + 0.05 * noise), scores_of(CLASSES[classes])
    assert now["effective_rank"] == pytest.approx(rank, abs=0.01)
    assert before["effective_rank"] > 4
    tree = {"name": "t", "data": {"train": "x"}, **labelled(num_classes)}
    folder = RunFolder(str(tmp_path), "r")
    folder.write_text(CONFIG_FILE, json.dumps(tree))
    top1 = 0.3 + (classes != "constant") * 0.6
    rows = {"trained encoder": now | {"knn_top1": top1}, "untrained encoder": before}
    for rows_of in (rows, {n: row | {"knn_top1": 0.2} for n, row in rows.items()}):
        folder.write_text(SCORES, json.dumps([{"name": n, **row} for n, row in rows_of.items()]))
        refusal = refused_by(folder)
        assert ("all images look alike" in refusal) == bool(refusal) == refused
    folder.remove(SCORES)
    logged = {f"start/{k}": v for k, v in before.items()}, {f"eval/{k}": v for k, v in now.items()}
    records = [at(step, START | values) for step, values in zip((0, 10), logged, strict=True)]
    folder.write_text(METRICS, "\n".join(map(json.dumps, records)))
    assert bool(refused_by(folder)) == refused


def refused_by(folder: RunFolder) -> str:
    try:
        check_scores(folder)
    except CollapseError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("changes", "deviation", "ends"),
    [(labelled(2), 0.03, False), (labelled(0, "supcon"), 0.03, False), (labelled(2), 1e-6, True),
     (labelled(100), 0.03, True), ({}, 0.03, True)],
)  # fmt: skip
def test_features_of_two_opposite_points_end_no_run_that_tells_two_classes_apart(
    changes: dict[str, Any], deviation: float, *, ends: bool
) -> None:
    values = WELL | {"eval/effective_rank": 1.0, "eval/feature_std": deviation}
    error = ended(watch(**changes), [at(200, values)])
    assert (error is not None) == ends
    assert "effective rank is 1.00" in str(error or "effective rank is 1.00")


def test_a_run_that_was_not_evaluated_may_be_registered(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "r")
    check_scores(folder)
    folder.write_text(SCORES, "[]")
    check_scores(folder)
