"""Curves and baselines: what is drawn is the mean of all seeds and what it is held against."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import ConfigError
from simclr_ray.studies.analysis import results_of
from simclr_ray.studies.definition import Study
from simclr_ray.studies.figures import draw_curves, draw_study
from simclr_ray.studies.files import load_study
from simclr_ray.studies.folder import StudyFolder, TrialOutcome
from simclr_ray.studies.plan import base_tree, points_of
from simclr_ray.studies.report import baselines_table, markdown, page, points_table, write_report
from simclr_ray.studies.settings import digest_of_study, settings_of

BASELINES = {
    "raw pixels": {"final/linear_top1": 0.37, "eval/knn_top1": 0.35},
    "untrained encoder": {"eval/knn_top1": 0.3},
}


@pytest.fixture(scope="module")
def study() -> Study:
    return load_study("temperature", "cpu").model_copy(update={"seeds": [0, 1, 2]})


def outcomes_of(study: Study, epochs: int = 6) -> list[TrialOutcome]:
    outcomes = []
    for i, point in enumerate(points_of(study)):
        for seed in study.seeds:
            curve = {e: {"eval/knn_top1": 0.3 + 0.01 * e * i + 0.02 * seed} for e in range(epochs)}
            cost = {"images": 1.0, "seconds": 1.0, "device_seconds": 1.0}
            run = {"folder": f"/x/t/runs/{i}-{seed}"} if seed else {"mlflow_run_id": f"id{i}"}
            cells = [{"point": point, "epoch": 0}]
            metrics = {"final/linear_top1": 0.4}
            outcomes.append(TrialOutcome(
                f"{i}-{seed}", "finished", "", cells, seed, metrics, curve, cost, run
            ))  # fmt: skip
    return outcomes


def test_a_curve_is_mean_and_deviation_of_the_seeds_of_a_point(study: Study) -> None:
    results = results_of(study, outcomes_of(study))
    assert results.curve_metric == "eval/knn_top1"
    assert [c.point for c in results.curves] == points_of(study)
    for i, curve in enumerate(results.curves):
        assert curve.num_seeds == 3
        assert curve.epochs == list(range(6))
        assert curve.means == pytest.approx([0.32 + 0.01 * e * i for e in range(6)])
        assert curve.deviations == pytest.approx([0.02] * 6)


def test_a_curve_ends_where_the_first_of_its_seeds_does(study: Study) -> None:
    first, *rest = outcomes_of(study)
    short = first._replace(curve={e: v for e, v in first.curve.items() if e < 3})
    curves = results_of(study, [short, *rest]).curves
    assert [len(curve.epochs) for curve in curves] == [3] + [6] * (len(curves) - 1)


def test_a_study_of_a_metric_of_epochs_has_the_curves_of_that(study: Study) -> None:
    by_loss = study.model_copy(update={"metric": "train/mean_loss", "mode": "min"})
    assert results_of(by_loss, outcomes_of(study)).curves == []
    outcomes = [
        o._replace(curve={1: {"train/mean_loss": float(o.seed)}}) for o in outcomes_of(study)
    ]
    assert {c.means[0] for c in results_of(by_loss, outcomes).curves} == {1.0}


def test_curves_and_baselines_are_drawn_and_the_same_for_the_same_numbers(
    study: Study, tmp_path: Path
) -> None:
    results = results_of(study, outcomes_of(study), BASELINES)
    for place in ("a.svg", "b.svg"):
        draw_curves(results, tmp_path / place)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    for words in ("raw pixels", "untrained encoder", "epoch", "eval/knn_top1 (%)"):
        assert words in text
    draw_study(results, tmp_path / "f.svg")
    drawn = (tmp_path / "f.svg").read_text()
    assert "raw pixels" in drawn
    assert "untrained encoder" not in drawn  # it has another metric than the figure
    draw_curves(results, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_baselines_stand_in_table_and_text(study: Study) -> None:
    results = results_of(study, outcomes_of(study), BASELINES)
    table = baselines_table(results)
    assert "final/linear_top1 (%)" in table.head
    assert ["raw pixels", "37.0"] in [row[:2] for row in table.rows]
    assert "raw pixels, a baseline: final/linear_top1 (%) 37.0" in markdown(results)
    assert "Baselines" not in page(results_of(study, outcomes_of(study)), ["<svg></svg>"], {})
    assert "<h2>Baselines</h2>" in page(results, ["<svg></svg>"], {})


def test_every_point_leads_to_the_run_of_each_seed(study: Study) -> None:
    results = results_of(study, outcomes_of(study))
    cells = points_table(results).rows[0][-1]
    assert not isinstance(cells, str)
    assert [link.target for link in cells] == ["", "../runs/0-1", "../runs/0-2"]
    text = page(results, ["<svg></svg>"], {})
    assert '<a href="../runs/0-1" title="runs/0-1">1</a>' in text
    assert '<span title="id0">0</span>' in text
    num = len(points_of(study))
    assert len(re.findall(r"<a href", text)) == 2 * num


def test_baselines_are_read_from_the_folder_of_the_study(tmp_path: Path) -> None:
    folder = StudyFolder(str(tmp_path), "s")
    assert folder.baselines() == {}
    (tmp_path / "s").mkdir()
    file = tmp_path / "s" / "baselines.json"
    file.write_text('{"raw pixels": {"final/linear_top1": 0.37, "eval/knn_top1": 1}}')
    assert folder.baselines() == {"raw pixels": {"final/linear_top1": 0.37, "eval/knn_top1": 1.0}}
    for wrong in ('{"raw pixels": 0.37}', '{"raw pixels": {"final/linear_top1": "37 %"}}'):
        file.write_text(wrong)
        with pytest.raises(ConfigError, match="'raw pixels' must have metrics and numbers"):
            folder.baselines()


def test_curves_of_one_seed_have_no_band(study: Study, tmp_path: Path) -> None:
    one = results_of(study, [o for o in outcomes_of(study) if o.seed == 0])
    assert {d for curve in one.curves for d in curve.deviations} == {0.0}
    draw_curves(one, tmp_path / "one.svg")
    assert (tmp_path / "one.svg").stat().st_size > 1000


def test_a_report_is_written_whole_from_a_folder(study: Study, tmp_path: Path) -> None:
    base = cfg.validate(Experiment, base_tree(study))
    folder = StudyFolder(str(tmp_path), study.name)
    folder.write_definition(study, base, digest_of_study(study, base))
    folder.update_state(command="simclr-ray study run temperature")
    for outcome in outcomes_of(study):
        run = {"folder": f"{folder.uri}/runs/{outcome.trial}-0123abcd"}
        folder.write_outcome(outcome._replace(run=run))
    (tmp_path / study.name / "baselines.json").write_text(json.dumps(BASELINES))
    place, results = write_report(folder)
    kept = {path.name for path in Path(place).iterdir()}
    drawn = {
        f"{name}.{ending}" for name in ("figure", "curves") for ending in ("png", "svg", "pdf")
    }
    assert kept == drawn | {"report.html", "results.md", "results.json", "results.csv"}
    with (Path(place) / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(outcomes_of(study))
    (x,) = study.space
    by_seed = {
        (str(row.point[x]), seed): value
        for row in results.rows
        for seed, value in row.value_by_seed.items()
    }
    assert {(row[x], int(row["seed"])): float(row[study.metric]) for row in rows} == by_seed
    text = (Path(place) / "report.html").read_text()
    assert text.count("<svg") == 2
    (target,) = set(re.findall(r'href="([^"]*0-1-0123abcd)"', text))
    assert (Path(place) / target).resolve() == tmp_path / study.name / "runs" / "0-1-0123abcd"
    tree = json.loads((Path(place) / "results.json").read_text(), parse_constant=pytest.fail)
    assert tree["baselines"] == BASELINES
    assert tree["command"] == "simclr-ray study run temperature"
    assert tree["settings"] == settings_of(study, base)
    assert len(tree["claims"]) == len(results.verdicts) == len(study.comparisons)
    assert len(tree["curves"][0]["means"]) == 6
