"""Lines of the log as JSON: the same keys from the command line and from Ray's workers."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from ray._common.formatters import JSONFormatter

from simclr_ray.config import logging as config_logging
from simclr_ray.distributed import ray_logging
from simclr_ray.errors import ConfigError

KEYS = ["time", "level", "rank", "node", "run", "message"]


@pytest.fixture
def as_json(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ask for JSON, and forget afterwards what this process is called."""
    monkeypatch.setenv(config_logging.FORMAT_VARIABLE, "json")
    monkeypatch.setattr(config_logging, "_process", dict(config_logging._process))
    before = {handler: list(handler.filters) for handler in logging.getLogger().handlers}
    yield
    for handler, filters in before.items():
        handler.filters[:] = filters


def test_text_is_the_default_and_other_formats_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, is_json in (("", False), ("text", False), ("json", True)):
        monkeypatch.setenv(config_logging.FORMAT_VARIABLE, value)
        config_logging.check_format()
        assert config_logging.is_json() == is_json
        assert bool(ray_logging.options()) == is_json
    monkeypatch.setenv(config_logging.FORMAT_VARIABLE, "yaml")
    with pytest.raises(ConfigError, match="SIMCLR_RAY_LOG_FORMAT: got 'yaml', not text or json"):
        config_logging.check_format()


@pytest.mark.usefixtures("as_json")
def test_a_line_has_time_level_rank_node_run_and_no_password() -> None:
    first = json.loads(config_logging.json_line("at s3://me:secret@bucket", "WARNING", 86_400.5))
    assert list(first) == KEYS
    assert first["message"] == "at s3://me:***@bucket"
    assert (first["time"], first["level"]) == ("1970-01-02T00:00:00.500+00:00", "WARNING")
    assert (first["rank"], first["node"], first["run"]) == (None, platform.node(), None)
    config_logging.name_process("run-0", 2)
    config_logging.name_process("run-1", 3)
    named = json.loads(config_logging.json_line("two\nlines"))
    assert (named["rank"], named["run"], named["message"]) == (3, "run-1", "two\nlines")
    datetime.fromisoformat(named["time"])


@pytest.mark.usefixtures("as_json")
def test_a_process_is_called_by_a_run_only_while_it_runs() -> None:
    config_logging.name_process("outer", 1)
    with contextlib.suppress(ConfigError), config_logging.process_named("inner"):
        assert json.loads(config_logging.json_line("now"))["run"] == "inner"
        raise ConfigError([])
    after = json.loads(config_logging.json_line("later"))
    assert (after["run"], after["rank"]) == ("outer", 1)


@pytest.mark.usefixtures("as_json")
def test_what_ray_writes_of_a_worker_has_the_same_keys() -> None:
    of_ray = logging.StreamHandler(stream := io.StringIO())
    of_ray.setFormatter(JSONFormatter())
    logging.getLogger().addHandler(of_ray)
    try:
        config_logging.name_process("run-1", 3)
        logging.getLogger("others").warning("row %d", 5, extra={"run": "theirs"})
        logging.getLogger("others").warning("row %d", 5)
    finally:
        logging.getLogger().removeHandler(of_ray)
    theirs, line = map(json.loads, stream.getvalue().splitlines())
    assert theirs["run"] == "theirs", "fields of others are theirs"
    assert {key: line[key] for key in KEYS if key != "time"} == {
        "level": "WARNING", "rank": 3, "node": platform.node(), "run": "run-1", "message": "row 5",
    }  # fmt: skip
    datetime.fromisoformat(line["time"])


def test_every_line_of_a_command_on_stderr_is_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "simclr_ray", "status", str(tmp_path)]
    for value, level, code in (("json", "ERROR", 2), ("yaml", None, 2)):
        done = subprocess.run(
            command, env=os.environ | {config_logging.FORMAT_VARIABLE: value}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code
        (line,) = done.stderr.splitlines()
        if level is None:
            assert line.startswith("error: SIMCLR_RAY_LOG_FORMAT: got 'yaml'")
        else:
            said = json.loads(line)
            assert (said["level"], list(said)) == (level, KEYS)
            assert "is no run folder" in said["message"]
