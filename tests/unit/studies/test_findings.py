"""The page of findings says what kept results say, and is the one that is committed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.findings import COMMAND, PAGE, kept_page
from benchmarks.studies import without_links
from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import ConfigError
from simclr_ray.studies.analysis import as_json, results_of
from simclr_ray.studies.figures import draw_study
from simclr_ray.studies.files import load_study, summaries
from simclr_ray.studies.findings import SCALES, findings_page
from simclr_ray.studies.folder import StudyFolder
from simclr_ray.studies.paper_findings import FINDINGS
from simclr_ray.studies.plan import base_tree
from simclr_ray.studies.report import page
from simclr_ray.studies.settings import digest_of_study, settings_of
from tests.unit.studies.test_claims import SHORT_GAP, outcomes_of, study_of

RUN = "simclr-ray study run s --scale laptop data.train=$SIMCLR_RAY_DATA/train"


def keep(folder: Path, name: str, scale: str, *, drawn: bool = True) -> None:
    """Keep a report of drawn numbers as `benchmarks.studies` does, in a folder of this test."""
    study = study_of({**SHORT_GAP, "smallest_effect": 0.01}, scale=scale, question=f"{name}?")
    results = results_of(study, outcomes_of(study, noise=0.002))
    (folder / name).mkdir(parents=True)
    (folder / name / "results.json").write_text(as_json(results, RUN))
    if drawn:
        draw_study(results, folder / name / "figure.svg")


def test_the_committed_page_is_what_the_kept_results_give() -> None:
    assert PAGE.read_text(encoding="utf-8") == kept_page()


def test_a_section_has_claim_interval_paper_figure_command_seeds_and_minutes(
    tmp_path: Path,
) -> None:
    keep(tmp_path / "studies", "first", "laptop")
    text = findings_page(tmp_path / "studies", COMMAND)
    assert "\n## first?\n" in text
    assert "| study | claim | verdict | effect | 95 % interval | power | paper's effect |" in text
    assert (
        "| [s](#first) | claim 0 | appears | +3.98 ± 0.14 points | [+3.81, +4.16] | 1.00 | "
        "+7.00 points |"
    ) in text
    assert "![figure of s](studies/first/figure.svg)" in text
    assert "- claim 0: appears: +3.98 ± 0.14 points, 95 % interval [+3.81, +4.16]" in text
    assert "the paper's +7.00 points" in text
    assert "5 seeds (0, 1, 2, 3, 4), 40 trials, 40 minutes of training" in text
    assert f"```\n{RUN} --underpowered 'study.seeds=[0, 1, 2, 3, 4]'\n```" in text


def test_every_claim_of_a_finding_is_one_of_its_study() -> None:
    scales = {summary.name: summary.scales for summary in summaries()}
    for finding in FINDINGS:
        for study, claims in finding.claims.items():
            for scale in set(scales[study]) & set(SCALES):
                stated = {c.claim for c in load_study(study, scale).comparisons}
                assert set(claims) <= stated, (study, scale)


@pytest.mark.parametrize(
    ("outcome", "said"),
    [("appears", "appears"), ("does not appear", "appears (1 of 2); does not appear (1 of 2)")],
)
def test_a_finding_appears_where_all_of_its_claims_do(
    tmp_path: Path, outcome: str, said: str
) -> None:
    keep(tmp_path, "kept", "laptop", drawn=False)
    file = tmp_path / "kept" / "results.json"
    tree = json.loads(file.read_text())
    (claim,) = tree["claims"]
    first, second = FINDINGS[3].claims["what_h_keeps"]
    other = claim | {"claim": second, "effect": claim["effect"] | {"outcome": outcome}}
    tree |= {"study": "what_h_keeps", "claims": [claim | {"claim": first}, other]}
    file.write_text(json.dumps(tree))
    text = findings_page(tmp_path, COMMAND)
    assert f"| Table 3 | {said} | not run | [what_h_keeps](#kept) |" in text
    assert "| Table 5 | not run | not run | temperature |" in text


def test_what_appears_by_itself_but_not_among_all_is_marked_wherever_it_is_said(
    tmp_path: Path,
) -> None:
    keep(tmp_path, "kept", "laptop", drawn=False)
    file = tmp_path / "kept" / "results.json"
    tree = json.loads(file.read_text())
    (claim,) = tree["claims"]
    first, second = FINDINGS[3].claims["what_h_keeps"]
    weak = claim | {"claim": second, "effect": claim["effect"] | {"mean": 0.0015}}
    tree |= {"study": "what_h_keeps", "claims": [claim | {"claim": first}, weak]}
    file.write_text(json.dumps(tree))
    text = findings_page(tmp_path, COMMAND)
    assert "| Table 3 | appears (1 of 2); appears † (1 of 2) |" in text
    assert "Verdicts of 2 claims: 1 × appears; 1 × appears †." in text
    assert "† not below 5 % when all 2 are tested together" in text
    assert f"- {second}: appears †: +0.15 ± 0.14 points" in text
    assert f"- {first}: appears: " in text


def test_that_the_file_asks_another_effect_by_now_is_said(tmp_path: Path) -> None:
    study = load_study("what_h_keeps", "laptop")
    keep(tmp_path, "kept", "laptop", drawn=False)
    file = tmp_path / "kept" / "results.json"
    tree = json.loads(file.read_text())
    (claim,) = tree["claims"]
    claims = [
        claim | {"claim": c.claim, "smallest_effect": c.smallest_effect} for c in study.comparisons
    ]
    file.write_text(json.dumps(tree | {"study": "what_h_keeps", "claims": claims}))
    assert "another smallest effect" not in findings_page(tmp_path, COMMAND)
    claims[0] |= {"smallest_effect": 0.0001}
    file.write_text(json.dumps(tree | {"study": "what_h_keeps", "claims": claims}))
    said = f"the study's file has another smallest effect for: {claims[0]['claim']}."
    assert said in findings_page(tmp_path, COMMAND)


def test_a_command_is_no_repeat_where_the_file_has_other_settings_by_now(tmp_path: Path) -> None:
    study = load_study("what_h_keeps", "laptop")
    settings = settings_of(study, cfg.validate(Experiment, base_tree(study)))
    keep(tmp_path, "kept", "laptop", drawn=False)
    file = tmp_path / "kept" / "results.json"
    tree = json.loads(file.read_text()) | {"study": "what_h_keeps", "settings": settings}
    repeat = f"Again:\n\n```\n{RUN} --underpowered 'study.seeds=[0, 1, 2, 3, 4]'\n```"
    file.write_text(json.dumps(tree))
    assert repeat in findings_page(tmp_path, COMMAND)
    tree["settings"]["base"]["epochs"] = 7
    tree["settings"]["study"]["protocols"] = ["knn"]
    file.write_text(json.dumps(tree))
    text = findings_page(tmp_path, COMMAND)
    said = "The study's file has other settings since (`protocols`, `epochs`); it was run by:"
    assert f"{said}\n\n```\n{RUN}\n```" in text
    assert "Again" not in text
    command = f"{RUN} epochs=7 study.protocols=[knn]"  # which sets them again
    file.write_text(json.dumps(tree | {"command": command}))
    assert f"Again:\n\n```\n{command} --underpowered" in findings_page(tmp_path, COMMAND)


def test_the_settings_of_a_stored_study_are_those_of_its_file(tmp_path: Path) -> None:
    study = load_study("projection_head", "laptop", f"storage={tmp_path}", "data.train=/elsewhere")
    base = cfg.validate(Experiment, base_tree(study))
    folder = StudyFolder(str(tmp_path), study.name)
    folder.write_definition(study, base, digest_of_study(study, base))
    stored, tree = folder.definition()
    then = settings_of(stored, cfg.validate(Experiment, tree))
    now = load_study("projection_head", "laptop", "study.seeds=[5]")
    assert then == settings_of(now, cfg.validate(Experiment, base_tree(now)))
    kept = json.loads(as_json(results_of(study, []), settings=then))
    assert kept["settings"] == then


def test_what_somebody_has_read_off_the_curves_stands_below_the_claims(tmp_path: Path) -> None:
    keep(tmp_path, "first", "laptop", drawn=False)
    without = findings_page(tmp_path, COMMAND)
    (tmp_path / "first" / "reading.md").write_text("\n**Why.** At epoch 5 the two cross.\n\n")
    lines = findings_page(tmp_path, COMMAND).splitlines()
    at = lines.index("**Why.** At epoch 5 the two cross.")
    assert lines[at - 2].startswith("- claim 0: appears: ")
    assert lines[at + 2].startswith("5 seeds (0, 1, 2, 3, 4)")
    assert [line for line in lines if line not in without.splitlines()] == [lines[at]]
    assert "Verdicts of 1 claim: 1 × appears." in without


def test_a_study_on_other_images_has_a_column_a_section_and_a_mark_of_its_own(
    tmp_path: Path,
) -> None:
    keep(tmp_path, "kept", "laptop", drawn=False)
    keep(tmp_path, "kept_laptop_shapes", "laptop_shapes", drawn=False)
    first, second = FINDINGS[3].claims["what_h_keeps"]
    for name, mean in (("kept", 0.0015), ("kept_laptop_shapes", 0.04)):
        file = tmp_path / name / "results.json"
        tree = json.loads(file.read_text())
        (claim,) = tree["claims"]
        weak = claim | {"claim": second, "effect": claim["effect"] | {"mean": mean}}
        tree |= {"study": "what_h_keeps", "claims": [claim | {"claim": first}, weak]}
        file.write_text(json.dumps(tree | {"question": "kept?"}))
    text = findings_page(tmp_path, COMMAND)
    assert "| in the paper | CIFAR-10 | drawn shapes | study |" in text
    assert (
        "| Table 3 | appears (1 of 2); appears † (1 of 2) | appears | "
        "[what_h_keeps](#kept), [drawn shapes](#kept-drawn-shapes) |"
    ) in text
    assert "\n## kept? (drawn shapes)\n" in text
    assert "| [what_h_keeps (drawn shapes)](#kept-drawn-shapes) | " in text
    assert "3 × appears; 1 × appears †" in text


def test_studies_stand_in_the_order_of_their_folders_and_other_scales_are_left_out(
    tmp_path: Path,
) -> None:
    for name, scale in (("b", "laptop"), ("a", "laptop"), ("c", "cpu")):
        keep(tmp_path, name, scale, drawn=False)
    text = findings_page(tmp_path, COMMAND)
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## a?", "## b?"]
    assert "![" not in text


def test_a_page_without_studies_says_so_and_results_that_cannot_be_read_are_named(
    tmp_path: Path,
) -> None:
    assert "No study at these scales is kept" in findings_page(tmp_path, COMMAND)
    (tmp_path / "broken").mkdir()
    for text in ("{", "[]"):
        (tmp_path / "broken" / "results.json").write_text(text)
        with pytest.raises(ConfigError, match=r"broken/results\.json"):
            findings_page(tmp_path, COMMAND)


def test_a_kept_page_has_no_links_to_runs_that_are_not_kept() -> None:
    study = study_of(SHORT_GAP)
    text = page(results_of(study, outcomes_of(study)), ["<svg></svg>"], {})
    kept = without_links(text)
    assert '<a href="../runs/' in text
    assert "<a " not in kept
    assert 'title="runs/0-3">3</span>' in kept
    assert kept.count("<span") == text.count("<a ")
