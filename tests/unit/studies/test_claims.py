"""Claims: what is compared is checked, paired and held against the paper; stored ones are read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simclr_ray import config as cfg
from simclr_ray.errors import ConfigError
from simclr_ray.studies.analysis import Results, as_json, results_of
from simclr_ray.studies.claim_words import CLAIM_HEAD, claim_cells, claim_line, sign_text
from simclr_ray.studies.claims import read_verdict, sign_flip_p, verdict_tree
from simclr_ray.studies.definition import Study
from simclr_ray.studies.files import load_study
from simclr_ray.studies.folder import TrialOutcome
from simclr_ray.studies.plan import points_of

KEPT = Path(__file__).parents[3] / "docs" / "studies"
SHORT_GAP = {"better": {"batch": 512, "epochs": 1}, "worse": {"batch": 64, "epochs": 1}}
LONG_GAP = {"better": {"batch": 512, "epochs": 9}, "worse": {"batch": 64, "epochs": 9}}


def study_of(*comparisons: dict[str, Any], **changes: Any) -> Study:
    """Return a study of two batch sizes by two lengths by two heads, with the paper's table."""
    tree = {
        "name": "s",
        "question": "?",
        "base": "cifar10_study_cpu",
        "space": {
            "batch": {"grid": [64, 512]}, "epochs": {"grid": [1, 9]},
            "head": {"cases": {"linear": {}, "mlp": {}}},
        },
        "seeds": [0, 1, 2, 3, 4],
        "protocols": ["linear", "probe"],
        "comparisons": [{"claim": f"claim {i}", **c} for i, c in enumerate(comparisons)],
        "paper": {
            "source": "Table 0",
            "metric": "top-1 (%)",
            "columns": ["batch", "epochs"],
            "matches": {"batch": {64: 256, 512: 4096}, "epochs": {1: 100, 9: 800}},
            "rows": [
                [256, 100, 57.5], [4096, 100, 64.5], [256, 800, 66.5], [4096, 800, 69.0],
                [256, 400, 1.0], [4096, 400, 99.0],
            ],
        },
        **changes,
    }  # fmt: skip
    return cfg.validate(Study, json.loads(json.dumps(tree)))  # keys that are numbers are text


def outcomes_of(study: Study, noise: float = 0.0) -> list[TrialOutcome]:
    """Return outcomes in which a batch of 512 is 4 points ahead at 1 epoch and 1 point at 9."""
    outcomes = []
    rng = np.random.default_rng(0)
    for seed in study.seeds:
        for i, point in enumerate(points_of(study)):
            gap = {1: 0.04, 9: 0.01}[int(point["epochs"])] if point["batch"] == 512 else 0.0
            h = 0.5 + 0.02 * seed + gap + noise * rng.normal()
            metrics = {"final/linear_top1": h, "probe/rotation_h": h + 0.3, "probe/rotation_z": h}
            cost = {"images": 1.0, "seconds": 60.0, "device_seconds": 60.0}
            cells = [{"point": point, "epoch": 0}]
            run = {"folder": f"/elsewhere/s/runs/{i}-{seed}"}
            outcomes.append(
                TrialOutcome(f"{i}-{seed}", "finished", "", cells, seed, metrics, {}, cost, run)
            )
    return outcomes


def results_with(*comparisons: dict[str, Any], noise: float = 0.0) -> Results:
    study = study_of(*comparisons)
    return results_of(study, outcomes_of(study, noise))


