"""What cannot be served is refused in a line, before Ray is started."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import numpy as np
import pytest

from simclr_ray.cli.serve import _hosts
from simclr_ray.errors import ConfigError
from tests.formats.test_formats import HERE as FORMATS
from tests.unit.cli.in_process import enter, run
from tests.unit.inference.test_embedding_index import write_index


def test_what_cannot_be_served_is_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_index(tmp_path / "i.parquet", np.ones((3, 5), np.float32))
    enter(tmp_path, monkeypatch)
    model = str(FORMATS / "format_3")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        used = run(["model", "serve", model, "--port", port], capsys)
    assert used.code == 2
    assert used.problems == [
        f"error: --port: 127.0.0.1:{port} cannot be listened on: Address already in use"
    ]
    assert run(["model", "serve"], capsys).problems == [
        "error: RUN_OR_MODEL: is missing; or give --index"
    ]
    (problem,) = run(["model", "serve", "none"], capsys).problems
    assert problem.startswith("error: RUN_OR_MODEL: none holds no encoder.json")
    (problem,) = run(["model", "serve", model, "--index", "i.parquet"], capsys).problems
    assert "was made by another encoder (embeddings have 5 numbers" in problem
    monkeypatch.setitem(sys.modules, "simclr_ray.inference.serving", None)
    (problem,) = run(["model", "serve", model], capsys).problems
    assert "needs Ray Serve: pip install 'simclr-ray[serve]'" in problem


@pytest.mark.parametrize(
    ("given", "host"),
    [
        ("Photos.Example", "photos.example"),
        ("a.b:8443", "a.b"),
        ("[2001:DB8::5]:80", "2001:db8::5"),
        ("2001:DB8::5", "2001:db8::5"),
        ("a", "a"),
    ],
)
def test_an_allowed_host_is_as_urls_have_it(given: str, host: str) -> None:
    assert _hosts("127.0.0.1", [given])[-1] == host
    everywhere = "0.0.0.0"  # noqa: S104 - bound to nothing here
    assert _hosts(everywhere, [given, "b"]) == (host, "b")  # and by no other
    assert _hosts(everywhere, []) == ()


def test_an_allowed_host_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="--allowed-host: "):
        _hosts("127.0.0.1", ["[::1"])
