"""A run's page says what its folder says, and leaves out what there is not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest

from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import ConfigError
from simclr_ray.evaluation.classification import Classification
from simclr_ray.evaluation.neighbours import NeighbourSample, sample_neighbours
from simclr_ray.evaluation.scores import Score
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.train.run_report import _interval, class_table, cost, score_table, write_report
from tests.formats.test_formats import HERE as FORMATS
from tests.ray.images import write_splits
from tests.unit.cli.in_turn import run_in_turn
from tests.unit.inference.test_embedding_pages import images_in

SCORES = [
    {"name": name, "knn_top1": knn, "linear_top1": linear, "uniformity": -1.0,
     "effective_rank": 5.0, "feature_std": 0.1}
    for name, knn, linear in (
        ("trained encoder", 0.5, 0.6), ("untrained encoder", 0.2, 0.3), ("raw pixels", 0.3, 0.25)
    )
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Give the folder of a run whose images are there."""
    write_splits(tmp_path, 120)
    run = tmp_path / "runs" / "small"
    shutil.copytree(FORMATS / "format_3", run)
    text = (run / "experiment.yaml").read_text()
    text = text.replace("/somewhere/train.parquet", str(tmp_path / "train.parquet"))
    text = text.replace("  test: ''", f"  test: {tmp_path / 'test.parquet'}", 1)
    (run / "experiment.yaml").write_text(text)
    return run


def text_of(page: str) -> str:
    """Return the text of a page, drawings aside."""
    page = re.sub(r"(?s)<style>.*?</style>|<svg.*?</svg>", " ", page)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_a_page_has_scores_curves_neighbours_classes_views_and_what_happened(run: Path) -> None:
    (run / "scores.json").write_text(json.dumps(SCORES))
    rollbacks = {"halved_at": [4], "history": [{"failed_after": 6}]}
    (run / "rollbacks.json").write_text(json.dumps(rollbacks))
    (run / "bad_rows.jsonl").write_text('{"id": 7, "reason": "not an image"}\n')
    (run / "error.json").write_text(
        json.dumps({"time": 1.0, "type": "RunError", "message": "<lost>", "node": "here"})
    )
    where = write_report(RunFolder.at(str(run)), images=40)
    assert where == f"{run}/report.html"
    page = (run / "report.html").read_text()
    said = text_of(page)
    low, high = binomtest(30, 60).proportion_ci(method="wilson")
    assert f"trained encoder 50.0 % [{100 * low:.1f}, {100 * high:.1f}]" in said
    assert said.index("trained encoder") < said.index("untrained encoder") < said.index("raw pix")
    assert "chance, ln(2N-1)" in page
    assert page.count("<svg") >= 5
    assert "40 test images, neighbours from 120" in said
    assert said.count(" query ") == 8
    assert "Went back to a checkpoint 1 time by itself, and on at 0.5 times the rate" in said
    assert "Replaced 1 row that could not be decoded: 1 x not an image." in said
    assert "RunError: &lt;lost&gt;" in said
    assert f"simclr-ray pretrain {run}/experiment.yaml" in said
    assert len(images_in(page)) == 8 * 9 + 1


def test_what_is_not_there_is_left_out(run: Path) -> None:
    shutil.rmtree(next(run.glob("step-*")))
    for file in run.parent.parent.glob("*.parquet"):
        file.unlink()
    page = Path(write_report(RunFolder.at(str(run)), str(run.parent / "a.html"))).read_text()
    said = text_of(page)
    assert "There are no scores" in said
    for heading in ("Events", "Nearest neighbours", "Classes, the worst first", "Views"):
        assert heading not in said
    (run / "metrics.jsonl").unlink()
    page = Path(write_report(RunFolder.at(str(run)), str(run.parent / "a.html"))).read_text()
    assert "Curves" not in text_of(page)
    assert "Cost" not in text_of(page)


