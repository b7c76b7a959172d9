"""What stored studies found, as one page of Markdown: a section per study, its claims a line each.

Made from the `results.json` of kept reports alone, so that the page and the data cannot differ.
Where a `reading.md` lies beside one, written by who has looked at its curves, it stands below the
claims: why one does not appear.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from simclr_ray.config.wording import counted
from simclr_ray.errors import ConfigError, ConfigIssue
from simclr_ray.studies.claim_words import SHORT_HEAD, SIGNIFICANT, claim_line, short_cells
from simclr_ray.studies.claims import Verdict, read_verdict
from simclr_ray.studies.effects import holm
from simclr_ray.studies.paper_findings import FINDINGS
from simclr_ray.studies.report import CURVES, DATA, FIGURE, PAGE

SCALE = "laptop"
READING = "reading.md"
SAID, MARK = ("appears", "is reversed"), " †"


def findings_page(folder: Path, made_by: str, scale: str = SCALE) -> str:
    """Return the findings of the studies that were kept at a scale, as Markdown.

    Args:
        folder: Of kept reports, a folder each; links are relative to the one above it.
        made_by: The command that writes the page.
        scale: Of the studies that are on it.

    Raises:
        ConfigError: A file of results cannot be read.
    """
    studies = [tree for tree in _stored(folder) if tree.get("scale") == scale]
    lines = [
        "# Findings",
        "",
        f"What studies at the scale `{scale}` found, and the paper beside it. Written by "
        f"`{made_by}` from the `{DATA}` of each report in `{folder.name}/`: edit those, not this.",
        "",
        "An effect is the mean difference of paired seeds, above 0 as claimed, with its standard "
        "deviation; the interval holds its mean at 95 % confidence. A claim *appears* where the "
        "interval lies above 0, *is reversed* where it lies below, and *does not appear* where it "
        "ends below the smallest effect of interest and a test had a power of 0.8 to find that. "
        "Else it cannot be said at this budget. The paper's effect is one of ImageNet, at settings "
        "that each study's file in `tune_configs/` matches with those here.",
        "",
    ]
    if studies:
        lines += [*_findings(studies), "", _counts(studies), "", *_summary(studies), ""]
    else:
        lines += [f"No study at this scale is kept in `{folder.name}/` yet.", ""]
    for tree in studies:
        lines += _section(tree, folder)
    return "\n".join(lines).rstrip() + "\n"


def _findings(studies: Sequence[dict[str, Any]]) -> list[str]:
    """Return the paper's findings as a table: of how many of its claims each verdict was given."""
    verdicts = {(t["study"], v.claim): v for t in studies for v in map(read_verdict, t["claims"])}
    questions = {tree["study"]: tree["question"] for tree in studies}
    rows = [["", "the paper's finding", "in the paper", "here", "study"], ["---:", *["---"] * 4]]
    for number, finding in enumerate(FINDINGS, 1):
        pairs = [(study, claim) for study, claims in finding.claims.items() for claim in claims]
        links = ", ".join(
            f"[{study}](#{_anchor(questions[study])})" if study in questions else study
            for study in finding.claims
        )
        said = _together([verdicts.get(pair) for pair in pairs])
        rows.append([str(number), finding.text, finding.source, said, links])
    return [f"| {' | '.join(row)} |" for row in rows]


def _together(verdicts: Sequence[Verdict | None]) -> str:
    """Return what verdicts say together: one where they agree, else how many of each."""
    words = Counter(v.words.partition(":")[0] if v else "not run yet" for v in verdicts)
    if len(words) == 1:
        return next(iter(words))
    parts = [f"{name} ({number} of {len(verdicts)})" for name, number in words.most_common()]
    return "; ".join(parts)


