"""A dataset of the hub is read like a folder, from a stand-in that speaks its interface."""

from __future__ import annotations

import http.server
import io
import json
import re
import subprocess
import sys
import tarfile
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simclr_ray.config.experiment import ColumnsConfig, Experiment
from simclr_ray.data.inputs import open_input
from simclr_ray.data.items import Input
from simclr_ray.data.listing import list_files
from simclr_ray.data.prepare import prepare
from simclr_ray.data.source import Source
from simclr_ray.errors import DataError, HubError
from simclr_ray.storage.filesystem import filesystem
from simclr_ray.train.image_folders import resolve_folders

HUB = re.compile(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?$")


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers that reading a dataset takes; `root` holds owner/name folders."""

    root: Path
    requests: list[str]

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length).decode()
        form = json.loads(body) if body.startswith("{") else urllib.parse.parse_qs(body)
        match = HUB.match(urllib.parse.urlsplit(self.path).path)
        assert match
        assert match[2] == "paths-info"
        folder = self.root / match[1]
        paths = [p for p in form["paths"] if (folder / p).exists()]
        self.answer([self.entry(folder, folder / p) for p in paths])

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.requests.append(path)
        if match := HUB.match(path):
            folder = self.root / match[1]
            if not folder.exists():
                self.refuse(401, "RepoNotFound", "Repository not found")
            elif match[3] not in (None, "main", "v1"):
                self.refuse(404, "RevisionNotFound", "Invalid rev id")
            elif match[2] == "tree":
                deep = "recursive=true" in self.path.lower()
                below = folder / (match[4] or "")
                found = sorted(below.rglob("*") if deep else below.glob("*"))
                self.answer([self.entry(folder, p) for p in found])
            else:
                self.answer({"id": match[1], "sha": "0" * 40, "siblings": []})
            return
        match = re.match(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.*)", path)
        assert match, path
        if match[1].startswith("gated/"):
            self.refuse(403, "GatedRepo", "Access to this dataset is restricted")
            return
        content = (self.root / match[1] / match[2]).read_bytes()
        first, last = 0, len(content) - 1
        if span := re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(span[1]), min(int(span[2]), last)
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[first : last + 1])

    def entry(self, folder: Path, path: Path) -> dict[str, Any]:
        kind = "directory" if path.is_dir() else "file"
        size = 0 if path.is_dir() else path.stat().st_size
        return {"type": kind, "oid": "0", "size": size, "path": path.relative_to(folder).as_posix()}

    def answer(self, tree: object) -> None:
        body = json.dumps(tree).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str, why: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", why)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a hub that is asked instead of the real one."""
    answers = type("Answers", (Hub,), {"root": tmp_path / "hub", "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    filesystem.cache_clear()
    yield tmp_path / "hub"
    filesystem.cache_clear()
    server.shutdown()
    server.server_close()
    thread.join()


def opened(uri: str, split: str = "") -> Input:
    options: dict[str, Any] = {"split": split, "root": "", "num_images": 0, "seed": 0}
    return open_input(uri, columns=ColumnsConfig(), **options)


def png(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(out, "PNG")
    return out.getvalue()


def write(path: Path, numbers: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {"label": {"names": ["zebra", "ant", "fox"], "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": names}})}
    images = [{"bytes": png(n), "path": f"{n}.png"} for n in numbers]
    table = pa.table({"image": images, "label": [n % 3 for n in numbers]})
    pq.write_table(table.replace_schema_metadata(about), path, row_group_size=2)


def test_parquet_of_the_hub_is_a_dataset(hub: Path) -> None:
    write(hub / "owner/name/data/train-00000-of-00002.parquet", [0, 1, 2])
    write(hub / "owner/name/data/train-00001-of-00002.parquet", [3, 4])
    (hub / "owner/name/README.md").write_text("---\n---\n")
    for uri in ("hf://datasets/owner/name", "hf://datasets/owner/name@v1/data"):
        source = Source.open(uri)
        assert source.class_names == ("zebra", "ant", "fox")
        assert source.labels().tolist() == [0, 1, 2, 0, 1]
        assert [i for g in range(3) for i in source.read_group(g).images] == [*map(png, range(5))]
    one = Source.open("hf://datasets/owner/name/data/train-00001-of-00002.parquet")
    assert one.num_rows == 2


def test_images_of_the_hub_are_of_a_split(hub: Path) -> None:
    for number, name in enumerate(("train/a/0", "train/b/1", "test/b/2")):
        path = hub / "owner/folders" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    uri = "hf://datasets/owner/folders"
    with pytest.raises(DataError, match=rf"name one, as in {uri}#train"):
        opened(uri)
    for given in (opened(f"{uri}#train"), opened(uri, "training")):
        assert given.class_names == ("a", "b")
        items = sorted(item for part in given.parts(9, 0) for item in part.read())
        assert [(i.encoded, i.label) for i in items] == [(png(0), 0), (png(1), 1)]


def test_tar_shards_of_the_hub_are_read_in_order(hub: Path) -> None:
    (hub / "owner/tars").mkdir(parents=True)
    with tarfile.open(hub / "owner/tars/x-000.tar", "w") as tar:
        for n in range(3):
            for ending, content in (("png", png(n)), ("cls", str(n).encode())):
                member = tarfile.TarInfo(f"{n}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for uri in ("hf://datasets/owner/tars", "hf://datasets/owner/tars/x-{000..000}.tar"):
        given = opened(uri)
        items = sorted(item for part in given.parts(2, 0) for item in part.read())
        assert [(i.encoded, i.label) for i in items] == [(png(n), n) for n in range(3)]


def test_what_is_not_there_or_not_for_everyone_is_one_line(hub: Path) -> None:
    write(hub / "gated/name/train.parquet", [0])
    write(hub / "owner/name/train.parquet", [0])
    for uri, why in (
        ("hf://datasets/owner/none", "no such dataset on the hub, or no access: log in"),
        ("hf://datasets/owner/name@old", "no such dataset on the hub"),
        ("hf://datasets/owner/name/data", "no such file or folder"),
        ("hf://datasets/gated/name", "gated or private: log in"),
        ("hf://datasets", "cannot be listed"),
    ):
        with pytest.raises(DataError, match=why) as error:
            Source.open(uri)
        assert "\n" not in str(error.value)


def test_a_hub_that_does_not_answer_is_one_line(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    filesystem.cache_clear()
    uri = "hf://datasets/owner/name"
    data = {"train": uri}
    experiment = Experiment.model_validate({"name": "x", "data": data})
    for door in (
        lambda: Source.open(uri),
        lambda: Source.open(f"{uri}#train"),
        lambda: opened(uri),
        lambda: opened(f"{uri}#train"),
        lambda: opened(f"{uri}/x-{{0..3}}.tar"),
        lambda: resolve_folders(experiment),
        lambda: prepare(uri, "out"),
        lambda: prepare("shapes", uri, num_images=1),
        lambda: list_files(*filesystem(uri), uri),
        lambda: filesystem(uri)[0].get_file_info(uri),
        lambda: filesystem(uri)[0].open_input_file("datasets/owner/name/x"),
    ):
        with pytest.raises(DataError, match="the hub cannot be asked") as error:
            door()
        assert "\n" not in str(error.value)


def test_nothing_is_written_to_the_hub(hub: Path) -> None:
    fs, path = filesystem("hf://datasets/owner/name")
    with pytest.raises(OSError, match="not written to") as error:
        fs.create_dir(path)
    assert isinstance(error.value, HubError)  # a message and exit code 2, where nobody meets it
    with pytest.raises(HubError, match="not written to"):
        fs.open_output_stream(f"{path}/x")


def test_without_the_package_the_extra_is_named() -> None:
    code = """
import sys
sys.modules["huggingface_hub"] = None
from simclr_ray.cli.main import main
sys.argv = ["simclr-ray", "prepare", "hf://datasets/owner/name", "out"]
main()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].endswith("install simclr-ray[hf]")
