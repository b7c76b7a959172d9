"""A server gives what the encoder gives, refuses what is no image, and lives on."""

from __future__ import annotations

import io
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from simclr_ray.inference.embed import load_encoder
from simclr_ray.inference.embedding_file import Origin
from tests.formats.test_formats import HERE as FORMATS
from tests.long.browser import broken_links, open_page
from tests.ray.driver import own_ray
from tests.reference.bombs import png
from tests.shell_blocks import blocks
from tests.unit.inference.test_embedding_index import write_index

pytestmark = [pytest.mark.long, pytest.mark.ray]

MODEL = str(FORMATS / "format_3")
MOST_MIB = 2
UP_S = 120.0


class Answer(NamedTuple):
    """What a server said."""

    code: int
    body: bytes

    @property
    def tree(self) -> dict[str, object]:
        """The body, read as JSON."""
        return dict(json.loads(self.body))


class Server:
    """A `model serve` in a process of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = folder / "serve.log"
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "simclr_ray", "model", "serve", *words,
                 "--port", str(self.port), "--max-mib", str(MOST_MIB)],
                stdout=out, stderr=out, env=own_ray(), cwd=folder,
            )  # fmt: skip
        until = time.monotonic() + UP_S
        while "to end it" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.2)

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> Answer:
        url = f"http://127.0.0.1:{self.port}/{path}"
        asked = urllib.request.Request(url, data=body, headers=headers)
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return Answer(answer.status, answer.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.read())


def image(seed: int, side: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    encoder = load_encoder(MODEL)
    names = [f"{folder}/{seed}.png" for seed in range(30)]
    for seed, name in enumerate(names):
        Path(name).write_bytes(image(seed))
    origin = Origin(MODEL, encoder.digest, "", decoder=tuple(encoder.decoder))
    write_index(folder / "i.parquet", encoder.embed(names), names=names, origin=origin)
    made = Server(folder, "--index", "i.parquet")
    yield made
    made.process.send_signal(signal.SIGTERM)
    assert made.process.wait(60) == 0, made.log.read_text()


def test_an_embedding_is_the_encoder_s_alone_or_in_a_batch(server: Server) -> None:
    expected = load_encoder(MODEL).embed([image(seed) for seed in range(40)])
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda seed: server.ask("embed", image(seed)), range(40)))
    assert {answer.code for answer in answers} == {200}
    rows = np.array([answer.tree["embedding"] for answer in answers])
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-5)
    raw = server.ask("embed", image(3), Accept="application/octet-stream")
    np.testing.assert_allclose(np.frombuffer(raw.body, "f"), expected[3], rtol=1e-4, atol=1e-5)
    said = server.ask("metrics").body.decode()
    assert re.search(r'simclr_requests_total\{code="200",replica="\w+"\} 4\d', said)
    assert server.ask("model").tree["feature_dim"] == expected.shape[1]


def test_the_commands_of_the_guide_are_answered(server: Server, tmp_path: Path) -> None:
    (block,) = (b for b in blocks("docs/encoders.md") if "model serve" in b and "curl" in b)
    asked = [line for line in block.splitlines() if line.startswith("curl ")]
    Image.open(io.BytesIO(image(5))).convert("RGB").save(tmp_path / "cat.jpg")
    assert len(asked) == 2
    for line in asked:
        done = subprocess.run(
            ["bash", "-euc", line.replace(":8000/", f":{server.port}/")],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert {"embedding", "neighbours"} & json.loads(done.stdout).keys()


def test_neighbours_are_those_of_the_index(server: Server) -> None:
    near = server.ask("neighbours?num=3&images=true", image(7)).tree["neighbours"]
    assert isinstance(near, list)
    assert Path(near[0]["name"]).name == "7.png"
    assert near[0]["cosine"] == pytest.approx(1.0, abs=1e-4)
    assert all(row["image"].startswith("data:image/jpeg;base64,") for row in near)
    assert server.ask("neighbours?num=0", image(7)).code == 422


def test_what_is_no_image_gets_a_4xx_and_the_server_lives(server: Server) -> None:
    for body, code in (
        (b"no image", 422),
        (b"", 400),
        (bytes(MOST_MIB * 2**20 + 1), 413),
        (png(30_000, 30_000), 422),
        (image(0)[:200], 422),
    ):
        answer = server.ask("embed", body)
        assert answer.code == code, answer
        assert "detail" in answer.tree
    assert server.ask("nowhere").code == 404
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    assert server.ask("embed", b"--x", **form).code == 415
    assert server.ask("health").body == b"ok"
    head = urllib.request.Request(f"http://127.0.0.1:{server.port}/health", method="HEAD")
    with urllib.request.urlopen(head, timeout=60) as answer:
        assert answer.status == 200
    assert server.ask("model", Host="evil.example").code == 403
    assert server.ask("openapi.json", Host="evil.example").code == 403
    assert server.ask("embed", image(1), Host="evil.example:80").code == 403
    assert server.ask("embed", image(1)).code == 200


def test_its_pages_open_and_ask_no_other_host(server: Server, tmp_path: Path) -> None:
    for name in ("", "docs"):
        page = tmp_path / f"{name or 'index'}.html"
        page.write_bytes(server.ask(name).body)
        assert not [line for line in broken_links([page]) if "loads" in line]
        assert open_page(page, tmp_path, 400).console == []
    paths = server.ask("openapi.json").tree["paths"]
    assert isinstance(paths, dict)
    assert {"/embed", "/neighbours", "/health", "/model", "/metrics"} <= set(paths)


def test_more_than_it_keeps_up_with_gets_a_503_and_then_it_is_well(tmp_path: Path) -> None:
    small = Server(tmp_path, MODEL, "--batch", "1", "--queued", "1")
    try:
        with ThreadPoolExecutor(48) as pool:
            large = image(0, 700)
            codes = list(pool.map(lambda _: small.ask("embed", large).code, range(200)))
        assert set(codes) == {200, 503}
        assert small.ask("embed", image(0)).code == 200
    finally:
        small.process.send_signal(signal.SIGTERM)
        assert small.process.wait(60) == 0, small.log.read_text()
