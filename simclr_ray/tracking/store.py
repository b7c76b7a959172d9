"""What an MLflow store is called, what it takes, and how it is kept quiet. Imports no MLflow.

The default store is SQLite inside the storage folder, and its experiments get an absolute artifact
location: SQLite's own default is `./mlruns` *relative to the working directory*, and a Ray worker's
is somewhere in the session folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

from simclr_ray.config.logging import held_back
from simclr_ray.config.tracking_uri import unknown_store_problem
from simclr_ray.config.uris import hide_passwords, recall, remember
from simclr_ray.errors import ConfigError, ConfigIssue

URI_VARIABLE: Final = "MLFLOW_TRACKING_URI"
REGISTRY_VARIABLE: Final = "MLFLOW_REGISTRY_URI"
DATABASE: Final = "mlflow.db"
ARTIFACTS: Final = "mlartifacts"
COPY_IT_TOO: Final = (
    f"; a run or study that is copied takes {DATABASE} and {ARTIFACTS} of its storage along"
)
CLUSTER_TAG: Final = "cluster_doctor"  # of runs and versions: what was found on their cluster

# mlflow.utils.validation of MLflow 3; it refuses most of what is longer instead of cutting it.
MAX_PER_BATCH: Final = 100  # parameters or tags
MAX_METRICS_PER_BATCH: Final = 1000
MAX_RUNS: Final = 5000  # of one search
MAX_PARAM_CHARS: Final = 6000
MAX_TAG_CHARS: Final = 5000  # 8000 in 3.x; servers of 2.x took 5000
MAX_KEY_CHARS: Final = 250
MAX_DIGEST_CHARS: Final = 36
MAX_DATASET_NAME_CHARS: Final = 500

_RESERVED_ALIAS: Final = re.compile(r"(?i:latest|v\d+)")  # the registry refuses these names
_ALIAS: Final = re.compile(r"[\w\-]{1,255}")
# the registry refuses / and :, `models:/NAME@ALIAS` holds neither @ nor what a URI escapes, and an
# apostrophe would end the name in a filter, by which versions are searched
_NOT_IN_NAMES: Final = re.compile(r"[/:@%?#\\']|[^ -~\w]")

# MLflow's own defaults are 7 retries with doubling waits and 120 s per request: minutes before a
# mistyped address is reported. Used while a store is opened; a user's own values win.
FIRST_CONTACT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
# A library prints no links on its host's stdout, reports no migrations, and makes no calls home on
# its users' behalf; set before the import, since MLflow reads the level once.
MLFLOW_ENVIRONMENT = {
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

# What a store says that may take the same later: connections, locks, overload, its own defects.
_FOR_NOW: Final = frozenset(
    {
        "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED",
        "DEADLINE_EXCEEDED", "ABORTED",
    }
)  # fmt: skip
_STATUS_FOR_NOW: Final = (408, 429)
_SERVER_FAILS: Final = 500
# While a run is delivered: the sender repeats what failed, and unlike MLflow it can be stopped.
FEW_RETRIES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
# Libraries that log a failed request with its traceback; the sender logs it in one line.
LOGGERS: Final = ("mlflow", "alembic", "urllib3", "sqlalchemy")

T = TypeVar("T")


class RegisteredEncoder(NamedTuple):
    """One version in the model registry.

    Attributes:
        name: Of the model.
        version: Its number.
        uri: `models:/name/version`.
        run_id: MLflow's run that it is of.
        alias: That was moved to it when it was registered; empty: none was.
        refusal: Why the alias that was asked for stays where it is; empty: it does not.
    """

    name: str
    version: int
    uri: str
    run_id: str
    alias: str = ""
    refusal: str = ""

    @property
    def address(self) -> str:
        """What it is asked for by: the alias that was moved to it, else its number."""
        return f"models:/{self.name}@{self.alias}" if self.alias else self.uri


def store_uri(setting: str = "", storage: str = "runs") -> str:
    """Return the tracking URI: `setting`, else $MLFLOW_TRACKING_URI, else SQLite in `storage`.

    A relative SQLite path becomes absolute: workers have other working directories.

    Raises:
        ConfigError: MLflow has no such store, or the default is asked of a storage that is no
            local folder.
    """
    uri = recall(remember(setting or os.environ.get(URI_VARIABLE, "")))
    if uri:
        _check_scheme(uri, "tracking.uri" if setting else URI_VARIABLE)
        database = sqlite_file(uri)
        return f"sqlite:///{database}" if database is not None else uri
    if storage.startswith("file://"):
        folder = Path(url2pathname(urlsplit(storage).path))
    elif "://" not in storage:
        folder = Path(storage).expanduser().resolve()
    else:
        problem = (
            f"is empty, and storage {storage} is no local folder for the default SQLite store; "
            f"set it (or ${URI_VARIABLE}) to an MLflow server"
        )
        raise ConfigError.of("tracking.uri", problem)
    return f"sqlite:///{folder / DATABASE}"


def registry_uri(uri: str) -> str:
    """Return the URI of the model registry beside a store: $MLFLOW_REGISTRY_URI, else the store's.

    Raises:
        ConfigError: MLflow has no such store.
    """
    registry = recall(remember(os.environ.get(REGISTRY_VARIABLE, "")))
    if not registry:
        return uri
    _check_scheme(registry, REGISTRY_VARIABLE)
    database = sqlite_file(registry)
    return f"sqlite:///{database}" if database is not None else registry


def _check_scheme(uri: str, key: str) -> None:
    """Raise `ConfigError` for a URI that no store of MLflow has."""
    if problem := unknown_store_problem(uri):
        raise ConfigError.of(key, problem)


def sqlite_file(uri: str) -> Path | None:
    """Return the absolute path of a SQLite URI's file, or None for other stores."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).resolve()