@pytest.mark.parametrize(
    ("comparison", "says"),
    [
        ({}, "both sides are the same: {}"),
        ({**SHORT_GAP, "than": {"better": {"batch": 512}, "worse": {"batch": 64}}},
         "both sides of than must name the dimensions of better"),
        ({**SHORT_GAP, "than": SHORT_GAP}, "than is the gap that it is compared with"),
        ({**SHORT_GAP, "than": {"better": LONG_GAP["worse"], "worse": LONG_GAP["worse"]}},
         "both sides of than are the same"),
        ({**SHORT_GAP, "than": {"better": {"batch": 8, "epochs": 9}, "worse": LONG_GAP["worse"]}},
         "batch=8 is not run; there are: 64, 512"),
        ({**SHORT_GAP, "than": {"better": {"depth": 8}, "worse": {"depth": 9}}}, "does not vary"),
        ({**SHORT_GAP, "metric": "probe/rotation_hh"}, "did you mean 'probe/rotation_h'?"),
        ({"metric": "probe/rotation_h", "worse_metric": "eval/alignment"}, "no common unit"),
        ({**SHORT_GAP, "smallest_effect": 2}, "a point is smallest_effect: 0.01"),
        ({**SHORT_GAP, "expected_deviation": 2}, "a point is expected_deviation: 0.01"),
        ({**SHORT_GAP, "smallest_effect": -0.1}, "smallest_effect"),
        ({**SHORT_GAP, "paper_effect": "row"}, "paper_effect"),
    ],
)  # fmt: skip
def test_a_claim_that_cannot_be_is_refused_in_a_line(comparison: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        study_of(comparison)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_deviation_in_points_is_refused_where_the_metric_is_a_fraction() -> None:
    with pytest.raises(ConfigError, match=r"a point is 0\.01"):
        study_of(expected_deviation=1.5)


def test_a_difference_of_differences_pairs_four_readings_of_a_seed() -> None:
    (verdict,) = results_with({**SHORT_GAP, "than": LONG_GAP}, noise=1e-6).verdicts
    assert verdict.difference == pytest.approx(0.03, abs=1e-5)
    assert verdict.num_pairs == 10  # two heads by five seeds
    assert verdict.effect is not None
    assert verdict.effect.num_seeds == 5
    assert verdict.effect.outcome == "appears"
    assert verdict.paper_effect == pytest.approx((64.5 - 57.5) - (69.0 - 66.5))


def test_gaps_that_are_equal_but_for_rounding_are_equal() -> None:
    """(0.3 - 0.2) - (0.2 - 0.1) is 3e-17: no effect, in whoever's favor."""
    claim = {**SHORT_GAP, "than": LONG_GAP, "smallest_effect": 0.01}
    study = study_of(claim, seeds=[*range(6)])
    value = {(512, 1): 0.3, (64, 1): 0.2, (512, 9): 0.2, (64, 9): 0.1}
    outcomes = [
        o._replace(metrics={"final/linear_top1": value[p["batch"], p["epochs"]]})
        for o in outcomes_of(study)
        for p in [o.cells[0]["point"]]
    ]
    (verdict,) = results_of(study, outcomes).verdicts
    assert verdict.difference == 0.0
    assert verdict.words == "does not appear"


def test_sides_may_be_two_metrics_of_the_same_trials() -> None:
    comparison = {"metric": "probe/rotation_h", "worse_metric": "probe/rotation_z"}
    every, one = results_with(
        comparison, {**comparison, "better": {"batch": 64}, "worse": {"batch": 64}}
    ).verdicts
    assert (every.num_pairs, one.num_pairs) == (40, 20)
    for verdict in (every, one):
        assert verdict.difference == pytest.approx(0.3, abs=1e-12)
        assert verdict.paper_effect is None  # the table is of another metric
    assert every.metric == "probe/rotation_h"


def test_the_effect_is_over_seeds_and_not_over_points() -> None:
    study = study_of({"better": {"batch": 512}, "worse": {"batch": 64}})
    outcomes = outcomes_of(study, noise=0.01)
    (verdict,) = results_of(study, outcomes).verdicts
    value = {
        (o.seed, *o.cells[0]["point"].values()): o.metrics["final/linear_top1"] for o in outcomes
    }
    by_seed = [
        np.mean([
            value[seed, 512, epochs, head] - value[seed, 64, epochs, head]
            for epochs in (1, 9) for head in ("linear", "mlp")
        ])
        for seed in study.seeds
    ]  # fmt: skip
    assert verdict.effect is not None
    assert verdict.effect.mean == pytest.approx(np.mean(by_seed))
    assert verdict.effect.deviation == pytest.approx(np.std(by_seed, ddof=1))
    assert verdict.num_pairs == 20


def test_a_seed_that_lacks_a_point_is_left_out_of_the_effect() -> None:
    study = study_of({"better": {"batch": 512}, "worse": {"batch": 64}})
    outcomes = outcomes_of(study)
    (verdict,) = results_of(study, outcomes[:-1]).verdicts
    assert verdict.effect is not None
    assert (verdict.num_pairs, verdict.effect.num_seeds) == (19, 4)


def test_seeds_that_all_lack_a_point_have_no_effect_and_that_is_said() -> None:
    study = study_of({"better": {"batch": 512}, "worse": {"batch": 64}})
    halves = [
        o
        for o in outcomes_of(study)
        if o.seed < 2 and (o.cells[0]["point"]["epochs"] == 1) == (o.seed == 0)
    ]
    (verdict,) = results_of(study, halves).verdicts
    assert verdict.num_pairs == 4
    assert verdict.effect is None
    assert claim_line(verdict, "-") == "claim 0: no seed has all of its pairs"
    assert repr(read_verdict(verdict_tree(verdict))) == repr(verdict)


@pytest.mark.parametrize(
    ("comparison", "effect"),
    [
        (SHORT_GAP, 7.0),
        # lengths that the claim leaves open: those that ours stand for, not 400 epochs
        ({"better": {"batch": 512}, "worse": {"batch": 64}}, (7.0 + 2.5) / 2),
        ({"better": {"head": "mlp"}, "worse": {"head": "linear"}}, None),  # no column of the paper
        ({"better": {"head": "mlp", "batch": 512}, "worse": {"head": "mlp", "batch": 64}}, 4.75),
        ({"better": {"head": "mlp"}, "worse": {"head": "linear"}, "paper_effect": 1.5}, 1.5),
        ({**SHORT_GAP, "paper_effect": 0.0}, 0.0),
    ],
)
def test_the_effect_of_the_paper_is_that_of_its_rows_unless_it_is_given(
    comparison: dict[str, Any], effect: float | None
) -> None:
    (verdict,) = results_with(comparison).verdicts
    assert verdict.paper_effect == (None if effect is None else pytest.approx(effect))


def test_less_is_better_turns_the_claim_and_the_paper() -> None:
    study = study_of(SHORT_GAP, mode="min")
    (verdict,) = results_of(study, outcomes_of(study, noise=1e-6)).verdicts
    assert verdict.difference == pytest.approx(-0.04, abs=1e-5)
    assert verdict.paper_effect == pytest.approx(-7.0)
    assert verdict.effect is not None
    assert verdict.effect.outcome == "is reversed"


def test_a_line_has_effect_interval_power_and_the_effect_of_the_paper() -> None:
    results = results_with({**SHORT_GAP, "smallest_effect": 0.01}, noise=0.002)
    (verdict,) = results.verdicts
    line = claim_line(verdict, "top-1 (%)")
    assert "claim 0: appears: +3.98 ± 0.14 points, 95 % interval [+3.81, +4.16], 5 seeds" in line
    assert "the paper's +7.00 points" in line
    assert "power 1.00 for 1.00 points" in line
    assert "10 of 10 pairs won (permutation p = 0.00195, at least 0.00195)" in line
    cells = dict(zip(CLAIM_HEAD, claim_cells(verdict, "top-1 (%)"), strict=True))
    assert cells["smallest of interest"] == "1.00 points"
    low, high = json.loads(cells["95 % interval"].replace("+", ""))
    assert low < 4.0 < high
    assert high - low < 1.0


def test_pairs_of_which_all_but_one_are_equal_have_no_sign() -> None:
    differences = [0.0] * 5 + [-1e-4]
    (verdict,) = results_with(SHORT_GAP).verdicts
    lost = verdict._replace(
        difference=sum(differences) / 6, wins=0, num_pairs=6, p=sign_flip_p(differences),
        smallest_p=2 / 2**6,
    )  # fmt: skip
    assert lost.p == 1.0
    assert sign_text(lost) == "the pairs do not agree"
    assert sign_text(lost._replace(p=lost.smallest_p)) == "the sign is against the claim"


def test_a_claim_without_trials_is_not_run_yet() -> None:
    (verdict,) = results_of(study_of(SHORT_GAP), []).verdicts
    assert claim_line(verdict, "-") == "claim 0: not run yet"
    assert set(claim_cells(verdict, "-")[5:7]) == {"-"}


@pytest.mark.parametrize("num", [0, 1, 2, 5])
def test_a_stored_verdict_is_read_as_it_was_written(num: int) -> None:
    study = study_of({**SHORT_GAP, "smallest_effect": 0.02})
    outcomes = [o for o in outcomes_of(study, 0.01) if o.seed < num]
    (verdict,) = results_of(study, outcomes).verdicts
    text = json.dumps(verdict_tree(verdict), allow_nan=False)
    assert repr(read_verdict(json.loads(text))) == repr(verdict)  # NaN is not equal to itself


def test_stored_results_have_claims_curves_and_runs_and_no_number_that_json_lacks() -> None:
    results = results_with(SHORT_GAP, noise=1e-6)
    tree = json.loads(as_json(results, "simclr-ray study run s"), parse_constant=pytest.fail)
    assert tree["command"] == "simclr-ray study run s"
    assert tree["rows"][0]["runs"]["3"] == "runs/0-3"
    assert tree["seconds"] == 40 * 60
    assert tree["claims"][0]["verdict"] == "appears"


@pytest.mark.parametrize("name", sorted(p.parent.name for p in KEPT.glob("*/results.json")))
def test_results_that_earlier_releases_kept_are_read(name: str) -> None:
    tree = json.loads((KEPT / name / "results.json").read_text(encoding="utf-8"))
    for claim in tree["claims"]:
        verdict = read_verdict(claim)
        assert verdict.claim == claim["claim"]
        assert verdict.p == claim["p"]
        assert math.isfinite(verdict.difference)
        assert claim_cells(verdict, "")[0] == claim["claim"]


def test_studies_of_the_paper_have_its_effects_beside_their_claims() -> None:
    study = load_study("batch_size", "cpu")
    short, long = (results_of(study, []).verdicts[i].paper_effect for i in (0, 1))
    assert short == pytest.approx(64.6 - 57.5)
    assert long == pytest.approx(68.2 - 64.7)
