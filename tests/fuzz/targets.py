"""What is fuzzed: from a generator to a broken input, and the code of ours that reads it."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from simclr_ray import config as cfg
from simclr_ray.augment.decode import decode_image, image_shape
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.description import describe
from simclr_ray.data.footer import MANIFEST
from simclr_ray.data.manifest import read_manifest
from simclr_ray.data.shards import read_report
from simclr_ray.data.source import Source
from simclr_ray.storage import checkpoint
from simclr_ray.storage.filesystem import filesystem
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.storage.run_status import status_of_run
from simclr_ray.studies.files import load_study
from tests.fuzz.mutate import ODD, broken_bytes, broken_json, broken_tree
from tests.ray.images import noise_png

MAX_PIXELS = 4_000_000
PRESETS = ("cifar10_study_cpu", "cifar10_resnet18", "photos_cpu", "imagenet_vit_small")
STUDIES = ("batch_size", "temperature", "projection_head")
FORMATS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 80}, "PNG": {}, "TIFF": {"compression": "tiff_lzw"},
    "WEBP": {"quality": 60}, "GIF": {}, "BMP": {}, "PPM": {}, "JPEG2000": {},
}  # fmt: skip


class Target(NamedTuple):
    """One kind of input."""

    name: str
    run: Callable[[random.Random, Path], None]  # into an empty folder of its own


def _config(draw: random.Random, folder: Path) -> None:
    tree = cfg.to_tree(Experiment.load(draw.choice(PRESETS)))
    file = folder / "c.yaml"
    if draw.random() < 0.6:
        text = json.dumps(broken_tree(draw, tree), allow_nan=True)  # YAML holds JSON
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
    else:
        file.write_bytes(broken_bytes(draw, cfg.dump_yaml(tree).encode()))
    Experiment.load(str(file))


def _overrides(draw: random.Random, folder: Path) -> None:
    leaves = list(cfg.leaves(cfg.to_tree(Experiment.load(PRESETS[0]))))
    given = []
    for _ in range(draw.randrange(1, 4)):
        value = draw.choice((str(draw.choice(ODD)), json.dumps(draw.choice(ODD))))
        given.append(f"{draw.choice(leaves)}={value}")
    if draw.random() < 0.3:
        given[0] = broken_bytes(draw, given[0].encode(errors="replace")).decode(errors="replace")
    Experiment.load(PRESETS[0], *given)


def _study(draw: random.Random, folder: Path) -> None:
    tree = cfg.to_tree(load_study(draw.choice(STUDIES)))
    file = folder / "s.yaml"
    if draw.random() < 0.7:
        text = json.dumps(broken_tree(draw, tree))
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
    else:
        file.write_bytes(broken_bytes(draw, cfg.dump_yaml(tree).encode()))
    load_study(str(file))


def _whole_parquet(draw: random.Random) -> bytes:
    images = [noise_png(index, 8) for index in range(6)]
    table = pa.table(
        {
            "id": pa.array(range(6), pa.int64()),
            "image": _column_of(draw, images),
            "label": pa.array([0, 1, 2, 0, 1, 2], pa.int64()),
        }
    )
    about = {"class_names": '["a", "b", "c"]', "huggingface": '{"info": {"features": {}}}'}
    if draw.random() < 0.5:  # JSON that others wrote
        for key, text in about.items():
            about[key] = broken_json(draw, json.loads(text)).decode(errors="replace")
    out = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(about), out, row_group_size=3)
    return out.getvalue()


def _column_of(draw: random.Random, images: list[bytes]) -> pa.Array:
    """Return images as bytes, or as a struct that holds them or names their files."""
    kind = draw.choice(("bytes", "struct", "names"))
    if kind == "bytes":
        return pa.array(images, pa.binary())
    rows = [
        {"bytes": None if kind == "names" else image, "path": f"{index}.png"}
        for index, image in enumerate(images)
    ]
    return pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def _read_all(path: Path) -> None:
    source = Source.open(str(path))
    source.labels()
    source.ids()
    for index in range(len(source.row_groups)):
        source.read_group(index)
    source.read_rows(np.arange(min(source.num_rows, 6)))
    describe(str(path))


def _parquet(draw: random.Random, folder: Path) -> None:
    data = _whole_parquet(draw)
    if draw.random() < 0.8:  # its footer, which lies at the end
        cut = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        data = data[:cut] + broken_bytes(draw, data[cut:-8]) + data[-8:]
        if draw.random() < 0.3:
            data = broken_bytes(draw, data)
    (folder / "a.parquet").write_bytes(data)
    _read_all(folder / "a.parquet")


def _manifest(draw: random.Random, folder: Path) -> None:
    whole = {
        "schema_version": 2, "num_rows": 6, "num_shards": 1, "fingerprint": "f", "class_names": [],
        "rejected": [{"id": 1, "name": "a", "reason": "b"}], "input": {}, "plan": "p",
        "has_index": False, "libraries": {}, "sizes": [1, 2, 3, 4],
        "groups": {"number": 1, "least": 1, "most": 2},
    }  # fmt: skip
    (folder / MANIFEST).write_bytes(broken_json(draw, whole))
    read_manifest(*filesystem(str(folder)), "p")


def _shard(draw: random.Random, folder: Path) -> None:
    """What a shard says of itself in its footer."""
    about = {
        "plan": b"p",
        "rejected": broken_json(draw, [[1, "a", "b"], [2, "c", "d"]]),
        "sizes": broken_json(draw, [1, 2, 3, 4]),
    }
    table = pa.table({"id": pa.array([1, 2])}).replace_schema_metadata(about)
    pq.write_table(table, folder / "part.parquet")
    fs, path = filesystem(str(folder / "part.parquet"))
    read_report(fs, path, "p")


def _run_folder(draw: random.Random, folder: Path) -> None:
    """A run's records, and its newest checkpoint by its record."""
    run = RunFolder.at(str(folder))
    record = {
        "mlflow_run_id": "i", "tracking_uri": "sqlite:///../mlflow.db", "fingerprint": "f",
        "digest": "d", "format_version": checkpoint.FORMAT_VERSION,
    }  # fmt: skip
    point = {"step": 3, "epoch": 0.5, "train/loss": 1.0, "total": 9, "time": 1.0}
    (folder / "run.json").write_bytes(broken_json(draw, record))
    (folder / "config.yaml").write_bytes(broken_bytes(draw, b"storage: /a\nname: b\n"))
    lines = [broken_json(draw, point).replace(b"\n", b" ") for _ in range(3)]
    (folder / "metrics.jsonl").write_bytes(b"\n".join(lines))
    (folder / "scores.json").write_bytes(broken_json(draw, [{"name": "knn", "top1": 0.5}]))
    name = checkpoint.new_name(3)
    checkpoint.write(folder / name, 3, {"model.w": torch.arange(6.0)}, {"digest": "d"})
    path = draw.choice(sorted((folder / name).iterdir()))
    if path.suffix == ".json":
        tree = broken_tree(draw, json.loads(path.read_text()))
        if isinstance(tree, dict) and draw.random() < 0.7:  # by one who signs it anew
            checkpoint.sign(path, tree)
        else:
            path.write_text(json.dumps(tree), encoding="utf-8", errors="surrogatepass")
    else:
        path.write_bytes(broken_bytes(draw, path.read_bytes()))
    for read in (
        lambda: RunRecord.find(run),
        lambda: status_of_run(run),
        lambda: checkpoint.read(folder / name),
        lambda: _newest(run),
    ):
        _ours_only(read)


