"""The documents name what is there: links, paths, functions, rooms, tests and old names."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest

import simclr_ray
from benchmarks import scaling_model
from simclr_ray.config.validation import RENAMED
from tests.unit.test_architecture import FLOORS

PACKAGE = Path(simclr_ray.__file__).parent
ROOT = PACKAGE.parent
PAGES = (
    *sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "tune_configs").glob("*.md")),
)  # fmt: skip
GUIDES = ("CONTRIBUTING.md", "docs/architecture.md", "docs/upgrade.md")
TOPS = "simclr_ray|tests|benchmarks|docs|tune_configs|cluster|scripts"


def text_of(page: str | Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)\)", text_of(page))
    gone = [
        link for link in links if "://" not in link and not (page.parent / link).resolve().exists()
    ]
    assert gone == []


@pytest.mark.parametrize("page", GUIDES)
def test_every_path_that_a_guide_names_exists(page: str) -> None:
    paths = re.findall(rf"`((?:{TOPS})/[\w./-]*)`", text_of(page))
    assert [p for p in paths if not (ROOT / p).exists() and "NAME" not in p] == []


@cache
def names_in(path: Path) -> frozenset[str]:
    """Return the functions and classes of a file, methods as `Class.method`."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [m.name for m in node.body if isinstance(m, ast.FunctionDef)]
            names |= {f"{node.name}.{method}" for method in methods}
    return frozenset(names)


def test_what_is_changed_most_is_a_table_of_its_own_and_the_rest_stands_by_room() -> None:
    chapter = text_of("CONTRIBUTING.md").split("## Where does my change go?")[1].split("\n## ")[0]
    most, *rooms = re.split(r"^### ", chapter, flags=re.MULTILINE)
    assert 8 <= most.count("\n| ") - 1 <= 12  # without the head
    for table in rooms:
        name = table.partition("\n")[0]
        room = name.strip("`/")
        if name != "Outside of the rooms":
            assert room in {room for floor in FLOORS for room in floor}, name
            rows = table.split("|---|---|---|\n")[1].split("\n\n")[0].splitlines()
            assert [row for row in rows if f"`simclr_ray/{room}/" not in row] == []


@pytest.mark.parametrize(("page", "least"), [("architecture", 25), ("reliability", 5)])
def test_every_hop_of_a_page_is_a_function_that_is_there(page: str, least: int) -> None:
    hops = re.findall(r"`([\w/]+\.py)(?::([\w.]+))?`", text_of(f"docs/{page}.md"))
    assert sum(bool(name) for _, name in hops) >= least
    of_checkout = tuple(f"{top}/" for top in TOPS.split("|"))
    for file, name in hops:
        path = (ROOT if file.startswith(of_checkout) else PACKAGE) / file
        assert path.is_file(), file
        assert not name or name in names_in(path), f"{file}:{name}"


def test_the_rooms_on_the_page_are_those_of_the_test_floor_by_floor() -> None:
    rows = re.findall(r"^\| (\d) \| `(\w+)(?:/|\.py)` \|", text_of("docs/architecture.md"), re.M)
    told = {(int(floor), room) for floor, room in rows}
    assert told == {(i, room) for i, rooms in enumerate(FLOORS, start=1) for room in rooms}


def test_the_old_names_have_every_renamed_key_and_no_other() -> None:
    old_names = text_of("docs/upgrade.md")
    keys = old_names.split("Keys and their values:")[1].split("Metrics of a run:")[0]
    assert dict(re.findall(r"`([^`]+)` → `([^`]+)`", keys)) == RENAMED


def test_the_upgrade_page_promises_and_leaves_room_for_the_tested_versions() -> None:
    page = " ".join(text_of("docs/upgrade.md").split())
    assert "each release reads the formats of the two before it" in page
    assert "## Tested versions" in page


def test_the_tables_of_scaling_are_those_of_the_stored_results() -> None:
    page = scaling_model.PAGE.read_text(encoding="utf-8")
    result = json.loads(scaling_model.stored_text("scaling_model"))
    assert scaling_model.filled(page, result) == page
    assert "| 1,024 | 192 | 6.05 |" in page
