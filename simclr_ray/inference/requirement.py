"""What a model has to show before an alias moves to it: a rule, parsed and never run as code.

    linear_top1 >= champion - 0.2 * se and effective_rank > 10

A rule is comparisons joined by `and`, of sums and products of numbers, of metrics, and of two words
about the one metric of their comparison: `champion`, its value for the version that has the alias,
and `se`, the standard error of the difference between the two.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple

from simclr_ray.config import nearest
from simclr_ray.config.protocols import PROTOCOLS
from simclr_ray.errors import ConfigError
from simclr_ray.evaluation.scores import CLASSIFIER_TOP1, LABEL_FREE

CHAMPION, SE = "champion", "se"
METRICS: Final = (*(protocol.metric for protocol in PROTOCOLS), CLASSIFIER_TOP1, *LABEL_FREE)
NOTHING: Final[Mapping[str, str]] = MappingProxyType({})
MOST_CHARACTERS: Final = 1000
_COMPARE: Final[dict[type, tuple[str, Callable[[float, float], bool]]]] = {
    ast.GtE: (">=", operator.ge),
    ast.Gt: (">", operator.gt),
    ast.LtE: ("<=", operator.le),
    ast.Lt: ("<", operator.lt),
}
_COMBINE: Final[dict[type, tuple[str, Callable[[float, float], float]]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
}


class Facts(NamedTuple):
    """What a rule is tested by.

    Attributes:
        candidate: Metric -> value.
        champion: Likewise, of the version that has the alias; None: there is none yet.
        se: Metric -> standard error of the difference, where single images can be counted.
        absent: Metric that the candidate cannot have -> why.
        champion_absent: Likewise, of the version that has the alias.
    """

    candidate: Mapping[str, float]
    champion: Mapping[str, float] | None
    se: Mapping[str, float]
    absent: Mapping[str, str] = NOTHING
    champion_absent: Mapping[str, str] = NOTHING


class RuleResult(NamedTuple):
    """Whether a rule holds, and each of its comparisons with its numbers."""

    holds: bool
    lines: list[str]


@dataclass(frozen=True)
class Requirement:
    """A rule that was parsed.

    Attributes:
        text: As it was given.
    """

    text: str
    _comparisons: tuple[ast.Compare, ...]

    @classmethod
    def parse(cls, text: str, key: str = "registry.require") -> Requirement:
        """Return the rule in a text; of an empty one every model is good enough.

        Raises:
            ConfigError: It is no rule, or names what is no metric.
        """
        try:
            rule = cls(text, tuple(_comparisons(text)))
            if text.strip() and not rule.metrics:
                raise _NoRuleError("it names no metric")
            return rule
        except _NoRuleError as error:
            raise ConfigError.of(key, f"{text!r}: {error}") from error

    @property
    def metrics(self) -> list[str]:
        """The metrics that it names, in order."""
        named = [n for c in self._comparisons for n in _names(c) if n not in (CHAMPION, SE)]
        return list(dict.fromkeys(named))

    @property
    def needs_champion(self) -> bool:
        """Whether it compares with the version that has the alias."""
        return any({CHAMPION, SE} & set(_names(c)) for c in self._comparisons)

    def check(self, facts: Facts) -> RuleResult:
        """Return whether it holds; without a champion what compares with one does.

        A metric that was not measured fails, with or without a champion.
        """
        lines, holds = [], True
        for comparison in self._comparisons:
            passed, line = _checked(comparison, facts)
            holds = holds and passed
            lines.append(line)
        return RuleResult(holds, lines)


class _NoRuleError(ValueError):
    """A text is no rule."""


def _comparisons(text: str) -> Iterator[ast.Compare]:
    if not text.strip():
        return
    if len(text) > MOST_CHARACTERS:
        raise _NoRuleError(f"more than {MOST_CHARACTERS} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        problem = error.msg if isinstance(error, SyntaxError) else "it cannot be read"
        raise _NoRuleError(problem) from error
    joined = isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And)
    for part in tree.values if joined and isinstance(tree, ast.BoolOp) else [tree]:
        if not isinstance(part, ast.Compare):
            problem = "is no comparison (>=, >, <=, <), joined by and"
            raise _NoRuleError(f"{ast.unparse(part)} {problem}")
        _check_comparison(part)
        yield part


def _check_comparison(part: ast.Compare) -> None:
    if any(type(op) not in _COMPARE for op in part.ops):
        raise _NoRuleError("comparisons are >=, >, <= and <")
    for side in (part.left, *part.comparators):
        _check_sum(side)
    metrics = {n for n in _names(part) if n not in (CHAMPION, SE)}
    if {CHAMPION, SE} & set(_names(part)) and len(metrics) != 1:
        problem = f"names {len(metrics)} metrics; champion and se are those of one"
        raise _NoRuleError(f"{ast.unparse(part)} {problem}")


def _check_sum(node: ast.expr) -> None:
    """Raise `_NoRuleError` for what is no sum or product of numbers and names."""
    if isinstance(node, ast.BinOp) and type(node.op) in _COMBINE:
        _check_sum(node.left)
        _check_sum(node.right)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        _check_sum(node.operand)
    elif isinstance(node, ast.Name):
        if node.id not in (*METRICS, CHAMPION, SE):
            raise _NoRuleError(
                f"there is no metric {node.id!r}{nearest(node.id, (*METRICS, CHAMPION, SE))}; "
                f"there are {', '.join(METRICS)}"
            )
    elif not (isinstance(node, ast.Constant) and type(node.value) in (int, float)):
        raise _NoRuleError(f"{ast.unparse(node)} is no number, metric, champion or se")


def _names(comparison: ast.Compare) -> list[str]:
    return [node.id for node in ast.walk(comparison) if isinstance(node, ast.Name)]


def _checked(comparison: ast.Compare, facts: Facts) -> tuple[bool, str]:
    """Return whether a comparison holds, and it with its numbers."""
    names, shown = _names(comparison), ast.unparse(comparison)
    metric = next((n for n in names if n not in (CHAMPION, SE)), "")
    links = list(_links(comparison))
    is_first = facts.champion is None and bool({CHAMPION, SE} & set(names))
    if is_first:  # what compares with no champion holds
        links = [link for link in links if not {CHAMPION, SE} & set(_names(link))]
        names = [n for n in names if n not in (CHAMPION, SE)]
    values = {n: facts.candidate[n] for n in names if n in facts.candidate}
    if CHAMPION in names and metric in (facts.champion or {}):
        values[CHAMPION] = (facts.champion or {})[metric]
    if SE in names and metric in facts.se:
        values[SE] = facts.se[metric]
    missing = [n for n in dict.fromkeys(names) if n not in values]
    if missing:
        why = [f"the version {facts.absent[n]}" for n in missing if n in facts.absent]
        if CHAMPION in missing and metric in facts.champion_absent:
            why.append(f"the champion {facts.champion_absent[metric]}")
        reasons = f" ({', '.join(why)})" if why else ""
        return False, f"{shown}: {', '.join(missing)} was not measured{reasons}"
    holds = all(_holds(link, values) for link in links)
    numbers = ", ".join(f"{name} {values[name]:.4g}" for name in dict.fromkeys(names))
    if is_first and holds:
        return True, f"{shown}: holds, there is no champion yet"
    return holds, f"{shown}: {'holds' if holds else 'fails'} ({numbers})"


def _links(comparison: ast.Compare) -> Iterator[ast.Compare]:
    """Yield the comparisons of two sides that a chain of them (`0 < a <= b`) is made of."""
    left = comparison.left
    for op, right in zip(comparison.ops, comparison.comparators, strict=True):
        yield ast.Compare(left, [op], [right])
        left = right


def _holds(link: ast.Compare, values: Mapping[str, float]) -> bool:
    left, right = _value(link.left, values), _value(link.comparators[0], values)
    return _COMPARE[type(link.ops[0])][1](left, right)


def _value(node: ast.expr, values: Mapping[str, float]) -> float:
    if isinstance(node, ast.BinOp):
        return _COMBINE[type(node.op)][1](_value(node.left, values), _value(node.right, values))
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand, values)
    if isinstance(node, ast.Name):
        return values[node.id]
    assert isinstance(node, ast.Constant)
    assert isinstance(node.value, int | float)
    return float(node.value)
