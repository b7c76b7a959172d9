"""The documentation builds without a warning, and its pages open without a complaint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.long.browser import broken_links, links_of, open_page
from tests.shell_blocks import ROOT

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", str(ROOT / "docs"), str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_no_link_is_broken_and_nothing_comes_from_another_host(site: Path) -> None:
    assert broken_links(sorted(site.rglob("*.html"))) == []


def test_every_page_of_the_docs_can_be_reached_from_the_first(site: Path) -> None:
    reached, open_ones = set(), [site / "index.html"]
    while open_ones:
        page = open_ones.pop().resolve()
        if page in reached or page.suffix != ".html" or not page.is_file():
            continue
        reached.add(page)
        urls = [url.partition("#")[0] for url in links_of(page).links if "://" not in url]
        open_ones += [page.parent / url for url in urls]
    built = {p.resolve() for p in site.rglob("*.html") if "report" not in p.name}
    left = {p.relative_to(site.resolve()).as_posix() for p in built - reached}
    tables = {name for name in left if name.startswith("studies/") and "/results" in name}
    assert left - tables <= {"search.html", "genindex.html"}


@pytest.mark.parametrize("name", ["index", "start", "choosing", "findings", "reference/keys"])
@pytest.mark.parametrize("width", [1200, 400])
def test_a_page_opens_without_a_complaint(
    name: str, width: int, site: Path, tmp_path: Path
) -> None:
    opened = open_page(site / f"{name}.html", tmp_path, width)
    assert opened.console == []
    assert "simclr-ray" in opened.dom
    with Image.open(opened.screenshot) as shot:
        assert len(shot.convert("L").getcolors(256) or []) > 20
