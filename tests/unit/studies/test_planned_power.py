"""A study says before it runs what its seeds can find, and stops where that is too little."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from simclr_ray import config as cfg
from simclr_ray.cli.study import _show_power
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import ClusterError, ConfigError
from simclr_ray.studies import driver
from simclr_ray.studies.effects import power_of, seeds_needed
from simclr_ray.studies.files import load_study
from simclr_ray.studies.plan import base_tree
from simclr_ray.studies.planned_power import check_power, planned_powers
from simclr_ray.studies.settings import digest_of_study
from tests.ray.images import write_shapes
from tests.unit.cli.test_app import errors, run
from tests.unit.studies.test_claims import LONG_GAP, SHORT_GAP, study_of

CLAIM = {**SHORT_GAP, "smallest_effect": 0.02}


def test_the_power_is_that_of_the_test_at_the_seeds_of_the_study() -> None:
    (planned,) = planned_powers(study_of(CLAIM, SHORT_GAP, expected_deviation=0.01))
    assert planned.claim == "claim 0"  # the other has no smallest effect
    assert planned.power == power_of(0.02, 0.01, 5)
    assert planned.seeds_needed == seeds_needed(0.02, 0.01)


def test_a_difference_of_differences_deviates_as_two_gaps_do_unless_it_says_itself() -> None:
    gaps = {**CLAIM, "than": LONG_GAP}
    of_two, own = planned_powers(
        study_of(gaps, {**gaps, "expected_deviation": 0.03}, expected_deviation=0.01)
    )
    assert of_two.deviation == pytest.approx(0.01 * math.sqrt(2))
    assert own.deviation == 0.03


def test_nothing_is_said_where_no_deviation_is_expected_or_no_effect_is_of_interest() -> None:
    assert planned_powers(study_of(CLAIM)) == []
    assert planned_powers(study_of(SHORT_GAP, expected_deviation=0.01)) == []
    check_power([])


@pytest.mark.parametrize(("seeds", "count"), [([0, 1, 2, 3, 4], "5 seeds"), ([0], "1 seed")])
def test_too_few_seeds_are_refused_in_a_line_that_names_how_many(
    seeds: list[int], count: str
) -> None:
    claims = [CLAIM, {**CLAIM, "smallest_effect": 0.01}]
    planned = planned_powers(study_of(*claims, expected_deviation=0.02, seeds=seeds))
    with pytest.raises(ConfigError) as raised:
        check_power(planned)
    text = str(raised.value)
    assert "\n" not in text
    assert text.startswith(f"seeds: {count} cannot say whether 'claim 1' (2 of 2 claims)")
    assert f"need {seeds_needed(0.01, 0.02)} seeds" in text
    assert seeds_needed(0.01, 0.02) == 34  # half a deviation: the textbook's
    enough = list(range(34))
    check_power(planned_powers(study_of(*claims, expected_deviation=0.02, seeds=enough)))


def test_what_is_expected_is_no_part_of_what_a_study_is() -> None:
    digests = set()
    for changes in ({}, {"expected_deviation": 0.01}):
        study = study_of(CLAIM, space={"epochs": {"grid": [1, 9]}, "batch": {"grid": [64, 512]}},
                         **changes)  # fmt: skip
        digests.add(digest_of_study(study, Experiment.load("cifar10_study_cpu")))
    assert len(digests) == 1
    assert base_tree(study_of()) != {}


def written(folder: Path, **changes: Any) -> str:
    tree: dict[str, Any] = {
        "name": "s",
        "question": "?",
        "base": "cifar10_study_cpu",
        "space": {"batch_size": {"grid": [8, 16]}},
        "seeds": [0, 1],
        "comparisons": [
            {"claim": "c", "better": {"batch_size": 16}, "worse": {"batch_size": 8},
             "smallest_effect": 0.01},
        ],
        "expected_deviation": 0.02,
        **changes,
    }  # fmt: skip
    path = folder / "study.yaml"
    path.write_text(cfg.dump_yaml(tree))
    return str(path)


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_the_command_ends_with_2_before_anything_starts(tmp_path: Path, options: list[str]) -> None:
    write_shapes(tmp_path / "images", 64)
    places = ["data.train=images", "data.test=images", "storage=runs"]
    done = run("study", "run", written(tmp_path), *places, *options, cwd=tmp_path)
    assert done.returncode == 2, done
    assert "power  0.06 for 1.00 points with 2 seeds: c\n" in done.stdout
    (line,) = errors(done)
    assert line.startswith("error: seeds: 2 seeds cannot say whether 'c'")
    assert line.endswith("--underpowered runs the study all the same")
    assert not (tmp_path / "runs").exists()


def test_underpowered_is_shown_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    _show_power(study_of(CLAIM, expected_deviation=0.02), is_enough=True)
    assert "for 2.00 points with 5 seeds: claim 0" in capsys.readouterr().out


def test_from_python_a_study_goes_on_and_says_what_its_seeds_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_cluster(*_: object) -> None:
        raise ClusterError("none here")

    monkeypatch.setattr(driver, "with_cluster", no_cluster)
    write_shapes(tmp_path / "images", 64)
    images = tmp_path / "images"
    study = load_study(
        written(tmp_path), "", f"data.train={images}", f"data.test={images}",
        f"storage={tmp_path / 'runs'}",
    )  # fmt: skip
    with pytest.raises(ClusterError):
        driver.run_study(study)
    assert "2 seeds cannot say whether 'c'" in caplog.text
    assert "--underpowered" not in caplog.text
