"""The commands of README and CONTRIBUTING: their fenced `sh` blocks, and what each command is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Literal, NamedTuple

import simclr_ray

ROOT = Path(simclr_ray.__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md")
OURS = "simclr-ray"

# How a command that is not ours is run: `check` by scripts/check, before the tests; `now` as it
# stands, in the unit suite; `long` in a copy of the tree, with the arguments added that make it
# small; `make` by `make -n`, since make test runs these tests; `shell` only as part of its block.
How = Literal["check", "now", "long", "make", "shell"]
KNOWN: tuple[tuple[str, How, str], ...] = (
    (r"make (?:demo|lint|check|audit|docs|fuzz|soak|collapse|faults-long)", "make", ""),
    (r"make (?:test|test-long|test-nodes|test-faults)(?: test-long)?", "make", ""),
    (r"pytest -q tests/unit/nn/test_losses\.py.*", "now", ""),
    (r'pytest -q tests/unit -m "not slow"', "long", "--collect-only"),
    (r"ruff check \.", "check", ""),
    (r"ruff format --check \.", "check", ""),
    (r"codespell", "check", ""),
    (r"bandit -q -c pyproject\.toml -r simclr_ray hatch_build\.py", "check", ""),
    (r"mypy", "check", ""),
    (r"python -m benchmarks\.performance --check", "check", ""),
    (r"python -m benchmarks\.performance", "long", ""),
    (r"python -m benchmarks\.loss --threads 2", "long", "--batches 256 --rounds 1 --largest 512"),
    (r"uv pip compile .* -o requirements\.lock", "long", ""),
    (r"python -m build", "long", ""),
    (r"twine check --strict dist/\*", "long", ""),
    (r"git tag -a v[\d.]+ -m .*", "long", ""),
    (r"export \w+=\S+", "shell", ""),
    (r"[A-Z]+=\$\(ls -d [\w/*-]+\)", "shell", ""),
)


class Command(NamedTuple):
    """One command of a page."""

    page: str
    text: str  # without its comment

    @property
    def words(self) -> list[str]:
        """Its words, as a shell splits them; nothing is expanded."""
        return shlex.split(self.text)

    @property
    def is_ours(self) -> bool:
        """Whether it is a verb of ours."""
        return self.text.split()[0] == OURS


def text_of(page: str) -> str:
    """Return a page's text."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str = "sh") -> list[str]:
    """Return the fenced blocks of a page that are written in `language`, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)


def without_comment(line: str) -> str:
    """Return a line of a block up to its comment."""
    return re.split(r"(?:^|\s)#\s", line)[0].strip()


def commands(page: str) -> list[Command]:
    """Return every command of a page; those that `&&` joins are several."""
    found = []
    for block in blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            parts = without_comment(line).split("&&")
            found += [Command(page, part.strip()) for part in parts if part.strip()]
    return found


ALL = tuple(command for page in PAGES for command in commands(page))
# A command with an ellipsis shows what changes of a longer one.
DOCS = tuple(sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md")))
OF_DOCS = tuple(c for page in DOCS for c in commands(page) if "…" not in c.text)
OWN = tuple(command for command in (*ALL, *OF_DOCS) if command.is_ours)
OTHERS = tuple(command for command in ALL if not command.is_ours)


def how_to_run(command: Command) -> tuple[How, str] | None:
    """Return how a command that is not ours is run and what is added to it; None: unknown."""
    for pattern, how, added in KNOWN:
        if re.fullmatch(pattern, command.text):
            return how, added
    return None
