"""HTML pages that need nothing else: templates of the package, filled in."""

from __future__ import annotations

from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from simclr_ray.config.uris import hide_passwords


def render_page(room: str, template: str, **values: Any) -> str:
    """Return a template of `simclr_ray/ROOM` with values in it, escaped; a missing one fails.

    It may extend `page.html.j2` and import `parts.html.j2`, which lie beside this file. Passwords
    of URIs are hidden, and names that are no UTF-8 are shown by escapes.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("simclr_ray", r) for r in (room, "storage")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_shown,
    )
    return environment.get_template(template).render(**values)


def _shown(value: Any) -> Any:
    """Return what stands in the page; before it is escaped, where a URI's `&` is one still."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return hide_passwords(value.encode(errors="backslashreplace").decode())