def check_there(uri: str, remedy: str = COPY_IT_TOO) -> None:
    """Raise `ConfigError` for a SQLite store without its file, which MLflow would make, empty.

    Args:
        uri: Of the store.
        remedy: What to do; else that of a run or study, which was copied without its store.
    """
    database = sqlite_file(uri)
    if database is not None and not database.is_file():
        problem = f"no MLflow store at {uri}: there is no file {database}{remedy}"
        raise ConfigError.of("", problem)


def check_model(name: str, alias: str | None) -> None:
    """Raise `ConfigError` for what no model or alias, if any, can be called, or no URI can hold."""
    issues = []
    wrong = _NOT_IN_NAMES.search(name)
    if wrong:
        problem = f"{wrong[0]!r} cannot stand in {name!r}: it is asked for by models:/NAME@ALIAS"
        issues.append(ConfigIssue("registry.name", problem))
    elif not name.strip() or name != name.strip() or len(name) > MAX_KEY_CHARS:
        problem = f"got {name!r}; 1 to {MAX_KEY_CHARS} characters, no space at either end"
        issues.append(ConfigIssue("registry.name", problem))
    if alias is not None and _RESERVED_ALIAS.fullmatch(alias):
        problem = (
            f"{alias!r} is reserved by MLflow, where `models:/name/latest` and `models:/name/3` "
            "work without any alias; choose another, such as `newest`"
        )
        issues.append(ConfigIssue("registry.alias", problem))
    elif alias is not None and not _ALIAS.fullmatch(alias):
        issues.append(ConfigIssue("registry.alias", f"got {alias!r}; letters, digits, - and _"))
    if issues:
        raise ConfigError(issues)


# SQLite's words and the system's; PostgreSQL's are the system's
NO_SPACE: Final = ("database or disk is full", "No space left on device", "Disk quota exceeded")


def reason_of(error: Exception) -> str:
    """Return one line that says what MLflow's exception means to a user."""
    text = str(error)
    if "Max retries exceeded" in text or "Connection refused" in text:
        return "no answer; is the server running, and tracking.uri right?"
    if any(sign in text for sign in NO_SPACE):
        return "the disk that holds it is full; make room there"
    first = hide_passwords(next((line for line in text.splitlines() if line.strip()), ""))
    return f"{type(error).__name__}: {first[:400]}"


def is_for_now(error: Exception) -> bool:
    """Return whether what failed may work later: no answer, a lock, an overload."""
    if any(sign in str(error) for sign in NO_SPACE):
        return True
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status:  # of requests' error, which is an OSError whatever the server says
        return status in _STATUS_FOR_NOW or status >= _SERVER_FAILS
    code = getattr(error, "error_code", None)
    if code is not None:
        return code in _FOR_NOW
    return isinstance(error, OSError) or type(error).__name__ in (
        "OperationalError",
        "TimeoutError",
    )


def key_of(text: str) -> str:
    """Return a key that MLflow takes: letters, digits and `_-./ :`, at most 250 characters."""
    return re.sub(r"[^\w\-./ :]", "_", text)[:MAX_KEY_CHARS]


def shortened(text: str, most: int) -> str:
    """Return `text` in at most `most` characters, saying how long it was when it is cut."""
    note = f" ... ({len(text)} characters)"
    return text if len(text) <= most else text[: most - len(note)] + note


def params_of(params: Mapping[str, object]) -> dict[str, str]:
    """Return parameters that MLflow takes: keys cleaned, values as text, long ones cut."""
    shown = {key: hide_passwords(str(value)) for key, value in params.items()}
    return {key_of(key): shortened(value, MAX_PARAM_CHARS) for key, value in shown.items()}


def tags_of(tags: Mapping[str, str]) -> dict[str, str]:
    """Return tags that MLflow takes: keys cleaned, long values cut."""
    shown = {key: hide_passwords(value) for key, value in tags.items()}
    return {key_of(key): shortened(value, MAX_TAG_CHARS) for key, value in shown.items()}


def batches(items: Sequence[T], most: int) -> Iterator[Sequence[T]]:
    """Return consecutive runs of at most `most` items; none for no items."""
    return (items[at : at + most] for at in range(0, len(items), most))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what MLflow says on import, migration and saving: none of it is for our users.

    Its imports raise deprecation warnings of its own dependencies, saving warns about type hints
    and environments that we set on purpose, and migrations are logged revision by revision. Not
    used around the logging of metrics: `catch_warnings` acts on all threads of the process.
    """
    with warnings.catch_warnings(), held_back(("mlflow", "alembic"), logging.ERROR):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def first_contact() -> Iterator[None]:
    """Fail within seconds at a wrong address, unless the user has set other limits."""
    with _unless_set(FIRST_CONTACT):
        yield


@contextlib.contextmanager
def delivering() -> Iterator[None]:
    """Leave retries and words about failures to a sender while the block runs.

    Both are of the whole process: enter it in the main thread, around the sender's life.
    """
    with _unless_set(FEW_RETRIES), held_back(LOGGERS, logging.CRITICAL + 1):
        yield


@contextlib.contextmanager
def few_retries() -> Iterator[None]:
    """Leave retries to the caller while the block runs, unless the user has set their number."""
    with _unless_set(FEW_RETRIES):
        yield


@contextlib.contextmanager
def _unless_set(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment that have no value, while the block runs."""
    added = {k: v for k, v in variables.items() if k not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for variable in added:
            os.environ.pop(variable, None)
