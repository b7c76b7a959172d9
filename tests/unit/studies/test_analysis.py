"""What a study found: means, claims by an exact test, the paper's order; figures and the page."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kendalltau

from simclr_ray.studies.analysis import (
    Results,
    as_json,
    best_outcome,
    paper_value,
    results_of,
)
from simclr_ray.studies.claim_words import sign_text
from simclr_ray.studies.claims import sign_flip_p
from simclr_ray.studies.definition import Study
from simclr_ray.studies.figures import _measured, _paper, draw_study
from simclr_ray.studies.files import load_study
from simclr_ray.studies.folder import Curve, OutcomeStatus, StudyFolder, TrialOutcome, curve_of
from simclr_ray.studies.plan import Point, base_tree, make_trials, points_of
from simclr_ray.studies.report import markdown, others_table, page
from simclr_ray.studies.space import Dimension
from simclr_ray.studies.status import status_of

VALUES = {(64, 3): 0.30, (256, 3): 0.34, (1024, 3): 0.33, (64, 6): 0.40, (256, 6): 0.42,
          (1024, 6): 0.43, (64, 12): 0.50, (256, 12): 0.51, (1024, 12): 0.52}  # fmt: skip


@pytest.fixture(scope="module")
def study() -> Study:
    return load_study("batch_size", "cpu")


def outcomes_of(study: Study) -> list[TrialOutcome]:
    outcomes = []
    for trial in make_trials(study, base_tree(study), points_of(study)):
        batch, epochs = int(trial.point["batch_size"]), int(trial.point["epochs"])
        value = VALUES[batch, epochs] + 0.01 * trial.seed
        outcomes.append(outcome(trial.name, value, dict(trial.point), trial.seed))
    return outcomes


def outcome(name: str, value: float, point: Point, seed: int = 0) -> TrialOutcome:
    curve: Curve = {1: {"eval/knn_top1": value / 2}}
    cost = {"images": 100.0, "seconds": 36.0, "device_seconds": 72.0}
    cells = [{"point": point, "epoch": 0}]
    run = {"folder": f"/x/{name}"}
    return TrialOutcome(
        name, "finished", "", cells, seed, {"final/linear_top1": value}, curve, cost, run
    )


@pytest.fixture(scope="module")
def results(study: Study) -> Results:
    return results_of(study, outcomes_of(study))


def test_points_are_means_and_deviations_over_seeds(results: Results) -> None:
    assert len(results.rows) == 9
    for row in results.rows:
        expected = VALUES[int(row.point["batch_size"]), int(row.point["epochs"])]
        assert row.mean == pytest.approx(expected + 0.005, abs=1e-12)
        assert row.deviation == pytest.approx(0.01 / math.sqrt(2), abs=1e-12)
        assert row.num_seeds == 2
    assert results.device_hours == pytest.approx(18 * 0.02)
    assert results.best is not None
    assert results.best.point == {"batch_size": 1024, "epochs": 12}


def test_the_best_trial_is_the_best_seed_of_the_best_point(study: Study, results: Results) -> None:
    chosen = best_outcome(results, outcomes_of(study))
    assert (chosen.seed, chosen.cells[0]["point"]) == (1, {"batch_size": 1024, "epochs": 12})


def test_the_order_is_compared_with_the_settings_that_ours_stand_for(results: Results) -> None:
    like = {64: 256, 256: 1024, 1024: 4096}
    table = {(b, e): v for b, e, v in results.study.paper.rows}
    lengths = {3: 100, 6: 200, 12: 400}
    paper = [table[like[b], lengths[e]] for b, e in VALUES]
    expected = kendalltau(list(VALUES.values()), paper)
    assert results.agreement is not None
    assert results.agreement.tau == pytest.approx(expected.statistic)
    assert results.agreement.num_points == 9


def test_claims_are_tested_on_pairs_that_differ_in_nothing_else(results: Results) -> None:
    shortest, longest = results.verdicts
    assert shortest.difference == pytest.approx(0.03, abs=1e-12)
    assert longest.difference == pytest.approx(0.02, abs=1e-12)
    assert (shortest.wins, shortest.num_pairs) == (2, 2)
    assert (shortest.p, shortest.smallest_p) == (0.5, 0.5)
    assert "too few pairs" in sign_text(shortest)


def enumerated_p(differences: list[float]) -> float:
    """Return the two-sided p over all ways to flip signs, written out."""
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    return float((np.abs(signs @ differences) >= abs(sum(differences)) - 1e-12).mean())


@pytest.mark.parametrize("num", [1, 2, 3, 6, 9, 16])
def test_p_of_few_pairs_is_that_of_all_ways_to_flip_signs(num: int) -> None:
    differences = np.random.default_rng(num).normal(0.3, 1, num).tolist()
    assert sign_flip_p(differences) == pytest.approx(enumerated_p(differences), abs=1e-12)


@pytest.mark.parametrize(
    "differences",
    [[0.1] * 5, [0.1, 0.2, 0.3], [0.1, -0.2, 0.3, 0.7, -0.1], [0.0] * 4, [0.1, -0.1], [-0.3] * 6],
    ids=str,
)
def test_sums_that_are_equal_but_for_rounding_count_as_equal(differences: list[float]) -> None:
    assert sign_flip_p(differences) == pytest.approx(enumerated_p(differences), abs=1e-12)


def test_p_of_many_pairs_is_sampled_with_a_seed_and_close_to_all_ways() -> None:
    differences = np.random.default_rng(0).normal(0.5, 1, 17).tolist()
    assert sign_flip_p(differences) == pytest.approx(enumerated_p(differences), abs=0.005)
    assert sign_flip_p(differences) == sign_flip_p(differences)


def test_trials_without_a_value_are_listed_and_left_out(study: Study) -> None:
    good, *rest = outcomes_of(study)
    bad = rest[0]._replace(status="collapsed", reason="collapsed: rank 1.0")
    found = results_of(study, [good, bad])
    assert [row.point for row in found.rows] == [good.cells[0]["point"]]
    assert found.others == [bad]
    assert "collapsed: rank 1.0" in page(found, ["<svg></svg>"], {})
    assert "not run yet" in page(found, ["<svg></svg>"], {})


def test_the_page_needs_nothing_else_and_escapes_what_users_wrote(results: Results) -> None:
    study = results.study.model_copy(update={"question": "a < b & c?"})
    text = page(results._replace(study=study), ["<?xml?><svg>drawn</svg>"], {"command": "run <x>"})
    assert "a &lt; b &amp; c?" in text
    assert "run &lt;x&gt;" in text
    assert "<svg>drawn</svg>" in text
    assert not any(word in text for word in ("src=", "<script", "@import", "url("))
    # what a reader may follow leads to the runs beside the report; nothing is loaded
    assert set(re.findall(r'<(\w+) href="(?!\.\./runs/)', text)) == set()


def test_figures_are_the_same_file_for_the_same_numbers(results: Results, tmp_path: Path) -> None:
    for place in ("a.svg", "b.svg"):
        draw_study(results, tmp_path / place)
    first = (tmp_path / "a.svg").read_text()
    assert first == (tmp_path / "b.svg").read_text()
    for label in ("64", "256", "1024", "batch size (images)", "paper: Table B.1"):
        assert label in first
    draw_study(results, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["projection_head", "composition", "encoder_size", "crop_scale"])
def test_every_kind_of_figure_is_drawn(name: str, tmp_path: Path) -> None:
    study = load_study(name, "cpu")
    points = points_of(study)
    outcomes = [outcome(str(i), 0.1 + 0.01 * i, point) for i, point in enumerate(points)]
    if study.metric != "final/linear_top1":
        outcomes = [
            o._replace(metrics={study.metric: o.metrics["final/linear_top1"]}) for o in outcomes
        ]
    found = results_of(study, outcomes)
    draw_study(found, tmp_path / "f.svg")
    assert (tmp_path / "f.svg").stat().st_size > 1000
    assert markdown(found).count("\n|") >= len(points)


def test_a_study_without_results_has_a_report_too(study: Study, tmp_path: Path) -> None:
    found = results_of(study, [])
    draw_study(found, tmp_path / "f.svg")
    assert found.best is None
    assert json.loads(as_json(found))["rows"] == []
    assert study.question in page(found, [(tmp_path / "f.svg").read_text()], {})


def test_a_curve_takes_what_was_repeated_last_and_the_training_record_before() -> None:
    records = [
        {"step": 5, "epoch": 0.5, "train/mean_loss": 4.0},
        {"step": 10, "epoch": 1.0, "train/mean_loss": 3.0},
        {"step": 10, "epoch": 1, "eval/knn_top1": 0.1},
        {"step": 15, "epoch": 1.5, "train/mean_loss": 2.0},
        {"step": 20, "epoch": 2.0, "train/mean_loss": 1.0},
        {"step": 10, "epoch": 1, "eval/knn_top1": 0.2},
        {"step": 20, "epoch": 2.0, "train/mean_loss": 0.9},
        {"step": 20, "epoch": 2, "eval/knn_top1": 0.3},
    ]
    text = "\n".join(map(json.dumps, records)) + '\n{"step": 3'
    assert curve_of(text)[2] == {"train/mean_loss": 0.9, "eval/knn_top1": 0.3}
    assert list(curve_of(text, last_epoch=1)) == [1]


def test_a_run_that_stands_for_many_points_is_one_observation() -> None:
    study = load_study("projection_head", "imagenet")
    heads = {"none": 0.1, "linear": 0.2, "nonlinear": 0.3}
    dims = study.space["head.dim"].listed
    outcomes = [
        outcome(f"{head}-{dim}", value + 0.001 * i, {"head": head, "head.dim": dim})
        for head, value in heads.items()
        for i, dim in enumerate(dims)
        if head != "none"
    ]
    none = outcome("none", 0.1, {})
    cells = [{"point": {"head": "none", "head.dim": dim}, "epoch": 0} for dim in dims]
    found = results_of(study, [*outcomes, none._replace(cells=cells)])
    nonlinear, linear = found.verdicts
    assert (nonlinear.num_pairs, linear.num_pairs) == (7, 1)
    assert linear.difference == pytest.approx(0.1 + 0.003)
    assert linear.smallest_p == 1.0


def shared_run(status: OutcomeStatus = "finished", epochs: int = 4) -> TrialOutcome:
    curve: Curve = {e: {"eval/knn_top1": 0.1 * e} for e in range(1, epochs + 1)}
    cells = [{"point": {"epochs": e}, "epoch": e} for e in (1, 2, 4)]
    return outcome("t", 0.0, {})._replace(status=status, curve=curve, cells=cells)


def shared_run_study() -> Study:
    study = load_study("long_training", "cpu")
    space = {"epochs": Dimension(grid=[1, 2, 4])}
    return study.model_copy(update={"space": space, "comparisons": []})


def test_a_length_read_off_a_longer_run_costs_its_share() -> None:
    found = results_of(shared_run_study(), [shared_run()])
    assert [row.mean for row in found.rows] == pytest.approx([0.1, 0.2, 0.4])
    assert [row.images for row in found.rows] == pytest.approx([25, 50, 100])
    assert found.images == 100


def test_a_shared_run_that_collapsed_keeps_the_lengths_before() -> None:
    found = results_of(shared_run_study(), [shared_run("collapsed", epochs=3)])
    assert [row.point["epochs"] for row in found.rows] == [1, 2]


def test_a_shared_run_that_diverged_within_an_epoch_keeps_all_lengths_at_what_they_cost() -> None:
    diverged = shared_run("collapsed", epochs=2)
    cost = {"images": 90.0, "seconds": 9.0, "device_seconds": 9.0, "epochs": 3.0}
    found = results_of(shared_run_study(), [diverged._replace(cost=cost, last_good=2)])
    assert [row.point["epochs"] for row in found.rows] == [1, 2]
    assert [row.images for row in found.rows] == pytest.approx([30, 60])


def test_epochs_of_a_trial_that_ended_early_are_the_same_wherever_they_are_told(
    tmp_path: Path,
) -> None:
    """Its curve ends at the last evaluation, or before the one that it had collapsed at."""
    study, cost = shared_run_study(), {"images": 75.0, "seconds": 9.0, "device_seconds": 9.0}
    diverged = shared_run("collapsed", epochs=2)._replace(
        reason="not finite", cost=cost | {"epochs": 2.5}
    )
    found = results_of(study, [diverged, shared_run()._replace(trial="u")])
    tree = json.loads(as_json(found))
    assert (tree["not_finished"][0]["epochs"], tree["epochs"]) == (2.5, 6.5)
    assert "In all 2 trials, 6.5 epochs, " in markdown(found)
    assert "- t: collapsed after 2.5 epochs: not finite\n" in markdown(found)
    assert [row[2] for row in others_table(found).rows] == ["2.5"]
    folder = StudyFolder(str(tmp_path), "s")
    folder.write_outcome(diverged)
    (status,) = status_of(study, folder, []).trials
    assert (status.epoch, status.epochs) == (2.5, 3)


def test_values_are_compared_as_numbers_however_they_are_written() -> None:
    study = load_study("encoder_size", "cpu")
    like = {"encoder.width": {"0.125": 1, "0.25": 2}, "encoder.depth": {"10": 18.0, "18": 34}}
    study = study.model_copy(update={"paper": study.paper.model_copy(update={"matches": like})})
    point: Point = {"learning": "self-supervised", "encoder.depth": 10, "encoder.width": 0.125}
    assert paper_value(study, point) == 50.4


def test_what_is_not_drawn_is_averaged(tmp_path: Path) -> None:
    study = load_study("cifar10_grid", "cifar10")
    rates = {0.5: 0.4, 1.0: 0.5, 1.5: 0.9}
    outcomes = [
        outcome(str(i), rates[float(point["schedule.learning_rate"])], point)
        for i, point in enumerate(points_of(study))
    ]
    data = _measured(results_of(study, outcomes), 100)
    assert len(data) == 5 * 3 * 2
    assert {round(d.value, 9) for d in data} == {60.0}
    paper = _paper(study)
    assert {d.panel for d in paper} == {"300", "1000"}
    assert len({(d.panel, d.series, d.x) for d in paper}) == len(paper)


def test_what_a_study_says_of_itself_is_escaped_on_the_page(results: Results) -> None:
    title = '<b>&"'
    study = results.study.model_copy(
        update={"name": title, "question": title, "notes": title, "answers": title, "scale": title}
    )
    verdicts = [results.verdicts[0]._replace(claim=title)]
    text = page(
        results._replace(study=study, verdicts=verdicts), ["<svg>drawn</svg>"], {"command": title}
    )
    assert "<b>" not in text
    assert "<title>&lt;b&gt;&amp;&#34;</title>" in text
    assert text.count("&lt;b&gt;&amp;") >= 7  # title, heading, question, ..., claim, command


def test_the_page_needs_nothing_from_elsewhere(results: Results, tmp_path: Path) -> None:
    draw_study(results, tmp_path / "f.svg")
    text = page(results, [(tmp_path / "f.svg").read_text()], {"command": "run"})
    assert not re.search(r"<(script|link|img|iframe|object|embed)\b|@import", text)
    shown = re.sub(r'<a href="\.\./runs/[^"]*"', "<a", text)  # followed by readers, not loaded
    loaded = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'>)\s]*)""", shown)
    assert [where for where in loaded if not where.startswith("#")] == []  # within the drawing
