"""A page in headless Chromium, without a network: what it shows, and what it complains of."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
NARROWEST = 500  # px that a window of Chromium's has at least
# a frame may be narrower than a window, as a telephone's screen is
FRAME = """<!doctype html><body style="margin:0">
<iframe src="{url}" style="border:0;width:{width}px;height:2000px"
  onload="document.body.dataset.wide = this.contentDocument.documentElement.scrollWidth"></iframe>
"""
FOREIGN = re.compile(r"^(?:https?:)?//")


class Opened(NamedTuple):
    """A page as the browser has it.

    Attributes:
        dom: The document, after its scripts ran.
        console: What it complained of.
        screenshot: Of its first 2,000 px.
        overflow: By how many px it is wider than it was given: then it scrolls sideways.
    """

    dom: str
    console: list[str]
    screenshot: Path
    overflow: int


def open_page(page: Path, folder: Path, width: int = 1200) -> Opened:
    """Return what a page becomes at some width, in px; names resolve to nothing."""
    program = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
    if program is None:
        # a Debian package of 300 MB, which no package index has; links are checked without it
        pytest.skip("no Chromium here: apt-get install chromium")
    shot = folder / f"{page.stem}-{width}.png"
    frame = folder / f"{page.stem}-{width}-frame.html"
    frame.write_text(FRAME.format(url=page.as_uri(), width=width))
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--window-size={max(width, NARROWEST)},2000", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr", "--v=0", "--virtual-time-budget=4000",
        f"--user-data-dir={folder / 'profile'}",
    ]  # fmt: skip

    def ask(what: str, url: str) -> subprocess.CompletedProcess[str]:
        words = [program, *options, what, url]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)

    done = ask("--dump-dom", page.as_uri())
    framed = ask("--dump-dom", frame.as_uri())
    ask(f"--screenshot={shot}", frame.as_uri())
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    (wide,) = re.findall(r'data-wide="(\d+)"', framed.stdout)
    return Opened(done.stdout, console, shot, int(wide) - width)


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []  # by the page itself
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        if "id" in values:
            self.anchors.add(str(values["id"]))
        if "name" in values and tag == "a":
            self.anchors.add(str(values["name"]))
        if "src" in values:
            self.loaded.append(str(values["src"]))
        if tag == "a" and "href" in values:
            self.links.append(str(values["href"]))
        elif "href" in values:
            self.loaded.append(str(values["href"]))


def links_of(page: Path) -> _Links:
    """Return what a page loads, links to, and can be linked to."""
    parser = _Links()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


def broken_links(pages: list[Path]) -> list[str]:
    """Return links within some pages that lead nowhere, and what they load from other hosts."""
    of = {page.resolve(): links_of(page) for page in pages}
    broken = []
    for page, links in of.items():
        broken += [f"{page.name} loads {url}" for url in links.loaded if FOREIGN.match(url)]
        for url in links.links:
            parts = urlsplit(url)
            if parts.scheme or FOREIGN.match(url):
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if not target.exists() or (
                parts.fragment and target in of and parts.fragment not in of[target].anchors
            ):
                broken.append(f"{page.name}: {url}")
    return broken