def test_the_command_writes_it_and_names_what_is_no_run(run: Path) -> None:
    done, none, ending = run_in_turn(
        ["run", "report", "runs/small", "--out", "page.html", "--num", "0"],
        ["run", "report", "runs"],
        ["run", "report", "runs/small", "--out", "page.pdf"],
        cwd=run.parent.parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "page.html\n"
    assert "Nearest neighbours" not in (run.parent.parent / "page.html").read_text()
    assert none.returncode == ending.returncode == 2
    assert "is no run folder" in none.stderr
    assert "--out: got page.pdf; it must end in .html" in ending.stderr


def test_an_interval_is_wilson_s_by_hand() -> None:
    assert _interval(0.0, 10) == " [0.0, 27.8]"  # z² / (n + z²)
    assert _interval(0.3, 10) == " [10.8, 60.3]"
    assert _interval(1.0, 10) == " [72.2, 100.0]"
    assert _interval(0.5, 0) == ""


def test_without_the_number_of_test_images_there_is_no_interval() -> None:
    scores = [Score.from_tree(row) for row in SCORES]
    assert score_table(scores, 0).rows[0][1] == "50.0 %"
    assert score_table(scores, 100).rows[0][1] == "50.0 % [40.4, 59.6]"


def test_an_interval_stands_by_its_own_accuracy_where_a_usual_protocol_was_left_out() -> None:
    rows = [{**row, "knn_top1": None, "own_top1": 0.1, "knn_k20_top1": 0.5} for row in SCORES]
    made = score_table([Score.from_tree(row) for row in rows], 100)
    assert made.rows[0] == [
        "trained encoder", "-", "60.0 % [50.2, 69.1]", "50.0 % [40.4, 59.6]", "10.0 % [5.5, 17.4]"
    ]  # fmt: skip


def test_images_that_could_not_be_scored_do_not_narrow_the_interval(run: Path) -> None:
    scored = [{**row, "num_images": 40} for row in SCORES[:1]]
    (run / "scores.json").write_text(json.dumps([*scored, *SCORES[1:]]))
    said = text_of(Path(write_report(RunFolder.at(str(run)), images=0)).read_text())
    low, high = binomtest(20, 40).proportion_ci(method="wilson")
    assert f"trained encoder 50.0 % [{100 * low:.1f}, {100 * high:.1f}]" in said


@pytest.mark.parametrize("num", [40, 0])
def test_the_page_of_a_fine_tuning_has_the_scores_of_its_classifier(run: Path, num: int) -> None:
    scores = Classification(0.5, 0.75, 0.4, 0.3, num)
    (run / "classification.json").write_text(json.dumps(scores._asdict()))
    said = text_of(Path(write_report(RunFolder.at(str(run)), images=0)).read_text())
    assert "There are no scores" not in said
    of = num or 60  # all with a label, where an earlier release did not count
    shown = []
    for hits in (0.5, 0.75):
        low, high = binomtest(int(hits * of), of).proportion_ci(method="wilson")
        shown.append(f"{100 * hits:.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
    assert f"top-1 top-5 mean per class 11-point mAP {' '.join(shown)} 40.0 % 30.0 %" in said


def test_classes_stand_with_what_they_are_taken_for_the_worst_first() -> None:
    confusion = np.array([[8, 2, 0], [5, 1, 4], [0, 0, 0]])
    table = class_table(NeighbourSample([], confusion, ["cat", "dog", "fox"], 20, 80))
    assert table.rows == [
        ["dog", "10", "10 %", "cat 50 %, fox 40 %"],
        ["cat", "10", "80 %", "dog 20 %"],
    ]


def test_cost_counts_the_time_between_starts_as_nothing() -> None:
    def record(at: float, step: int, **more: Any) -> dict[str, Any]:
        return {"time": at, "step": step, **more}

    records = [
        record(100, 0, **{"start/first_batch_s": 1.0}),
        record(160, 10, **{"train/loss": 3.0, "train/images_per_s": 50.0}),
        record(5000, 10, **{"start/first_batch_s": 1.0}),
        record(5120, 20, **{"train/loss": 2.0, "train/images_per_s": 70.0}),
    ]
    experiment = Experiment.load("cifar10_study_cpu", "batch_size=64", "data.train=x")
    rows = cost(records, experiment)
    assert rows["training"] == "3:00"
    # two starts that were killed before they trained, a day before
    scores = {"start/feature_std": 0.1, "start/weight_norm": 9.0}
    before = [record(at, 0, **scores) for at in (-90_000, -80_000)]
    whole = [*before, record(90, 0, **scores), *records]
    assert cost(whole, experiment)["training"] == "3:10"
    assert rows["images seen"] == "1,280"
    assert cost([], experiment) == {}


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run folder"):
        write_report(RunFolder.at(str(tmp_path)))


def test_where_the_test_images_alone_have_labels_half_of_them_are_scored(run: Path) -> None:
    (run / "scores.json").write_text(json.dumps(SCORES))
    train = run.parent.parent / "train.parquet"
    pq.write_table(pq.read_table(train).drop_columns(["label"]), train)
    said = text_of(Path(write_report(RunFolder.at(str(run)), images=40)).read_text())
    low, high = binomtest(15, 30).proportion_ci(method="wilson")
    assert f"trained encoder 50.0 % [{100 * low:.1f}, {100 * high:.1f}]" in said
    assert "Nearest neighbours" in said
    assert "Classes, the worst first" not in said


def test_test_images_of_classes_that_the_bank_lacks_are_left_out_and_counted(run: Path) -> None:
    train = run.parent.parent / "train.parquet"
    table = pq.read_table(train)
    pq.write_table(table.filter(pc.less(table["label"], 3)), train)
    labels = pq.read_table(run.parent.parent / "test.parquet")["label"].to_numpy()
    page = Path(write_report(RunFolder.at(str(run)), images=100)).read_text()
    assert f"{(labels >= 3).sum():,} of classes without one among those are left out" in page
    table = page.split("Classes, the worst first")[1].split("<h2>")[0]
    assert table.count("<tr>") == 1 + len(set(labels[labels < 3]))  # those of the bank alone


def test_among_its_own_images_a_copy_is_a_neighbour_and_the_image_itself_is_none(run: Path) -> None:
    train = run.parent.parent / "train.parquet"
    table = pq.read_table(train)
    twins = table.take([row // 2 for row in range(len(table))])
    twins = twins.set_column(twins.column_names.index("id"), "id", table["id"])
    pq.write_table(twins.drop_columns(["label"]), train)  # names are ids then
    config = Experiment.load(str(run / "experiment.yaml"), "data.test=", "data.eval_train=")
    checkpoint = max(run.glob("step-*"))
    sample = sample_neighbours(config, checkpoint, 100)
    for query, first, *others in sample.rows:
        assert np.array_equal(first.pixels, query.pixels)
        assert first.name != query.name
        assert first.cosine == pytest.approx(1.0, abs=1e-5)
        assert not any(np.array_equal(other.pixels, query.pixels) for other in others)
