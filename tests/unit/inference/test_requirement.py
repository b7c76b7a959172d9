"""Rules for promotion hold where their arithmetic says so, and nothing else is a rule."""

from __future__ import annotations

import pytest

from simclr_ray.errors import ConfigError
from simclr_ray.inference.requirement import Facts, Requirement

FACTS = Facts(
    {"linear_top1": 0.60, "knn_top1": 0.5, "effective_rank": 12.0, "uniformity": -2.0},
    {"linear_top1": 0.61, "knn_top1": 0.45, "effective_rank": 20.0},
    {"linear_top1": 0.04, "knn_top1": 0.01},
)
FIRST = FACTS._replace(champion=None, se={})


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        ("", True),
        ("linear_top1 >= 0.6", True),
        ("linear_top1 > 0.6", False),
        ("linear_top1 >= champion", False),
        ("linear_top1 >= champion - 0.25 * se", True),  # 0.60
        ("linear_top1 >= champion - 0.2 * se", False),  # 0.602
        ("linear_top1 >= champion - 0.2 * se - 1 + 1.5 * 0.7", False),
        ("knn_top1 - champion > 2 * se", True),  # 0.05 > 0.02
        ("knn_top1 - champion > 2 * se and effective_rank > 10", True),
        ("knn_top1 - champion > 2 * se and effective_rank > 12", False),
        ("champion - 0.1 * se < knn_top1", True),
        ("0 < linear_top1 <= 0.6", True),
        ("0 < linear_top1 < 0.6", False),
        ("uniformity < -1.5", True),
        ("effective_rank >= champion", False),
        ("effective_rank >= champion - 2 * se", False),  # no image has a rank of its own
        ("uniformity <= champion", False),  # the champion's was not measured
    ],
)
def test_a_rule_holds_where_its_arithmetic_says_so(rule: str, holds: bool) -> None:
    verdict = Requirement.parse(rule).check(FACTS)
    assert verdict.holds is holds
    assert len(verdict.lines) == (rule.count(" and ") + 1 if rule else 0)


def test_without_a_champion_what_compares_with_one_holds_and_the_rest_is_tested() -> None:
    rule = "linear_top1 >= champion - 0.2 * se and effective_rank > 10"
    verdict = Requirement.parse(rule).check(FIRST)
    assert verdict.holds
    assert verdict.lines == [
        "linear_top1 >= champion - 0.2 * se: holds, there is no champion yet",
        "effective_rank > 10: holds (effective_rank 12)",
    ]
    assert not Requirement.parse("effective_rank > 13 and knn_top1 > champion").check(FIRST).holds


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        ("knn_k1_top1 >= champion - se", "knn_k1_top1 was not measured"),
        ("0.9 <= linear_top1 >= champion", "fails (linear_top1 0.6)"),
        ("0.5 <= linear_top1 >= champion", "holds, there is no champion yet"),
        ("champion - 0.1 * se < linear_top1 < 0.6", "fails (linear_top1 0.6)"),
        ("champion - 0.1 * se < linear_top1 <= 0.6", "holds, there is no champion yet"),
        ("linear_top1 - champion > 2 * se", "holds, there is no champion yet"),
    ],
)
def test_without_a_champion_the_metric_is_measured_and_what_names_none_is_tested(
    rule: str, line: str
) -> None:
    verdict = Requirement.parse(rule).check(FIRST)
    assert verdict.lines == [f"{rule}: {line}"]
    assert verdict.holds is line.startswith("holds")


def test_a_verdict_shows_its_numbers_and_what_was_not_measured() -> None:
    (line,) = Requirement.parse("linear_top1 >= champion - 0.2 * se").check(FACTS).lines
    assert line == (
        "linear_top1 >= champion - 0.2 * se: fails (linear_top1 0.6, champion 0.61, se 0.04)"
    )
    (line,) = Requirement.parse("knn_k1_top1 > 0.5").check(FACTS).lines
    assert line == "knn_k1_top1 > 0.5: knn_k1_top1 was not measured"


def test_a_rule_knows_what_it_needs() -> None:
    rule = Requirement.parse("linear_top1 >= champion and effective_rank > 10 and linear_top1 > 0")
    assert rule.metrics == ["linear_top1", "effective_rank"]
    assert rule.needs_champion
    assert not Requirement.parse("effective_rank > 10").needs_champion


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("linear_top1", "is no comparison"),
        ("linear_top > 0.5", "no metric 'linear_top'.*'linear_top1'"),
        ("linear_top1 > knn_top1 - champion", "names 2 metrics"),
        ("champion > 0.5", "names 0 metrics"),
        ("linear_top1 > 0.5 or knn_top1 > 0.5", "is no comparison"),
        ("not linear_top1 > 0.5", "is no comparison"),
        ("linear_top1 == 0.5", "comparisons are"),
        ("linear_top1 > 0.5 / 2", "is no number, metric"),
        ("linear_top1 > 2 ** 99", "is no number, metric"),
        ("linear_top1 > '0.5'", "is no number, metric"),
        ("linear_top1 > True", "is no number, metric"),
        ("linear_top1 > 1j", "is no number, metric"),
        ("linear_top1 > abs(-1)", "is no number, metric"),
        ("__import__('os').system('true') > 0", "is no number, metric"),
        ("linear_top1.real > 0", "is no number, metric"),
        ("[linear_top1 for x in 1] > 0", "is no number, metric"),
        ("(linear_top1 := 1) > 0", "is no number, metric"),
        ("linear_top1 >", "invalid syntax"),
        ("linear_top1 > 0.5; 1", "invalid syntax"),
        ("(" * 400 + "linear_top1 > 0" + ")" * 400, "cannot be read|too many nested"),
        ("linear_top1 > 1" + " + 1" * 400, "more than 1000 characters"),
        ("linear_top1 \0> 0", "null|cannot be read|source code"),
    ],
)
def test_what_is_no_rule_is_refused_in_a_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        Requirement.parse(text)
    assert str(caught.value).startswith("registry.require: ")
    assert len(str(caught.value).splitlines()) == 1
