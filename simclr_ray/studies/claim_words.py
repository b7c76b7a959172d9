"""A claim and what was found of it, as cells of a table and as a line of text."""

from __future__ import annotations

import math

from simclr_ray.config.metrics import is_fraction
from simclr_ray.studies.claims import Verdict
from simclr_ray.studies.effects import Effect

SIGNIFICANT = 0.05
SHORT_HEAD = ("claim", "verdict", "effect", "95 % interval", "power", "paper's effect")
CLAIM_HEAD = (
    "claim", "verdict", "effect", "95 % interval", "paper's effect", "smallest of interest",
    "power", "seeds", "pairs won", "permutation p (smallest possible)", "signs of pairs",
)  # fmt: skip


def short_cells(verdict: Verdict, paper_metric: str) -> list[str]:
    """Return the cells of a claim below `SHORT_HEAD`; same arguments as `claim_cells`."""
    cells = dict(zip(CLAIM_HEAD, claim_cells(verdict, paper_metric), strict=True))
    return [cells[name] for name in SHORT_HEAD]


def claim_cells(verdict: Verdict, paper_metric: str) -> list[str]:
    """Return the cells of a claim below `CLAIM_HEAD`.

    Args:
        verdict: What was found.
        paper_metric: The paper's, which says by a % sign that its effect is in points.
    """
    effect = verdict.effect
    smallest = verdict.smallest_effect
    has_power = effect is not None and not math.isnan(effect.power)
    return [
        verdict.claim,
        verdict.words,
        effect_text(verdict),
        _interval(effect, verdict.metric) if effect and effect.num_seeds > 1 else "-",
        paper_text(verdict, paper_metric) or "-",
        effect_of_metric(smallest, verdict.metric) if smallest else "-",
        f"{effect.power:.2f}" if effect and has_power else "-",
        str(effect.num_seeds if effect else 0),
        f"{verdict.wins} of {verdict.num_pairs}",
        f"{verdict.p:.3g} ({verdict.smallest_p:.3g})" if verdict.num_pairs else "-",
        sign_text(verdict) if verdict.num_pairs else "-",
    ]


def claim_line(verdict: Verdict, paper_metric: str, mark: str = "") -> str:
    """Return a claim in a line: the verdict, and the numbers that it rests on.

    Args:
        verdict: What was found.
        paper_metric: As in `claim_cells`.
        mark: That follows the verdict.
    """
    effect = verdict.effect
    if effect is None:
        return f"{verdict.claim}: {verdict.words}"
    parts = [effect_text(verdict)]
    if effect.num_seeds > 1:
        parts.append(f"95 % interval {_interval(effect, verdict.metric)}")
    parts.append(f"{effect.num_seeds} seed{'s' * (effect.num_seeds > 1)}")
    if not math.isnan(effect.power):
        smallest = effect_of_metric(verdict.smallest_effect, verdict.metric)
        parts.append(f"power {effect.power:.2f} for {smallest}")
    paper = paper_text(verdict, paper_metric)
    if paper:
        parts.append(f"the paper's {paper}")
    parts.append(f"{verdict.wins} of {verdict.num_pairs} pairs won")
    signs = f"permutation p = {verdict.p:.3g}, at least {verdict.smallest_p:.3g}"
    return f"{verdict.claim}: {verdict.words}{mark}: {', '.join(parts)} ({signs})"


def effect_text(verdict: Verdict) -> str:
    """Return the mean difference over seeds, its standard deviation and its unit."""
    effect = verdict.effect
    if effect is None:
        return "-"
    several = effect.num_seeds > 1
    spread = f" ± {_number(effect.deviation, verdict.metric)}" if several else ""
    return f"{_number(effect.mean, verdict.metric, '+')}{spread}{_unit(verdict.metric)}"


def paper_text(verdict: Verdict, paper_metric: str) -> str:
    """Return the paper's effect in the unit of its rows; empty where it has none."""
    if verdict.paper_effect is None:
        return ""
    return f"{verdict.paper_effect:+.2f}{' points' if '%' in paper_metric else ''}"


def sign_text(verdict: Verdict) -> str:
    """Return how the signs of the pairs are; a claim's verdict rests on its effect."""
    if verdict.smallest_p > SIGNIFICANT:
        return "too few pairs for a test of signs"
    if verdict.p > SIGNIFICANT and not verdict.difference:
        return "no side is above the other"
    if verdict.p > SIGNIFICANT:  # pairs that are equal agree with neither sign
        return "the pairs do not agree"
    return f"the sign is {'as claimed' if verdict.difference > 0 else 'against the claim'}"


def effect_of_metric(value: float, metric: str) -> str:
    """Return an effect with its unit: points of a metric that is shown in per cent."""
    return f"{_number(value, metric)}{_unit(metric)}"


def _interval(effect: Effect, metric: str) -> str:
    return f"[{_number(effect.low, metric, '+')}, {_number(effect.high, metric, '+')}]"


def _number(value: float, metric: str, sign: str = "") -> str:
    """Return a difference of a metric; two digits of a point, or as many where it has no points."""
    return f"{value * (100 if is_fraction(metric) else 1):{sign}.2f}"


def _unit(metric: str) -> str:
    return " points" if is_fraction(metric) else ""
