"""Old names do not come back: one meaning a word, in code, keys, help and documents.

The left column is what earlier commits said; `docs/upgrade.md` maps old keys and metrics to new.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import simclr_ray

ROOT = Path(simclr_ray.__file__).parents[1]
READ = (
    "simclr_ray", "tests", "benchmarks", "docs", "tune_configs", "cluster", "scripts",
    "README.md", "CONTRIBUTING.md", "Makefile",
)  # fmt: skip
# Old names have to be said where they are mapped or compared; stored results keep theirs.
EXEMPT = re.compile(
    r"benchmarks/results/|docs/studies/\w+/|docs/glossary\.md|docs/upgrade\.md|tests/(?:golden|formats)/"
    r"|simclr_ray/config/validation\.py|tests/unit/test_words\.py"
)
ENDINGS = (".py", ".md", ".yaml", ".yml", ".c", ".sh", ".j2", "")

OLD_WORDS = {
    r"(?i)pictures?": "image",
    r"(?i)colour(?!_strength/)": "color",
    r"(?i)\bjudg(?:e|es|ed|ing)\b": "evaluate",
    r"(?i)\bmistakes?\b|mistakes?_|_mistakes?": "ConfigIssue, issue",
    r"CollapsedRun": "CollapseError, DivergedError",
    r"register_as": "registry",
    r"data\.bank\b|bank_limit": "data.eval_train",
    r"start\.weights|with_start|\bstarting\.": "init.weights, resolve_init",
    r"batch_norm\.images": "batch_norm.group_size",
    r"first_size|full_size_at\b": "start_size, full_size_epoch_fraction",
    r"max_bad_share|wait_share\b(?!['\"])": "max_bad_fraction, data_wait_fraction",
    r"knn_solo|knn_1\b": "knn_k20, knn_k1",
    r"\b\w*lbfgs\w*": "logistic_regression",
    r"map11": "voc07_map",
    r"train/accuracy|\btest/top[15]\b": "train/contrastive_top1, final/classifier/top1",
    r"\beval/spread|\.spread\b": "feature_std",
    r"sr\.complete\b": "sr.run_pipeline",
    r"(?i)timetable": "StepSchedule",
    r"\bPartMaker|make_several": "BatchBuilder.build",
    r"PictureCache|SharedPictures": "ImageCache",
    r"cached_backward": "grad_cache_step",
    r"\bselfcheck\b": "gradient_parity",
    r"\bis_held\b|check_free|ask_to_stop|is_to_stop": "is_locked, stop_requested",
    r"\bTempered\b": "LearnableTemperature",
    r"\b(?:dist|collectives)\.share\b|\bdef share\(": "partition",
    r"\.both\(|\bdef both\(": "draw_both_views",
    r"\bshare(?:: float| = )|\b_share\(": "…_fraction",
    r"\bcollectives as \w|\bsharedmem\b|\blogging as logs\b": "the module's own name",
}


# A variable says what it holds, and a function what it returns.
VAGUE = {"told", "asked", "known", "found", "placed", "taught", "given", "said", "ours"}
# Also in the files that one opens first, which have to read like the paper.
VAGUE_AT_FIRST = {"shown", "kept", "wanted", "chosen", "made"}
OPENED_FIRST = (
    "train/loop.py",
    "train/worker.py",
    "nn/losses.py",
    "data/plan.py",
    "cli/pretrain.py",
)


def files() -> Iterator[tuple[str, str]]:
    """Yield name and text of every file that is read: those that git has, and new ones."""
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "--", *READ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for name in done.stdout.splitlines():
        path = ROOT / name
        if path.suffix in ENDINGS and path.is_file() and not EXEMPT.match(name):
            yield name, path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def texts() -> list[tuple[str, str]]:
    try:
        found = list(files())
    except (OSError, subprocess.CalledProcessError):
        # an unpacked archive has files of its user beside ours, and only git tells them apart
        pytest.skip("not a git checkout: which files are ours is not known")
    assert len(found) > 200
    return found


@pytest.mark.parametrize("old", OLD_WORDS)
def test_an_old_word_is_said_nowhere(old: str, texts: list[tuple[str, str]]) -> None:
    found = [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}"
        for name, text in texts
        for match in re.finditer(old, text)
    ]
    assert found == [], f"say {OLD_WORDS[old]}"


def test_no_file_is_called_by_an_old_word(texts: list[tuple[str, str]]) -> None:
    wrong = [name for name, _ in texts for old in OLD_WORDS if re.search(old, name)]
    assert wrong == []


def names_stored(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and name of all that a file assigns, takes as an argument or defines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield node.lineno, name
            case ast.ClassDef(name=name):
                yield node.lineno, re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)


def test_nothing_is_named_by_what_was_done_to_come_by_it() -> None:
    named = []
    for room in ("simclr_ray", "benchmarks"):
        for path in sorted((ROOT / room).rglob("*.py")):
            is_first = path.relative_to(ROOT / room).as_posix() in OPENED_FIRST
            vague = VAGUE | VAGUE_AT_FIRST if is_first else VAGUE
            named += [
                f"{path.relative_to(ROOT)}:{line}: {name}"
                for line, name in names_stored(path)
                if vague & set(name.lower().split("_"))
            ]
    assert not named, named
