"""What the address of an MLflow store says of who can use it, without MLflow or a connection."""

from __future__ import annotations

import re
import urllib.request
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from simclr_ray.config.uris import hide_passwords

SERVER_ADVICE: Final = (
    "run an MLflow server, and set tracking.uri=http://HOST:5000 (docs/cluster.md)"
)
WITHOUT_SCHEME: Final = ("databricks", "databricks-uc")  # and no folders
# what MLflow opens as it is; others are of its plugins
STORES: Final = re.compile(
    r"(https?|(postgresql|mysql|mssql)(\+\w+)?|databricks(-uc)?|uc)://."
    r"|sqlite:///.|file:.|databricks(-uc)?$"
)
PORTS: Final = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


def unknown_store_problem(uri: str) -> str:
    """Return why MLflow has no such store; empty: it has, or a plugin or a folder may be one.

    Args:
        uri: Of the store.
    """
    shown = hide_passwords(uri)
    try:
        urlsplit(uri)
    except ValueError as error:  # brackets that do not close
        return f"got {shown}; {error}"
    if uri.startswith("sqlite:///") and "?" in uri:  # more than SQLAlchemy reads the file's name
        return f"got {shown}; of SQLite without options: {shown.partition('?')[0]}"
    if STORES.match(uri) or entry_points(group="mlflow.tracking_store") or _is_folder(uri):
        return ""
    scheme = uri.partition("://")[0]
    if "://" in uri and scheme != "sqlite":
        return f"got {shown}; MLflow has no {scheme}:// store"
    if re.fullmatch(r"[\w.-]+:\d+", uri):
        return f"got {shown}; a server is http://{uri}"
    path = shown.removeprefix("sqlite:").lstrip("/")
    return f"got {shown}; a file is sqlite:///{path}, a server http://HOST:PORT"


def _is_folder(uri: str) -> bool:
    try:
        return Path(uri).is_dir()
    except (OSError, ValueError):  # too long for a name, or none
        return False


def file_store_problem(uri: str) -> str:
    """Return why several machines cannot share a store that is a file; empty: it is none.

    Args:
        uri: Of the store; empty where none is set, and SQLite in `storage` is used.
    """
    if not uri:
        return "tracking.uri is not set: SQLite in `storage` is no store for several machines"
    scheme = uri.partition(":")[0] if ":" in uri else ""
    if scheme in ("sqlite", "file", "") and uri not in WITHOUT_SCHEME:
        return f"tracking.uri={hide_passwords(uri)}: a file is no store for several machines"
    return ""


def server_of(uri: str) -> tuple[str, int] | None:
    """Return host and port that a client of a store connects to; None: no address tells.

    None also behind a proxy of the environment, which connects in the client's place.
    """
    try:
        parts = urlsplit(uri)
    except ValueError:  # brackets that do not close
        return None
    scheme = parts.scheme.partition("+")[0]
    if scheme not in PORTS or not parts.hostname:
        return None
    is_proxied = scheme in urllib.request.getproxies()
    if is_proxied and not urllib.request.proxy_bypass(parts.hostname):
        return None
    try:
        return parts.hostname, parts.port or PORTS[scheme]
    except ValueError:  # no number
        return None
