"""What stored studies found, as one page of Markdown: a section per study, its claims a line each.

Made from the `results.json` of kept reports alone, so that the page and the data cannot differ.
Where a `reading.md` lies beside one, written by who has looked at its curves, it stands below the
claims: why one does not appear.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.wording import counted
from simclr_ray.errors import ConfigError
from simclr_ray.studies.claim_words import SHORT_HEAD, SIGNIFICANT, claim_line, short_cells
from simclr_ray.studies.claims import Verdict, read_verdict
from simclr_ray.studies.definition import Study
from simclr_ray.studies.effects import holm
from simclr_ray.studies.files import load_study
from simclr_ray.studies.paper_findings import FINDINGS
from simclr_ray.studies.plan import base_tree
from simclr_ray.studies.report import CURVES, DATA, FIGURE, PAGE
from simclr_ray.studies.settings import changed_settings, settings_of

USUAL = "laptop"
SCALES: Final = {USUAL: "CIFAR-10", "laptop_shapes": "drawn shapes"}  # and their images
READING = "reading.md"
NOT_RUN = "not run"
MARKED_OUTCOMES, MARK = ("appears", "is reversed"), " †"

ClaimKey = tuple[str, str, str]  # scale, name of a study, text of a claim


def findings_page(folder: Path, made_by: str, about: str = "") -> str:
    """Return the findings of the studies that were kept at the scales of laptops, as Markdown.

    Args:
        folder: Of kept reports, a folder each; links are relative to the one above it.
        made_by: The command that writes the page.
        about: What there is to say of their images.

    Raises:
        ConfigError: A file of results cannot be read.
    """
    studies = [tree for scale in SCALES for tree in _stored(folder) if tree.get("scale") == scale]
    named = " and ".join(f"`{scale}` ({images})" for scale, images in SCALES.items())
    lines = [
        "# Findings",
        "",
        f"What studies at the scales {named} found, and the paper beside it. Written by "
        f"`{made_by}` from the `{DATA}` of each report in `{folder.name}/`: edit those, not this.",
        "",
        "An effect is the mean difference of paired seeds, above 0 as claimed, with its standard "
        "deviation; the interval holds its mean at 95 % confidence. A claim *appears* where the "
        "interval lies above 0, *is reversed* where it lies below, and *does not appear* where it "
        "ends below the smallest effect of interest and a test had a power of 0.8 to find that. "
        "Else it cannot be said at this budget. The paper's effect is one of ImageNet, at settings "
        "that each study's file in `tune_configs/` matches with those here. Seeds differ in first "
        "weights, order and views; all have the same images, so that others are not in the "
        f"interval. {about}".rstrip(),
        "",
    ]
    marked = _marked(studies)
    if studies:
        counts = [_counts(studies, marked), "", _note(studies, marked), ""]
        lines += [*_findings(studies, marked), "", *counts, *_summary(studies, marked), ""]
    else:
        lines += [f"No study at these scales is kept in `{folder.name}/` yet.", ""]
    for tree in studies:
        lines += _section(tree, folder, marked)
    return "\n".join(lines).rstrip() + "\n"


def _marked(studies: Sequence[dict[str, Any]]) -> set[ClaimKey]:
    """Return the claims that are said to appear, but not when all are tested together."""
    claims = [(tree, read_verdict(claim)) for tree in studies for claim in tree["claims"]]
    corrected = holm([verdict.effect.p if verdict.effect else 1.0 for _, verdict in claims])
    return {
        _key(tree, verdict)
        for (tree, verdict), p in zip(claims, corrected, strict=True)
        if verdict.effect is not None
        and verdict.effect.outcome in MARKED_OUTCOMES
        and p > SIGNIFICANT
    }


def _note(studies: Sequence[dict[str, Any]], marked: set[ClaimKey]) -> str:
    """Return what the mark means, or that nothing needs it."""
    total = sum(len(tree["claims"]) for tree in studies)
    together = f"when all {total} are tested together (Holm's correction of Student's paired p)."
    if marked:
        return f"{MARK.strip()} not below 5 % {together}"
    return f"What appears does so as well {together}"


def _findings(studies: Sequence[dict[str, Any]], marked: set[ClaimKey]) -> list[str]:
    """Return the paper's findings as a table: of how many of its claims each verdict was given."""
    words = {
        _key(tree, v): v.words.partition(":")[0]
        for tree in studies
        for v in map(read_verdict, tree["claims"])
    }
    words |= {claim: words[claim] + MARK for claim in marked}
    anchors = {(tree["scale"], tree["study"]): _anchor(_heading(tree)) for tree in studies}
    head = ["", "the paper's finding", "in the paper", *SCALES.values(), "study"]
    rows = [head, ["---:", *["---"] * (len(head) - 1)]]
    for number, finding in enumerate(FINDINGS, 1):
        pairs = [(study, claim) for study, claims in finding.claims.items() for claim in claims]
        links = ", ".join(_links(study, anchors) for study in finding.claims)
        here = [
            _together([words.get((scale, *pair), NOT_RUN) for pair in pairs]) for scale in SCALES
        ]
        rows.append([str(number), finding.text, finding.source, *here, links])
    return [f"| {' | '.join(row)} |" for row in rows]


def _links(study: str, anchors: Mapping[tuple[str, str], str]) -> str:
    """Return a study's name, with a link to its section at each scale that it was run at."""
    there = [scale for scale in SCALES if (scale, study) in anchors]
    if not there:
        return study
    first, *others = [f"#{anchors[scale, study]}" for scale in there]
    more = [f"[{SCALES[scale]}]({link})" for scale, link in zip(there[1:], others, strict=True)]
    return ", ".join([f"[{study}]({first})", *more])


