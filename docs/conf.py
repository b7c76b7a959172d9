"""The documentation site: `make docs` builds it into `build/docs`, with warnings as errors.

Fonts and scripts are the theme's own, so that a page asks no other host for anything.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))

import reference  # noqa: E402 - beside this file

from simclr_ray.storage.provenance import version_of  # noqa: E402

project = "simclr-ray"
author = "the simclr-ray developers"
project_copyright = author
release = version_of("simclr-ray")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["studies/**/reading.md"]
html_theme = "furo"
html_title = f"simclr-ray {release}"
html_show_sourcelink = False
html_copy_source = False
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
suppress_warnings = ["myst.header"]  # a page may begin below its first level

reference.write(HERE)


def setup(app: Sphinx) -> None:
    """Let tables of studies be found by links alone, and not in the menu."""

    def out_of_the_menu(_: Sphinx, name: str, source: list[str]) -> None:
        if name.startswith("studies/") and name.endswith("/results"):
            source[0] = f"---\norphan: true\n---\n{source[0]}"

    app.connect("source-read", out_of_the_menu)
