"""What the address of an MLflow store says of who can use it, without MLflow or a connection."""

from __future__ import annotations

import urllib.request
from typing import Final
from urllib.parse import urlsplit

from simclr_ray.config.uris import hide_passwords

SERVER_ADVICE: Final = (
    "run an MLflow server, and set tracking.uri=http://HOST:5000 (docs/cluster.md)"
)
WITHOUT_SCHEME: Final = ("databricks", "databricks-uc")  # and no folders
PORTS: Final = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


def file_store_problem(uri: str) -> str:
    """Return why several machines cannot share a store that is a file; empty: it is none.

    Args:
        uri: Of the store; empty where none is set, and SQLite in `storage` is used.
    """
    if not uri:
        return "tracking.uri is not set: SQLite in `storage` is no store for several machines"
    if urlsplit(uri).scheme in ("sqlite", "file", "") and uri not in WITHOUT_SCHEME:
        return f"tracking.uri={hide_passwords(uri)}: a file is no store for several machines"
    return ""


def server_of(uri: str) -> tuple[str, int] | None:
    """Return host and port that a client of a store connects to; None: no address tells.

    None also behind a proxy of the environment, which connects in the client's place.
    """
    parts = urlsplit(uri)
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