def _key(tree: dict[str, Any], verdict: Verdict) -> ClaimKey:
    return tree["scale"], tree["study"], verdict.claim


def _heading(tree: dict[str, Any]) -> str:
    """Return a study's question, and on which images where those are not the usual ones."""
    return _of_images(tree["question"], tree)


def _of_images(text: str, tree: dict[str, Any]) -> str:
    return text if tree["scale"] == USUAL else f"{text} ({SCALES[tree['scale']]})"


def _together(verdicts: Sequence[str]) -> str:
    """Return what verdicts say together: one where they agree, else how many of each."""
    words = Counter(verdicts)
    if len(words) == 1:
        return next(iter(words))
    parts = [f"{name} ({number} of {len(verdicts)})" for name, number in words.most_common()]
    return "; ".join(parts)


def _summary(studies: Sequence[dict[str, Any]], marked: set[ClaimKey]) -> list[str]:
    """Return all claims as one table, each with a link to the section of its study."""
    head = ["study", *SHORT_HEAD]
    rows = []
    for tree in studies:
        for verdict in map(read_verdict, tree["claims"]):
            cells = short_cells(verdict, tree["paper"]["metric"])
            cells[1] += MARK * (_key(tree, verdict) in marked)
            link = f"[{_of_images(tree['study'], tree)}](#{_anchor(_heading(tree))})"
            rows.append([link, *cells])
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _counts(studies: Sequence[dict[str, Any]], marked: set[ClaimKey]) -> str:
    """Return how many claims have each verdict, as a sentence."""
    words = Counter(
        verdict.words + MARK * (_key(tree, verdict) in marked)
        for tree in studies
        for verdict in map(read_verdict, tree["claims"])
    )
    counts = "; ".join(f"{number} × {name}" for name, number in words.most_common())
    return f"Verdicts of {counted(words.total(), 'claim')}: {counts}."


def _anchor(heading: str) -> str:
    """Return the anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _stored(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the results of each kept report, with the name of its folder."""
    for path in sorted(folder.glob(f"*/{DATA}")):
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError.of(str(path), f"cannot be read: {error}") from None
        if not isinstance(tree, dict):
            raise ConfigError.of(str(path), "holds no results of a study")
        yield tree | {"folder": path.parent.name}


def _section(tree: dict[str, Any], folder: Path, marked: set[ClaimKey]) -> list[str]:
    """Return the lines of one study."""
    where = f"{folder.name}/{tree['folder']}"
    seeds, wall_s = tree["seeds"], tree.get("wall_seconds", 0.0)
    reading = folder / tree["folder"] / READING
    took = f"{tree['seconds'] / 60:,.0f} minutes of training, one trial after the other"
    if wall_s:
        took = f"{wall_s / 60:,.0f} minutes in all, {took}"
    answers = f" (answers {tree['answers']})" if tree["answers"] else ""
    paper = tree["paper"]
    lines = [f"## {_heading(tree)}", ""]
    theirs = f"; the paper's: {paper['metric']}" if paper["metric"] else ""
    lines += [f"`{tree['study']}`{answers}, by `{tree['metric']}`{theirs}.", ""]
    drawn = [
        name for name in (FIGURE, CURVES) if (folder / tree["folder"] / f"{name}.svg").is_file()
    ]
    lines += [f"![{name} of {tree['study']}]({where}/{name}.svg)" for name in drawn]
    lines += [""] * bool(drawn)
    for verdict in map(read_verdict, tree["claims"]):
        mark = MARK * (_key(tree, verdict) in marked)
        lines.append(f"- {claim_line(verdict, paper['metric'], mark)}")
    if not tree["claims"]:
        lines.append("- No claim is stated.")
    if tree["not_finished"]:
        lines.append(f"- {counted(len(tree['not_finished']), 'trial')} did not finish.")
    if reading.is_file():
        lines += ["", reading.read_text(encoding="utf-8").strip()]
    study = _study_now(tree)
    others = _other_settings(tree, study) if study else []
    lines += [
        "",
        f"{counted(len(seeds), 'seed')} ({_list(seeds)}), {counted(tree['num_trials'], 'trial')}, "
        f"{took} ([every point and its cost]({where}/{PAGE})). {_before_command(others)}:",
        "",
        "```",
        tree["command"] if others else _again(tree),
        "```",
        "",
    ]
    changed = _changed(tree, study) if study else ""
    return [*lines, changed, ""] if changed else lines


def _study_now(tree: dict[str, Any]) -> Study | None:
    """Return the study as its file has it now; None of one whose file is not among ours."""
    try:
        return load_study(tree["study"], tree["scale"])
    except ConfigError:
        return None


def _other_settings(tree: dict[str, Any], study: Study) -> list[str]:
    """Return the settings that the study's file has changed; earlier releases kept none."""
    if "settings" not in tree:
        return []
    base = cfg.validate(Experiment, base_tree(study))
    return changed_settings(tree["settings"], settings_of(study, base), tree["command"])


def _before_command(others: Sequence[str]) -> str:
    """Return what stands before the command: that it repeats the study, or why it does not."""
    if not others:
        return "Again"
    named = ", ".join(f"`{path}`" for path in others)
    return f"The study's file has other settings since ({named}); it was run by"


def _changed(tree: dict[str, Any], study: Study) -> str:
    """Return which claims the study's file asks another smallest effect of by now; empty: none."""
    now = {comparison.claim: comparison.smallest_effect for comparison in study.comparisons}
    then = {v.claim: v.smallest_effect for v in map(read_verdict, tree["claims"])}
    changed = [claim for claim, effect in then.items() if now.get(claim) != effect]
    if not changed:
        return ""
    return f"Since then the study's file has another smallest effect for: {'; '.join(changed)}."


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
