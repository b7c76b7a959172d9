"""Every study's scale for a machine without a GPU starts, and two of its trials finish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simclr_ray.studies.definition import Study
from simclr_ray.studies.driver import run_study
from simclr_ray.studies.files import load_study, study_names
from simclr_ray.studies.report import publish_report
from simclr_ray.studies.space import Dimension
from tests.ray.images import write_shapes

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.timeout(900)]

NUM_IMAGES = 600  # a batch of 512 is the largest of those run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scales")
    write_shapes(path / "train.parquet", NUM_IMAGES)
    write_shapes(path / "test.parquet", 100)
    return path


def two_trials_of(study: Study) -> Study:
    """Return the study with two values of what it varies first and one of all else."""
    space: dict[str, Any] = {}
    for name, dim in study.space.items():
        kept = dim.listed[: 1 if space else 2]
        cases = {key: dim.cases[key] for key in kept} if dim.cases else {}
        space[name] = Dimension(cases=cases) if cases else Dimension(grid=kept)
    seeds = study.seeds if list(study.space) == ["epochs"] else [0]  # lengths share one run
    paper = study.paper.model_copy(update={"matches": {}})  # of settings that are not run
    changes = {"space": space, "comparisons": [], "paper": paper, "seeds": seeds}
    return study.model_copy(update=changes)


@pytest.mark.parametrize("name", study_names())
def test_two_trials_of_each_study_finish(name: str, folder: Path, ray_cluster: str) -> None:
    given = {
        "data.train": folder / "train.parquet",
        "data.test": folder / "test.parquet",
        "data.limit": 0,
        "storage": folder / "runs",
        "evaluation.linear.epochs": 2,
    }
    varies = load_study(name, "cpu").space
    given |= {} if "epochs" in varies else {"epochs": 2}
    given |= {} if "batch_size" in varies else {"batch_size": 128}
    overrides = [f"{key}={value}" for key, value in given.items()]
    study = two_trials_of(load_study(name, "cpu", *overrides))
    study_folder = run_study(study)
    outcomes = study_folder.outcomes()
    assert [o.status for o in outcomes] == ["finished"] * 2, [o.reason for o in outcomes]
    place, results = publish_report(study_folder)
    assert len(results.rows) == 2
    assert (Path(place) / "report.html").stat().st_size > 0
