"""Every command of README and CONTRIBUTING is known, and parses or runs as it is written.

Those that train or install are run by `tests/long/test_commands.py`. Ours of all other pages parse,
and most run in `tests/long/test_guides.py` and `test_encoder_page.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import typer

import simclr_ray.cli.main  # noqa: F401 - registers every verb
from simclr_ray.cli.app import app
from simclr_ray.config.experiment import Experiment
from simclr_ray.studies.files import load_study
from tests.shell_blocks import (
    ALL,
    OTHERS,
    OURS,
    OWN,
    PAGES,
    ROOT,
    Command,
    blocks,
    how_to_run,
    text_of,
)

# Our verbs that answer at once and start nothing: run as they stand.
LIGHT = (("config",), ("study", "list"))
PROGRAM = "from simclr_ray.cli.main import main; main()"


def parsed(words: list[str]) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """Return the verb and its arguments as our command line understands them.

    Raises:
        click's UsageError: There is no such verb, option or argument.
    """
    command: Any = typer.main.get_command(app)
    context, rest, verb = None, words[1:], []
    while hasattr(command, "resolve_command"):
        name = command.name if context is None else verb[-1]
        context = command.make_context(name, list(rest), parent=context)
        left = [*context._protected_args, *context.args]
        chosen, command, rest = command.resolve_command(context, left)
        assert command is not None, f"no verb {left[0]!r}"
        verb.append(chosen)
    leaf = command.make_context(verb[-1], list(rest), parent=context)
    return tuple(verb), leaf.params


def test_there_are_blocks_to_read() -> None:
    assert len(OWN) >= 25
    assert {command.page for command in ALL} == set(PAGES)


@pytest.mark.parametrize("command", OTHERS, ids=lambda command: command.text[:60])
def test_a_command_that_is_not_ours_is_known(command: Command) -> None:
    assert how_to_run(command) is not None, "say in tests/shell_blocks.py how it is run"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working directory that holds the YAML files of the pages."""
    (config,) = blocks("README.md", "yaml")
    (tmp_path / "my.yaml").write_text(config, encoding="utf-8")
    (cells,) = blocks("docs/your_images.md", "yaml")
    (tmp_path / "cells.yaml").write_text(cells, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", OWN, ids=lambda command: command.text[:60])
@pytest.mark.usefixtures("folder")
def test_a_command_of_ours_parses_and_its_config_is_valid(command: Command) -> None:
    words = command.words
    verb, given = parsed(words[: words.index(">")] if ">" in words else words)
    overrides = given.get("overrides") or []
    if verb in (("pretrain",), ("preview",), ("config",)) and given["source"]:
        Experiment.load(given["source"], *overrides)
    if verb == ("study", "run"):
        load_study(given["source"], given["scale"], *overrides)


@pytest.mark.parametrize(
    "command",
    [c for c in OWN if any(tuple(c.words[1:][: len(verb)]) == verb for verb in LIGHT)],
    ids=lambda command: command.text,
)
def test_a_light_command_of_ours_runs(command: Command, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command.words[1:]],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize(
    "command",
    [c for c in OTHERS if (how_to_run(c) or ("",))[0] in ("now", "make")],
    ids=lambda command: command.text[:60],
)
def test_a_command_on_the_checkout_runs_as_it_is_written(command: Command) -> None:
    words = command.words
    if words[0] == "make":  # make test runs this test: only that the targets are there
        words = ["make", "-n", *words[1:]]
    beside = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{beside}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "command",
    [c for c in OTHERS if (how_to_run(c) or ("",))[0] == "check"],
    ids=lambda command: command.text[:60],
)
def test_a_command_that_guards_a_change_is_a_line_of_scripts_check(command: Command) -> None:
    check = text_of("scripts/check").splitlines()
    assert "scripts/lint" in check
    assert command.text in [*check, *text_of("scripts/lint").splitlines()]


def test_every_phony_target_has_a_rule() -> None:
    """Without one, make says that there is nothing to be done, and succeeds."""
    makefile = text_of("Makefile")
    declared = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert declared is not None
    rules = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert set(declared[1].split()) == rules


def test_every_marker_marks_a_test_and_is_chosen_by_a_command() -> None:
    settings = tomllib.loads(text_of("pyproject.toml"))["tool"]["pytest"]["ini_options"]
    markers = {line.partition(":")[0] for line in settings["markers"]}
    tests = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")]
    scripts = [path.read_text(encoding="utf-8") for path in (ROOT / "scripts").iterdir()]
    chosen = re.findall(r'-m (?:"[^"]+"|\w+)', "\n".join([*scripts, *blocks("CONTRIBUTING.md")]))
    assert markers <= set(re.findall(r"pytest\.mark\.(\w+)", "\n".join(tests)))
    assert markers <= set(re.findall(r"\w+", " ".join(chosen)))


PROSE = ("README.md", "CONTRIBUTING.md", "docs/cluster.md", "docs/upgrade.md", "docs/glossary.md",
         "docs/architecture.md", "tune_configs/README.md", "docs/studies/README.md")  # fmt: skip


@pytest.mark.parametrize("page", PROSE)
def test_a_verb_that_a_page_mentions_is_one(page: str) -> None:
    tree: Any = typer.main.get_command(app)
    for verb, second in re.findall(rf"{OURS} ([a-z]+)(?: ([a-z]+))?", text_of(page)):
        assert verb in tree.commands, f"{OURS} {verb}"
        below: Mapping[str, Any] = getattr(tree.commands[verb], "commands", {})
        assert not below or not second or second in below, f"{OURS} {verb} {second}"