def _summary(studies: Sequence[dict[str, Any]]) -> list[str]:
    """Return all claims as one table, each with a link to the section of its study."""
    head = ["study", *SHORT_HEAD]
    claims = [(tree, read_verdict(claim)) for tree in studies for claim in tree["claims"]]
    corrected = holm([verdict.effect.p if verdict.effect else 1.0 for _, verdict in claims])
    rows = []
    for (tree, verdict), p in zip(claims, corrected, strict=True):
        cells = short_cells(verdict, tree["paper"]["metric"])
        is_said = verdict.effect is not None and verdict.effect.outcome in SAID
        cells[1] += MARK * (is_said and p > SIGNIFICANT)
        rows.append([f"[{tree['study']}](#{_anchor(tree['question'])})", *cells])
    table = [head, ["---"] * len(head), *rows]
    marked = sum(MARK in row[2] for row in rows)
    note = (
        f"{MARK.strip()} not below 5 % when all {len(claims)} are tested together (Holm's "
        "correction of Student's paired p)."
        if marked
        else f"What appears does so as well when all {len(claims)} are tested together (Holm's "
        "correction of Student's paired p)."
    )
    return [*(f"| {' | '.join(row)} |" for row in table), "", note]


def _counts(studies: Sequence[dict[str, Any]]) -> str:
    """Return how many claims have each verdict, as a sentence."""
    words = Counter(read_verdict(c).words for tree in studies for c in tree["claims"])
    said = "; ".join(f"{number} × {name}" for name, number in words.most_common())
    return f"Verdicts of {counted(words.total(), 'claim')}: {said}."


def _anchor(heading: str) -> str:
    """Return the anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _stored(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the results of each kept report, with the name of its folder."""
    for path in sorted(folder.glob(f"*/{DATA}")):
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError([ConfigIssue(str(path), f"cannot be read: {error}")]) from None
        if not isinstance(tree, dict):
            raise ConfigError([ConfigIssue(str(path), "holds no results of a study")])
        yield tree | {"folder": path.parent.name}


def _section(tree: dict[str, Any], folder: Path) -> list[str]:
    """Return the lines of one study."""
    where = f"{folder.name}/{tree['folder']}"
    seeds, wall_s = tree["seeds"], tree.get("wall_seconds", 0.0)
    reading = folder / tree["folder"] / READING
    took = f"{tree['seconds'] / 60:,.0f} minutes of training, one trial after the other"
    if wall_s:
        took = f"{wall_s / 60:,.0f} minutes in all, {took}"
    answers = f" (answers {tree['answers']})" if tree["answers"] else ""
    paper = tree["paper"]
    lines = [f"## {tree['question']}", ""]
    theirs = f"; the paper's: {paper['metric']}" if paper["metric"] else ""
    lines += [f"`{tree['study']}`{answers}, by `{tree['metric']}`{theirs}.", ""]
    drawn = [
        name for name in (FIGURE, CURVES) if (folder / tree["folder"] / f"{name}.svg").is_file()
    ]
    lines += [f"![{name} of {tree['study']}]({where}/{name}.svg)" for name in drawn]
    lines += [""] * bool(drawn)
    for claim in tree["claims"]:
        lines.append(f"- {claim_line(read_verdict(claim), paper['metric'])}")
    if not tree["claims"]:
        lines.append("- No claim is stated.")
    if tree["not_finished"]:
        lines.append(f"- {counted(len(tree['not_finished']), 'trial')} did not finish.")
    if reading.is_file():
        lines += ["", reading.read_text(encoding="utf-8").strip()]
    lines += [
        "",
        f"{counted(len(seeds), 'seed')} ({_list(seeds)}), {counted(tree['num_trials'], 'trial')}, "
        f"{took} ([every point and its cost]({where}/{PAGE})). Again:",
        "",
        "```",
        _again(tree),
        "```",
        "",
    ]
    return lines


def _again(tree: dict[str, Any]) -> str:
    """Return the command that makes the same trials, also where the study has other seeds now.

    Whose power is that of the table, which need not be what is asked for now.
    """
    command = str(tree["command"])
    if not command or "study.seeds=" in command:
        return command or "(from Python)"
    return f"{command} --underpowered 'study.seeds=[{_list(tree['seeds'])}]'"


def _list(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
