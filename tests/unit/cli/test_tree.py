"""The command tree: which verbs there are, what has moved, and what none of them imports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import typing
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.models import ArgumentInfo

from simclr_ray import config as cfg
from simclr_ray.cli.app import app
from simclr_ray.config.experiment import Experiment
from simclr_ray.studies.definition import Study
from simclr_ray.studies.folder import StudyFolder, TrialOutcome
from simclr_ray.studies.plan import base_tree
from simclr_ray.studies.settings import digest_of_study
from tests.formats.test_formats import HERE as FORMATS
from tests.ray.images import write_shapes
from tests.unit.cli.test_app import ROOT, errors, run

HEAVY = ("torch", "ray", "mlflow", "scipy", "matplotlib", "pandas", "sklearn", "torchvision")
EVERYDAY = (
    "prepare", "inspect", "preview", "pretrain", "evaluate", "embed", "predict", "export", "status",
    "doctor", "demo", "config",
)  # fmt: skip
GROUPS = {
    "model": (
        "register",
        "promote",
        "rollback",
        "compare",
        "rm",
        "finetune",
        "distill",
        "search",
        "duplicates",
        "map",
        "serve",
    ),
    "run": ("list", "probe", "report", "stop", "sync", "rm"),
    "study": ("list", "run", "resume", "status", "stop", "report", "best", "plan", "advise"),
    "cluster": ("check", "status"),
}
GENEROUS_S = 6.0  # 1.0 s alone; the machine of a test may be busy
PROGRAM = """
import contextlib, io, json, sys
from simclr_ray.cli.app import app
loaded = {}
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = app(arguments, standalone_mode=False)
    loaded[" ".join(arguments)] = [m for m in json.loads(sys.argv[2]) if m in sys.modules]
    assert not code, (arguments, code)
print(json.dumps(loaded))
"""


def loaded_by(commands: list[list[str]], cwd: Path) -> dict[str, list[str]]:
    """Return what is imported after each of some commands, run one after the other."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands), json.dumps(HEAVY)],
        capture_output=True, text=True, cwd=cwd, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def a_run(tmp_path: Path) -> Path:
    """Return a finished run folder, copied: status looks for locks."""
    return Path(shutil.copytree(FORMATS / "format_2", tmp_path / "runs" / "small-0123"))


def test_no_help_imports_what_takes_seconds(tmp_path: Path) -> None:
    verbs = [[verb] for verb in EVERYDAY] + [[g] for g in GROUPS]
    verbs += [[group, verb] for group, leaves in GROUPS.items() for verb in leaves]
    found = loaded_by([[*verb, "--help"] for verb in [[], *verbs]], tmp_path)
    assert {name for name, modules in found.items() if modules} == set()
    assert len(found) == 1 + len(EVERYDAY) + len(GROUPS) + sum(map(len, GROUPS.values()))


def test_arguments_are_named_in_capitals() -> None:
    def commands(group: typer.Typer) -> Iterator[Any]:
        for command in group.registered_commands:
            if not command.hidden:
                yield command.callback
        for each in group.registered_groups:
            assert each.typer_instance is not None
            yield from commands(each.typer_instance)

    for verb in commands(app):
        for name, annotation in typing.get_type_hints(verb, include_extras=True).items():
            for info in typing.get_args(annotation)[1:]:
                if isinstance(info, ArgumentInfo):
                    assert (info.metavar or name).isupper(), (verb.__name__, name)


def test_light_verbs_import_nothing_that_takes_seconds(a_run: Path, tmp_path: Path) -> None:
    write_shapes(tmp_path / "train.parquet", 20)
    commands = [
        ["--version"],
        ["config"],
        ["config", "cifar10_cpu"],
        ["study", "list"],
        ["status", str(a_run)],
        ["run", "list", str(a_run.parent)],
    ]
    found = loaded_by(commands, tmp_path)
    assert {name for name, modules in found.items() if modules} == set()
    (by_inspect,) = loaded_by([["inspect", str(tmp_path / "train.parquet")]], tmp_path).values()
    assert set(by_inspect) <= {"pandas"}  # by pyarrow, for labels


def test_status_and_best_of_a_study_import_nothing_that_takes_seconds(tmp_path: Path) -> None:
    for search, space in (
        ({}, {"grid": [0.1, 0.2]}),
        ({"name": "random", "trials": 3}, {"uniform": [0.1, 0.2]}),
    ):
        tree = {
            "name": str(search.get("name", "grid")),
            "question": "?",
            "base": "cifar10_study_cpu",
            "set": {"storage": str(tmp_path)},
            "space": {"loss.temperature": space},
            "metric": "eval/knn_top1",
            "protocols": [],
            "search": search,
        }
        study = cfg.validate(Study, tree)
        base = cfg.validate(Experiment, base_tree(study))
        folder = StudyFolder(str(tmp_path / "studies"), study.name)
        folder.write_definition(study, base, digest_of_study(study, base))
        cell = {"point": {"loss.temperature": 0.1}, "epoch": 0}
        curve = {1: {"eval/knn_top1": 0.5}}
        cost = {"images": 1.0, "seconds": 1.0, "device_seconds": 1.0}
        run_of = {"folder": "somewhere"}
        folder.write_outcome(TrialOutcome("t", "finished", "", [cell], 0, {}, curve, cost, run_of))
        commands = [["study", verb, folder.uri] for verb in ("status", "best")]
        found = loaded_by(commands, tmp_path)
        assert list(found.values()) == [[], []]


def test_help_is_there_at_once(tmp_path: Path) -> None:
    took = []
    for _ in range(3):
        began = time.monotonic()
        assert run("--help", cwd=tmp_path).returncode == 0
        took.append(time.monotonic() - began)
        if took[-1] < GENEROUS_S:
            return
    pytest.fail(f"--help took {took} s")


def test_help_lists_the_tree_and_nothing_that_has_moved(tmp_path: Path) -> None:
    listed = [
        line.split()[1]
        for line in run("--help", cwd=tmp_path).stdout.partition("Commands")[2].splitlines()
        if line.startswith("│ ") and line[2] != " "
    ]
    assert listed == [*EVERYDAY, *GROUPS]


@pytest.mark.parametrize(
    ("verb", "now"),
    [
        ("register", "model register RUN NAME"),
        ("finetune", "model finetune RUN"),
        ("distill", "model distill TEACHER"),
        ("probe", "run probe RUN"),
    ],
)
def test_a_verb_that_has_moved_ends_in_2_with_its_new_name(
    verb: str, now: str, tmp_path: Path
) -> None:
    done = run(verb, "runs/x", "--labels", "0.1", "data.test=x", cwd=tmp_path)
    assert done.returncode == 2
    assert errors(done) == [f"error: {verb}: is now: simclr-ray {now}"]


def test_the_version_is_that_of_the_package(tmp_path: Path) -> None:
    done = run("--version", cwd=tmp_path)
    assert done.stdout.splitlines()[0] == f"simclr-ray {metadata.version('simclr-ray')}"


def test_every_option_of_every_verb_has_a_sentence() -> None:
    command = typer.main.get_command(app)
    assert [
        f"{' '.join(words)} {parameter.name}"
        for words, verb in _verbs(command, [])
        for parameter in verb.params
        if not (getattr(parameter, "help", "") or "").strip()
    ] == []


def _verbs(group: Any, words: list[str]) -> Iterator[tuple[list[str], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _verbs(command, [*words, name])
        elif not command.hidden:
            yield [*words, name], command
