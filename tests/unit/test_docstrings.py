"""The docstrings of the public names: their examples run, and every argument is described."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

import simclr_ray
from simclr_ray.config.experiment import Experiment

PACKAGE = Path(simclr_ray.__file__).parent
# `train.driver` starts Ray: `tests/long/test_pretrain_example.py` runs its example.
MODULES_WITH_EXAMPLES = (
    "augment.views", "config.experiment", "config.schema", "nn.losses", "optim", "studies.effects",
)  # fmt: skip
COMPLETE = ("NTXentLoss", "LARS", "TwoViews", "pretrain", "Experiment")
# The start of a docstring by which another is named, and riddles of earlier ones.
UNWANTED = re.compile(
    r"arguments(?: and errors)? as (?:of|for)\b|then the eye|who asks, then|by another name"
    r"|, too[.;:]|\Areturn (?:those|that of|the ear|the same,) ",
    re.IGNORECASE,
)


@pytest.mark.parametrize("name", MODULES_WITH_EXAMPLES)
def test_the_examples_of_a_module_run(name: str) -> None:
    module = import_module(f"simclr_ray.{name}")
    done = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert done.attempted >= 2
    assert done.failed == 0


def arguments_of(found: object) -> list[str]:
    """Return the names that a caller can pass; of a config, its fields."""
    fields = getattr(found, "model_fields", None)
    if fields is not None:
        return list(fields)
    assert callable(found)
    return [name for name in inspect.signature(found).parameters if name != "self"]


@pytest.mark.parametrize("name", COMPLETE)
def test_help_names_every_argument_its_errors_its_source_and_an_example(name: str) -> None:
    found = getattr(simclr_ray, name)
    told = inspect.getdoc(found)
    assert told is not None
    described = " ".join(re.findall(r"^    (\w[\w, ]*):", told, re.MULTILINE))
    missing = [a for a in arguments_of(found) if not re.search(rf"\b{a}\b", described)]
    assert missing == []
    if name != "TwoViews":  # its errors are those of a call
        assert "Raises:\n" in told
    assert "Examples:\n" in told
    assert ">>> " in told
    assert "arXiv:" in told


@pytest.mark.parametrize(
    ("name", "method"), [("NTXentLoss", "forward"), ("TwoViews", "__call__"), ("LARS", "step")]
)
def test_the_method_that_does_the_work_describes_its_tensors(name: str, method: str) -> None:
    function = getattr(getattr(simclr_ray, name), method)
    told = inspect.getdoc(function) or ""
    for argument in inspect.signature(function).parameters:
        assert argument == "self" or re.search(rf"^    {argument}:", told, re.MULTILINE), argument
    if name != "LARS":
        assert "[n, " in told
        assert "Raises:\n" in told


def test_no_docstring_sends_the_reader_elsewhere_by_a_riddle() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                told = ast.get_docstring(node) or ""
                found = UNWANTED.search(told)
                if found:
                    where = getattr(node, "name", "module")
                    wrong.append(f"{path.relative_to(PACKAGE)}: {where}: {found[0]!r}")
    assert wrong == []


def test_a_dotted_name_of_a_room_is_a_module_or_a_key() -> None:
    names = {
        ".".join(p.relative_to(PACKAGE).with_suffix("").parts[:2]) for p in PACKAGE.rglob("*.py")
    }
    for section, field in Experiment.model_fields.items():
        names |= {f"{section}.{key}" for key in getattr(field.annotation, "model_fields", ())}
    wrong = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in re.findall(r"`([a-z_]+\.[a-z_]+)(?:\.\w+)*`", path.read_text("utf-8"))
        if (PACKAGE / name.partition(".")[0]).is_dir() and name not in names
    ]
    assert wrong == []
