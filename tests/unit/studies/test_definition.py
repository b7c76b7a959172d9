"""A study is checked whole before anything starts, and says what is wrong where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import ConfigError, DataError
from simclr_ray.studies.definition import Study
from simclr_ray.studies.files import load_study
from simclr_ray.studies.plan import (
    base_tree,
    forecast,
    make_trials,
    note_on_lengths,
    points_of,
    study_folder,
)
from simclr_ray.studies.settings import digest_of_study
from tests.ray.images import write_shapes

BASE = """
name: t
data: {train: train, test: test}
augment: {name: simclr, size: 16, blur: 0.0}
encoder: {name: resnet, depth: 10, width: 0.125, stem: strided}
batch_size: 16
epochs: 2
"""


def tree_of(folder: Path, **changes: Any) -> dict[str, Any]:
    (folder / "base.yaml").write_text(BASE)
    return {
        "name": "s",
        "question": "?",
        "answers": "Figure 0",
        "base": str(folder / "base.yaml"),
        "space": {"batch_size": {"grid": [8, 16]}, "epochs": {"grid": [1, 2, 4]}},
        "figure": {"x": "batch_size"},
        "paper": {"source": "-", "metric": "-", "columns": [], "rows": []},
        **changes,
    }


def written(folder: Path, **changes: Any) -> str:
    path = folder / "study.yaml"
    path.write_text(cfg.dump_yaml(tree_of(folder, **changes)))
    return str(path)


@pytest.mark.parametrize(("text", "kind"), [("- 1\n", "a list"), ("", "nothing"), ("a", "a str")])
def test_a_base_of_no_keys_is_refused_in_one_line(tmp_path: Path, text: str, kind: str) -> None:
    study = load_study(written(tmp_path))
    (tmp_path / "base.yaml").write_text(text)
    for use in (base_tree, study_folder):
        with pytest.raises(ConfigError) as raised:
            use(study)
        assert str(raised.value) == f"{tmp_path}/base.yaml: holds {kind}, not keys and values"


def trials_of(source: str, *overrides: str) -> list[Any]:
    study = load_study(source, "", *overrides)
    return make_trials(study, base_tree(study), points_of(study))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"space": {}}, "space is empty"),
        ({"space": {"batch_size": {"grid": []}}}, "is empty: there is nothing to run"),
        ({"space": {"batch_size": {}}}, "needs one of: grid"),
        ({"space": {"batch_size": {"grid": [8, 8]}}}, "names a value twice"),
        ({"space": {"batch_size": {"uniform": [2.0, 1.0]}}}, "low below high"),
        ({"space": {"batch_size": {"loguniform": [0.0, 1.0]}}}, "above 0"),
        ({"space": {"batch_size": {"choice": [8]}}}, "search.name=random"),
        ({"metric": "final/linear_top2"}, "did you mean 'final/linear_top1'?"),
        ({"metric": "final/logistic_regression_top1"}, "nobody reports"),
        ({"scheduler": {"name": "pbt"}}, "pbt is refused"),
        ({"scheduler": {"name": "asha"}}, "metric must be one of"),
        ({"search": {"name": "random"}}, "needs search.trials above 0"),
        ({"figure": {"x": "batch"}}, "did you mean 'batch_size'?"),
        ({"seeds": [1, 1]}, "names one twice"),
        ({"protocols": ["knn", "a.b:knn"]}, "knn and a.b:knn are both called knn_top1"),
        (
            {"comparisons": [{"claim": "c", "better": {"epochs": 3}, "worse": {"epochs": 1}}]},
            "is not run",
        ),
        ({"questions": "?"}, "unknown key"),
        (
            {"comparisons": [{"claim": "c", "better": {"epochs": 1}, "worse": {"batch_size": 8}}]},
            "both sides must name the same dimensions",
        ),
        (
            {
                "space": {"c": {"cases": {"a": {}, "b": {"epochs": 3}}}},
                "figure": {"x": "c", "x_scale": "log2"},
                "paper": {"source": "-", "metric": "-", "columns": [], "rows": []},
            },
            "needs numbers along x",
        ),
        (
            {"paper": {"source": "-", "metric": "-", "columns": ["loss"], "rows": [["a", 1.0]]}},
            "'loss' does not vary",
        ),
        ({"search": {"name": "optuna", "trials": 3}}, "needs a range"),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_study(written(tmp_path, **changes))
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"space": {"batchsize": {"grid": [8]}}, "figure": {"x": "batchsize"}}, "batch_size"),
        ({"space": {"batch_size": {"grid": [1, 8]}}}, "got 1"),
        ({"set": {"loss.temperatures": 1.0}}, "temperature"),
        (
            {"space": {"seed": {"grid": [1, 2]}}, "figure": {"x": "seed"}},
            "but by `seeds`",
        ),
        ({"metric": "eval/knn_top1", "set": {"evaluation.every_epochs": 0}}, "every_epochs is 0"),
        ({"metric": "final/classifier/top1"}, "is a classifier's"),
        ({"budget": {"trials": 3}}, "6 trials are wanted"),
        (
            {"space": {"c": {"cases": {"a": {"seed": 3}, "b": {}}}}, "figure": {"x": "c"}},
            "but by `seeds`",
        ),
        (
            {"space": {"storage": {"grid": ["a", "b"]}}, "figure": {"x": "storage"}},
            "storage: cannot vary",
        ),
        (
            {
                "metric": "eval/knn_top1",
                "scheduler": {"name": "asha", "grace_epochs": 9},
            },
            "scheduler.grace_epochs: must be at most 4",
        ),
    ],
)
def test_a_trial_that_cannot_be_is_named_before_any_runs(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        trials_of(written(tmp_path, **changes))
    assert says in str(raised.value)


def test_an_issue_of_many_trials_is_said_once(tmp_path: Path) -> None:
    space = {"batch_size": {"grid": [1, 8]}, "epochs": {"grid": [1, 2, 4]}}
    with pytest.raises(ConfigError) as raised:
        trials_of(written(tmp_path, space=space))
    assert len(raised.value.issues) == 1


def test_an_issue_at_a_scale_that_was_not_asked_for_is_found(tmp_path: Path) -> None:
    source = written(tmp_path, scales={"cpu": {}, "imagenet": {"seedz": [1]}})
    with pytest.raises(ConfigError, match="seedz"):
        load_study(source, "cpu")
    with pytest.raises(ConfigError, match="did you mean 'cpu'"):
        load_study(written(tmp_path, scales={"cpu": {}}), "cpus")


def test_overrides_go_to_the_trials_or_to_the_study(tmp_path: Path) -> None:
    trials = trials_of(written(tmp_path), "loss.temperature=0.7", "study.seeds=[3, 4]")
    assert {t.experiment.loss.temperature for t in trials} == {0.7}
    assert [t.seed for t in trials] == [3] * 6 + [4] * 6


def test_the_name_of_a_scheduler_leaves_its_other_settings_as_they_are(tmp_path: Path) -> None:
    settings = {"scheduler": {"name": "none", "grace_epochs": 3}, "metric": "eval/knn_top1"}
    source = written(tmp_path, **settings)
    study = load_study(source, "", "study.scheduler.name=asha")
    assert (study.scheduler.name, study.scheduler.grace_epochs) == ("asha", 3)


def test_an_override_that_could_not_count_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch_size: varies in space\.batch_size"):
        load_study(written(tmp_path), "", "batch_size=8")
    with pytest.raises(ConfigError, match=r"study\.space\.loss\.temperature: .* as a whole"):
        load_study(written(tmp_path), "", "study.space.loss.temperature={grid: [0.1]}")


def test_every_point_is_run_with_every_seed_under_a_name_of_its_own(tmp_path: Path) -> None:
    trials = trials_of(written(tmp_path), "study.seeds=[0, 1]")
    assert [t.name for t in trials[:2]] == [
        "batch_size-8_epochs-1_seed-0",
        "batch_size-8_epochs-2_seed-0",
    ]
    assert len({t.name for t in trials}) == 12
    assert {(t.experiment.batch_size, t.experiment.epochs, t.experiment.seed) for t in trials} == {
        (b, e, s) for b in (8, 16) for e in (1, 2, 4) for s in (0, 1)
    }


def test_a_constant_rate_reads_lengths_off_one_run_and_a_cosine_does_not(tmp_path: Path) -> None:
    source = written(tmp_path, metric="eval/knn_top1")
    apart = trials_of(source)
    assert len(apart) == 6
    shared = trials_of(source, "schedule.decay=constant")
    assert [[(c.point["epochs"], c.epoch) for c in t.cells] for t in shared] == [
        [(1, 1), (2, 2), (4, 4)]
    ] * 2
    assert {t.experiment.epochs for t in shared} == {4}
    study = load_study(source)
    assert "cosine" in note_on_lengths(study, apart)
    assert "one run" in note_on_lengths(study, shared)


def test_cases_move_several_paths_and_take_others_away(tmp_path: Path) -> None:
    space = {
        "head": {
            "cases": {
                "none": {"head.name": "none", "head.dim": None},
                "mlp": {"head.name": "mlp", "head.layers": 3},
            }
        },
        "head.dim": {"grid": [8, 16]},
    }
    trials = trials_of(written(tmp_path, space=space, figure={"x": "head.dim"}))
    heads = {t.experiment.head.model_dump_json() for t in trials}
    assert len(heads) == 3
    (none,) = (t for t in trials if t.experiment.head.name == "none")
    assert [c.point["head.dim"] for c in none.cells] == [8, 16]  # one run stands for both


def test_lists_are_added_to_and_nothing_twice(tmp_path: Path) -> None:
    base = {
        "name": "pipeline",
        "size": 16,
        "shared": [{"name": "crop"}],
        "a": [],
        "symmetric": False,
    }
    stages = {
        "cut": {"augment.a+": [{"name": "cutout"}]},
        "sobel": {"augment.a+": [{"name": "sobel"}]},
    }
    space = {"first": {"cases": stages}, "second": {"cases": stages}}
    trials = trials_of(written(tmp_path, set={"augment": base}, space=space, figure={"x": "first"}))
    found = [[stage.name for stage in t.experiment.augment.a] for t in trials]
    assert found == [["cutout"], ["cutout", "sobel"], ["sobel", "cutout"], ["sobel"]]


def test_a_trial_whose_rows_fill_no_batch_is_named_before_any_runs(tmp_path: Path) -> None:
    write_shapes(tmp_path / "train.parquet", 12)
    study = load_study(written(tmp_path), "", f"data.train={tmp_path}/train.parquet")
    trials = make_trials(study, base_tree(study), points_of(study))
    message = (
        r"12 rows do not fill one global batch of 16 \(3 of 6 trials, as batch_size-16_.*\); "
        r"lower batch_size or bring more images"
    )
    with pytest.raises(DataError, match=message):
        forecast(study, trials)
    small = [t for t in trials if t.experiment.batch_size == 8]
    assert forecast(study, small).images == 8 * (1 + 2 + 4)


def test_the_digest_knows_results_from_looks_and_placement(tmp_path: Path) -> None:
    def digest(*overrides: str) -> str:
        study = load_study(written(tmp_path), "", *overrides)
        return digest_of_study(study, cfg.validate(Experiment, base_tree(study)))

    same = digest()
    for looks in (
        "study.question=why",
        "study.concurrency=3",
        "storage=elsewhere",
        "scaling.num_workers=2",
    ):
        assert digest(looks) == same, looks
    for changed in ("study.seeds=[1]", "loss.temperature=0.3", "evaluation.test_limit=5"):
        assert digest(changed) != same, changed


def test_a_trial_that_collapses_is_a_point_unless_the_study_says_otherwise(tmp_path: Path) -> None:
    policies = {t.experiment.health.on_collapse for t in trials_of(written(tmp_path))}
    assert policies == {"warn"}
    told = written(tmp_path, set={"health.on_collapse": "stop"})
    assert {t.experiment.health.on_collapse for t in trials_of(told)} == {"stop"}


def test_only_what_varies_becomes_a_parameter(tmp_path: Path) -> None:
    (trial, *_) = trials_of(written(tmp_path))
    assert trial.experiment.tracking.only_params == ["batch_size", "epochs", "seed"]


def test_a_study_is_the_same_whatever_class_reads_it(tmp_path: Path) -> None:
    study = cfg.validate(Study, tree_of(tmp_path))
    assert study == load_study(written(tmp_path))