def _newest(run: RunFolder) -> None:
    with run.newest_checkpoint():
        pass


def _weights(draw: random.Random, folder: Path) -> None:
    file = folder / draw.choice(("w.pth", "w.safetensors"))
    tensors = {"a": torch.arange(9.0), "b": torch.ones(2, 2)}
    if file.suffix == ".pth":
        torch.save(tensors, file)
    else:
        from safetensors.torch import save_file

        save_file(tensors, file)
    file.write_bytes(broken_bytes(draw, file.read_bytes()))
    checkpoint.read_file(file)


def _image(kind: str) -> Callable[[random.Random, Path], None]:
    def run(draw: random.Random, folder: Path) -> None:
        pixels = np.random.default_rng(draw.randrange(9)).integers(0, 256, (24, 32, 3), np.uint8)
        image = Image.fromarray(pixels).convert(draw.choice(("RGB", "RGB", "L")))
        out = io.BytesIO()
        image.save(out, kind, **FORMATS[kind])
        data = broken_bytes(draw, out.getvalue())
        _ours_only(lambda: image_shape(data, MAX_PIXELS))
        decode_image(data, MAX_PIXELS)

    return run


def _npy(draw: random.Random, folder: Path) -> None:
    out = io.BytesIO()
    np.save(out, np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    decode_image(broken_bytes(draw, out.getvalue()), MAX_PIXELS)


def _ours_only(read: Callable[[], object]) -> None:
    """Call a reader whose own errors are an answer, so that the next one is asked as well."""
    from tests.fuzz.run import OURS

    try:
        read()
    except OURS:
        return


TARGETS = {
    target.name: target
    for target in (
        Target("config", _config),
        Target("overrides", _overrides),
        Target("study", _study),
        Target("parquet", _parquet),
        Target("manifest", _manifest),
        Target("shard", _shard),
        Target("run_folder", _run_folder),
        Target("weights", _weights),
        Target("image_NPY", _npy),
        *(Target(f"image_{kind}", _image(kind)) for kind in FORMATS),
    )
}
