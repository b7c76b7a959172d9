"""HTML pages that need nothing else: templates of the package, filled in."""

from __future__ import annotations

from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined


def render_page(room: str, template: str, **values: Any) -> str:
    """Return a template of `simclr_ray/ROOM` with values in it, escaped; a missing one fails.

    It may extend `page.html.j2` and import `parts.html.j2`, which lie beside this file.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("simclr_ray", r) for r in (room, "storage")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)
