"""The token of a Ray that is started on this machine.

Ray's servers listen on all addresses of the machine, and run the code of whoever connects; with a
token they refuse who does not send it. That of a local cluster is drawn for it alone, and stands in
the environment of this process and of those that it starts, in no file: Ray's own default is one
for all clusters in ~/.ray, readable by everyone.
"""

from __future__ import annotations

import os
import secrets
from typing import Any, Final

MODE: Final = "RAY_AUTH_MODE"
TOKEN: Final = "RAY_AUTH_TOKEN"  # noqa: S105 - the name of it
PATH: Final = "RAY_AUTH_TOKEN_PATH"
_created: dict[str, str] = {}  # what stands in the environment by `create`


def create() -> None:
    """Have the cluster that starts next ask for a new token.

    A mode that is set already is kept, and so is a token: by that of `RAY_AUTH_TOKEN` or
    `RAY_AUTH_TOKEN_PATH` other processes can join the cluster.
    """
    remove()
    if MODE not in os.environ:
        _created[MODE] = "token"
    if os.environ.get(MODE, "token").lower() == "token" and not {TOKEN, PATH} & set(os.environ):
        _created[TOKEN] = secrets.token_hex(32)
    os.environ.update(_created)
    _read_again()


def remove() -> None:
    """Take what `create` has set out of the environment: another cluster has a token of its own."""
    for key, value in _created.items():
        if os.environ.get(key) == value:
            del os.environ[key]
    if _created:
        _created.clear()
        _read_again()


def _read_again() -> None:
    """Have Ray read its mode and token anew: it does once, when it is imported or first asked."""
    from ray import _raylet  # compiled, and without types

    internals: Any = _raylet
    internals.Config.initialize("")
    internals.AuthenticationTokenLoader.instance().reset_cache()
