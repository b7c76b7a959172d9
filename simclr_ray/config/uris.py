"""Passwords in URIs: used, and never shown or written.

A URI may hold one (`s3://KEY:SECRET@bucket`, `http://me:SECRET@host`, `https://TOKEN@host`,
`…?password=SECRET`). In logs, in the files of a run, and in MLflow stands `***`. A file that is
read again names its URI so; the password then comes from what this process was given, else from
the environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, Final, TypeVar

HIDDEN: Final = "***"
_TOKEN: Final = re.compile(  # the user of a web server may be one, and what is no password follows
    r"(?i)(\bhttps?://)[^:/@\s\"'<>]+(?::(?:x-oauth-basic)?)?@"
)
_USER: Final = re.compile(r"(://[^:/@\s\"'<>]*):[^/\s\"'<>]*@")  # to the last @, as urllib reads it
# A secret with a slash in it. What is before a colon may be a host, and digits its port, but of a
# bucket, which has none.
_SLASHED: Final = re.compile(
    r"((?:\b(?:s3a?|gc?s|abfss?)://[^:/@\s\"'<>]*:|://(?!\[)[^:/@\s\"'<>]*:(?!\d*/)))"
    r"[^@?#\s\"'<>]{0,256}@"
)
_QUERY: Final = re.compile(
    r"(?i)([?&](?:[\w-]*(?:password|passwd|pwd|token|secret|signature"
    r"|(?:access|account|api|private|shared)[_-]?key)[\w-]*|sig)=)"
    r"[^&#\s\"'<>]+"
)
_HIDDEN_LOGIN: Final = re.compile(rf"://(?:[^:/@]*:)?{re.escape(HIDDEN)}@")
_full: dict[str, str] = {}  # of this process: what is shown -> what was given

T = TypeVar("T")


def hide_passwords(text: str) -> str:
    """Return the text with `***` for each password of a URI in it."""
    if "://" not in text:
        return text
    hidden = _USER.sub(rf"\1:{HIDDEN}@", _TOKEN.sub(rf"\1{HIDDEN}@", text))
    return _QUERY.sub(rf"\1{HIDDEN}", _SLASHED.sub(rf"\1{HIDDEN}@", hidden))


def without_passwords(value: T) -> T:
    """Return a tree of mappings, lists and scalars with `***` for each password of a URI in it."""
    hidden: Any = value
    if isinstance(value, str):
        hidden = hide_passwords(value)
    elif isinstance(value, Mapping):
        hidden = {key: without_passwords(item) for key, item in value.items()}
    elif isinstance(value, list | tuple) and type(value) in (list, tuple):
        hidden = type(value)(without_passwords(item) for item in value)
    return hidden  # type: ignore[no-any-return] # of the type of the value


def remember(uri: str) -> str:
    """Keep a URI with a password for `recall`, in this process only; return it."""
    shown = hide_passwords(uri)
    if shown != uri:
        _full[shown] = uri
    return uri


def remembered() -> dict[str, str]:
    """Return the URIs that are kept, for a process of the same run: what is shown -> the URI."""
    return dict(_full)


def recall(shown: str) -> str:
    """Return the URI that is shown so, where this process or `MLFLOW_TRACKING_URI` has it.

    Otherwise without what is hidden, so that credentials of the environment hold.
    """
    if HIDDEN not in shown:
        return shown
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if hide_passwords(uri) == shown:
        return uri
    if shown in _full:
        return _full[shown]
    place, _, query = _HIDDEN_LOGIN.sub("://", shown).partition("?")
    kept = "&".join(part for part in query.split("&") if not part.endswith(f"={HIDDEN}"))
    return f"{place}?{kept}" if kept else place
