"""HTML pages that need nothing else: templates of the package, filled in."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render_page(room: str, template: str, **values: Any) -> str:
    """Return a template of `simclr_ray/ROOM` with values in it, escaped; a missing one fails."""
    environment = Environment(
        loader=PackageLoader("simclr_ray", room),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)
