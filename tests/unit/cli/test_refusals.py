"""What a new user gets wrong: a line each that names what is wrong and what to do, and exit code 2.

Before Ray starts, and with nothing left behind; `tests/unit/studies/test_study_refusals.py` has
those in study files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simclr_ray.storage.filesystem import filesystem
from simclr_ray.storage.space import Space
from simclr_ray.train import disk_space
from tests.formats.test_formats import HERE as FORMATS
from tests.ray.images import write_shapes
from tests.unit.cli.in_process import enter, run
from tests.unit.cli.test_app import ROOT

CONFIG = """\
name: mine
data: {train: train.parquet, test: test.parquet}
batch_size: 16
epochs: 2
encoder: {name: resnet, depth: 10, width: 0.125, stem: strided}
"""
FILES = {
    "good.yaml": CONFIG,
    "tab.yaml": "name: mine\ndata:\n\ttrain: train.parquet\n",
    "twice.yaml": f"{CONFIG}epochs: 3\n",
    "open.yaml": "name: mine\ndata: {train: train.parquet\nepochs: 2\n",
    "list.yaml": "- name\n- data\n",
    "date.yaml": f"{CONFIG}seed: 2024-01-01\n",
    "loop.yaml": "name: &a [*a]\n",
    "quoted.yaml": CONFIG.replace("epochs: 2", "epochs: '2'"),
    "solo.yaml": "name: simclr\nmethod: simclr\nbackbone: {name: resnet18}\nmax_epochs: 1000\n"
    "data: {dataset: cifar10}\noptimizer: {name: lars, lr: 0.4}\nscheduler: {name: warmup}\n",
    "code.yaml": f"{CONFIG}loss: {{name: import, path: 'mine:MyLoss'}}\n",
    "text.txt": "hello",
    "weights.pth": "no weights",
}
RUN = "runs/small-0123"
OTHER = "runs/mine-01234567"  # of the name in CONFIG
BUCKET = "s3://key:secret@b/x?endpoint_override=127.0.0.1:9&scheme=http&region=x"  # of nobody
PRETRAIN = ["pretrain", "good.yaml"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what a new user may have: images, configs, a run."""
    folder = tmp_path_factory.mktemp("user")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "latin.yaml").write_bytes(b"name: \xff\n")
    write_shapes(folder / "train.parquet", 40)
    write_shapes(folder / "test.parquet", 20)
    pq.write_table(pa.table({"x": [1, 2]}), folder / "numbers.parquet")
    (folder / "images" / "cat").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (24, 24), (number, 0, 0)).save(folder / f"images/cat/{number}.png")
    for split in ("train", "test"):
        (folder / "splits" / split / "cat").mkdir(parents=True)
        shutil.copy(folder / "images/cat/0.png", folder / "splits" / split / "cat")
    (folder / "empty").mkdir()
    (folder / "folder.parquet").mkdir()
    (folder / "folder.yaml").mkdir()
    shutil.copytree(FORMATS / "format_2", folder / RUN)
    (folder / OTHER).mkdir()
    (folder / OTHER / "experiment.yaml").write_text(CONFIG)
    shutil.copy(FORMATS / "format_3" / "run.json", folder / OTHER)
    return folder


@pytest.fixture(autouse=True)
def _there(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(files, monkeypatch)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    filesystem.cache_clear()


REFUSED: list[tuple[list[str], list[str]]] = [
    # verbs, options, arguments
    (["pretrian", "good.yaml"], ["pretrian", "'pretrain'"]),
    (["study", "rnu", "losses"], ["rnu", "'run'", "study --help"]),
    (["pretrain"], ["PRESET_OR_YAML", "pretrain --help"]),
    ([*PRETRAIN, "--epochs=3"], ["--epochs", "epochs=VALUE"]),
    ([*PRETRAIN, "--dryrun"], ["--dryrun", "--dry-run"]),
    (["doctor", "--workers", "two"], ["--workers", "integer"]),
    # the form of overrides
    ([*PRETRAIN, "epochs", "=", "3"], ["epochs = 3", "key.path=value", "without spaces"]),
    ([*PRETRAIN, "epochs= ", "3"], ["3", "without spaces"]),
    ([*PRETRAIN, "epochs =3"], ["epochs =3", "without spaces"]),
    ([*PRETRAIN, "epochs:3"], ["epochs:3", "key.path=value"]),
    ([*PRETRAIN, ""], ["''", "key.path=value"]),
    ([*PRETRAIN, "data.train=[a"], ["data.train=[a", "line 1, column 3"]),
    # keys and values
    ([*PRETRAIN, "batchsize=3"], ["batchsize", "'batch_size'"]),
    ([*PRETRAIN, "loss.temp=0.5"], ["loss.temp", "'temperature'"]),
    ([*PRETRAIN, "loss=ntxent"], ["loss", "'ntxent'", "keys and values"]),
    ([*PRETRAIN, "epochs.max=3"], ["epochs.max", "has no keys"]),
    ([*PRETRAIN, "loss.name=simclr"], ["loss.name", "ntxent, ntlogistic"]),
    ([*PRETRAIN, "epochs=0"], ["epochs: got 0", "greater than or equal to 1"]),
    ([*PRETRAIN, f"epochs={10**22}"], ["epochs", "less than or equal to 1000000"]),
    ([*PRETRAIN, "loss.temperature=.nan"], ["loss.temperature", "finite"]),
    ([*PRETRAIN, "batch_size=4096"], ["40 rows", "4096", "batch_size"]),
    ([*PRETRAIN, "name=a/b"], ["name: got 'a/b'; it must match"]),
    ([*PRETRAIN, f"name={'a' * 201}"], ["name: got ", "at most 200 characters"]),
    ([*PRETRAIN, "--resume", "--restart"], ["--resume", "exclude each other"]),
    (
        [*PRETRAIN, "--resume", "batch_size=8"],
        ["--resume", OTHER, "batch_size: 16 -> 8", "without --resume"],
    ),
    ([*PRETRAIN, "checkpoint.keep=0"], ["checkpoint.keep: got 0"]),
    ([*PRETRAIN, "checkpoint.every_epochs=0"], ["checkpoint.every_epochs: got 0"]),
    # config files
    (["pretrain", "cifar10"], ["cifar10", "'cifar10_cpu'"]),
    (["pretrain", "nope.yaml"], ["nope.yaml: no such file"]),
    (["pretrain", "folder.yaml"], ["folder.yaml", "directory"]),
    (["pretrain", "text.txt"], ["text.txt: is no .yaml file"]),
    (["pretrain", "latin.yaml"], ["latin.yaml", "UTF-8"]),
    (["pretrain", "tab.yaml"], ["tab.yaml", "line 3, column 1", "tab", "spaces"]),
    (["pretrain", "twice.yaml"], ["twice.yaml", 'duplicate key "epochs"', "line 6"]),
    (["pretrain", "open.yaml"], ["open.yaml", "line 3"]),
    (["pretrain", "list.yaml"], ["list.yaml", "a list, not keys and values"]),
    (["pretrain", "date.yaml"], ["seed", "'2024-01-01'", "integer"]),
    (["pretrain", "loop.yaml"], ["loop.yaml", "text, number, list or mapping"]),
    (["pretrain", "quoted.yaml"], ["epochs", "'2'", "integer"]),
    (["pretrain", "solo.yaml"], ["solo.yaml", "no experiment", "method", "backbone"]),
    (["pretrain", "code.yaml"], ["code.yaml", "mine:MyLoss", "--allow-code"]),
    # images
    ([*PRETRAIN, "data.train=not/there"], ["not/there", "no such file"]),
    ([*PRETRAIN, "data.train=text.txt"], ["text.txt", "no parquet"]),
    ([*PRETRAIN, "data.train=empty"], ["empty", "neither images nor parquet"]),
    ([*PRETRAIN, "data.train=numbers.parquet"], ["numbers.parquet", "data.columns.image="]),
    ([*PRETRAIN, "data.train=s3:/bucket/x"], ["data.train", "s3://bucket/x"]),
    ([*PRETRAIN, "data.train=s4://bucket/x"], ["s4://bucket/x", "cannot be opened"]),
    # machine, storage, tracking, registry
    ([*PRETRAIN, "scaling.num_workers=64"], ["batch_size", "64 workers"]),
    ([*PRETRAIN, "scaling.num_workers=[2, 64]"], ["batch_size", "64 workers"]),
    *(
        ([*PRETRAIN, f"scaling.num_workers={ends}"], ["scaling.num_workers", "[least, most]"])
        for ends in ("[3, 2]", "[0, 2]", "[2]", "[1, 2, 3]", "[1.5, 2]", "[]", "0", "many")
    ),
    ([*PRETRAIN, "scaling.cpus_per_worker=1000"], ["scaling.cpus_per_worker=1000", "core"]),
    ([*PRETRAIN, "scaling.gpus_per_worker=99"], ["scaling.gpus_per_worker=99", "PyTorch sees"]),
    (
        [*PRETRAIN, "scaling.data_label_selector.role=data"],
        ["scaling.data_label_selector=role: data", "RAY_ADDRESS"],
    ),
    ([*PRETRAIN, "scaling.data_resource=disk"], ["data_resource=disk is gone", "label_selector"]),
    ([*PRETRAIN, "storage=text.txt"], ["storage", "is a file"]),
    ([*PRETRAIN, "storage=/proc/none"], ["/proc/none"]),
    ([*PRETRAIN, "storage=s3://bucket/runs"], ["tracking.uri", "s3://bucket/runs"]),
    ([*PRETRAIN, "tracking.uri=mlflow.db"], ["tracking.uri", "sqlite:///mlflow.db"]),
    ([*PRETRAIN, "tracking.uri=localhost:5000"], ["tracking.uri", "http://localhost:5000"]),
    ([*PRETRAIN, "tracking.uri=foo://x"], ["tracking.uri", "foo://"]),
    ([*PRETRAIN, "registry.name=team/enc"], ["registry.name", "'/'"]),
    ([*PRETRAIN, "registry.alias=best"], ["registry.alias", "registry.name"]),
    (
        [*PRETRAIN, "encoder={name: torchvision, model: vit_b_16}", "augment.size=40"],
        ["encoder.model", "vit_b_16", "40 px"],
    ),
    (
        [*PRETRAIN, "encoder={name: torchvision, model: alexnet}"],
        ["augment.size", "alexnet takes no views of 32 px"],
    ),
    ([*PRETRAIN, "init.weights=weights.pth"], ["init.weights", "weights.pth"]),
    ([*PRETRAIN, f"init.weights={RUN}"], ["init.weights", "another encoder", "width"]),
    # other verbs
    (["prepare", "images/dogs", "out"], ["images/dogs", "no such file"]),
    (["prepare", "images", "out", "size=64"], ["size", "a folder of images takes labels"]),
    (["prepare", "shapes", "out", "labels=none"], ["labels", "`shapes` takes size"]),
    # what is given is refused, and be it the default
    (["prepare", "train.parquet", "out", "size=32"], ["size", "32; parquet takes columns"]),
    (["prepare", "train.parquet", "out", "labels=auto"], ["labels", "auto", "parquet takes"]),
    (["prepare", "images", "out", "columns.id=id"], ["columns", "a folder of images takes"]),
    (
        ["prepare", "train.parquet", "out", "split=test"],
        ["train.parquet", "there is no split test"],
    ),
    (["prepare", "images", "images/out"], ["images/out", "lies inside images"]),
    (["prepare", "images", "images"], ["images is the input"]),
    (["prepare", "images#test", "images/out"], ["images/out", "lies inside images#test"]),
    (["prepare", "shapes", ""], ["''", "no path"]),
    (["prepare", "images/cat/0.png", "out"], ["images/cat/0.png", "one image (PNG)", "`embed`"]),
    (["prepare", "splits", "out"], ["test (1 image), train (1 image)", "splits#train"]),
    (["inspect", "splits"], ["test (1 image), train (1 image)", "splits#train"]),
    ([*PRETRAIN, "data.train=splits"], ["test (1 image), train (1 image)", "splits#train"]),
    (["prepare", "splits#train", "out", "split=test"], ["split", "names train"]),
    (["prepare", "hf://datasets/a/b", "out"], ["hf://datasets/a/b", "the hub cannot be asked"]),
    ([*PRETRAIN, "data.train=hf://datasets/a/b", "--dry-run"], ["the hub cannot be asked"]),
    (["inspect", "hf://datasets/a/b#train"], ["the hub cannot be asked"]),
    (["inspect", "train.parquet", "image=photo"], ["the right one with image=..."]),
    (["inspect", "train.parquet", "image=photo", "--full"], ["the right one with image=..."]),
    (["prepare", "train.parquet", "out", "columns.image=photo"], ["one with columns.image=..."]),
    ([*PRETRAIN, "data.columns.image=photo"], ["the right one with data.columns.image=..."]),
    (["inspect", "train.parquet", "img=image"], ["img", "'image'"]),
    (["preview", "good.yaml", "--out", "x.jpg"], ["--out", ".png"]),
    (["preview", "good.yaml", "data.train=nope", "--out", "new/x.png"], ["nope", "no such file"]),
    (["evaluate", "runs/nope"], ["runs/nope", "checkpoint"]),
    (["evaluate", RUN, "encoder.depth=18"], ["encoder.depth", "trained with"]),
    (["embed", "models:/", "images/cat/0.png"], ["models:/name@alias"]),
    (["embed", "models:/enc@newest", "images/cat/0.png"], ["no MLflow store", "mlflow.db"]),
    (["embed", "runs/nope", "images", "--out", "new/x.parquet"], ["runs/nope", "checkpoint"]),
    (["embed", RUN, "images"], ["images", "--out OUT.parquet"]),
    (["embed", RUN, "nope", "--out", "new/x.parquet"], ["nope", "no such file"]),
    (["embed", RUN, "images", "--out", "new/x.csv"], ["--out", ".parquet"]),
    (["embed", RUN, "images", "--out", "folder.parquet"], ["folder.parquet is a folder"]),
    (["embed", RUN, "images", "--out", "text.txt/x.parquet"], ["text.txt"]),
    (["embed", RUN, "images", "--out", "numbers.parquet"], ["other data", "--overwrite"]),
    (["embed", RUN, "images", "--out", "new/x.parquet", "--dtype", "int8"], ["float16", "'int8'"]),
    (["embed", RUN, "train.parquet", "--out", "new/x.parquet", "--keep", "name"], ["'name'"]),
    (["embed", RUN, "train.parquet", "--out", "new/x.parquet", "img=image"], ["img", "'image'"]),
    (["embed", RUN, "images", "train.parquet", "--out", "new/x.parquet"], ["one is embedded"]),
    (["embed", RUN, "train.parquet", "test.parquet", "--out", "x.parquet"], ["one is embedded"]),
    (["embed", RUN, "images/cat/0.png", "nope.png", "--out", "x.parquet"], ["nope.png"]),
    (["embed", RUN, "text.txt"], ["text.txt: not an image"]),
    (["embed", RUN, "images/cat/0.png", "--keep", "x"], ["--keep", "--out OUT.parquet"]),
    (["embed", RUN, "numbers.parquet", "--out", "new/x.parquet"], ["with image=..."]),
    (
        ["embed", RUN, "train.parquet", "--out", "train.parquet", "--overwrite"],
        ["train.parquet holds the images themselves"],
    ),
    (["predict", RUN, "images/cat/0.png"], [RUN, "without a classifier", "model finetune"]),
    (["predict", "models:/enc/1", "images/cat/0.png"], ["no MLflow store", "mlflow.db"]),
    (["export", RUN, "out", "--to", "onxx"], ["--to", "safetensors, torch-export", "'onnx'"]),
    (["export", RUN, "out", "--to", "timm"], ["--to timm", "depth 50", "--to onnx"]),
    (["export", RUN, "/proc/none"], ["/proc"]),
    (["model", "register", RUN, "team/enc"], ["'/'", "team/enc"]),
    (["model", "register", RUN, "enc", "--alias", "latest"], ["'latest'", "`newest`"]),
    (["model", "register", RUN, "enc"], ["/somewhere/runs/mlflow.db"]),
    (["model", "promote", "enc", "champion"], ["models:/name@alias"]),
    (["model", "promote", "models:/enc/1", "champion"], ["no MLflow store"]),
    (
        ["model", "promote", "models:/enc/1", "champion", "--require", "top1 >= 0.5"],
        ["--require", "'top1'", "linear_top1"],
    ),
    (
        ["model", "promote", "models:/enc/1", "champion", "--require", "open('x') > 0"],
        ["--require", "open"],
    ),
    (["model", "promote", "models:/enc/1", "champion", "--require", " "], ["--require", "empty"]),
    (
        ["model", "promote", "models:/enc/1", "champion", "--require", "5 > 3"],
        ["--require", "names no metric"],
    ),
    ([*PRETRAIN, "registry.name=e", "registry.require=knn_top2 > 0"], ["knn_top2", "knn_top1"]),
    ([*PRETRAIN, "registry.require=knn_top1 > 0"], ["registry.require", "registry.name"]),
    (["model", "rollback", "enc", "champion"], ["no MLflow store"]),
    (["model", "rm", "models:/enc/1"], ["no MLflow store"]),
    (["model", "compare", RUN, "runs/nope"], ["runs/nope", "checkpoint"]),
    (["run", "rm", "runs/nope"], ["runs/nope"]),
    (["model", "finetune", RUN, "--labels", "10"], ["labels", "at most 1"]),
    (["model", "finetune", "runs/nope", "--per-class", "3"], ["runs/nope", "checkpoint"]),
    (["model", "finetune", RUN, "--per-class", "-1"], ["--per-class", "equal to 1"]),
    (
        ["model", "finetune", RUN, "--labels", "0.1", "--per-class", "10"],
        ["--labels: got 0.1", "--per-class 10", "exclude each other"],
    ),
    (["run", "list", RUN], [RUN, "status"]),
    (["status", "empty"], ["empty", "experiment.yaml"]),
    (["doctor", "--storage", "s4://x"], ["s4://x", "cannot be opened"]),
    (["doctor", "temperature=0.2"], ["temperature=0.2", "--loss"]),
    (["demo", "--folder", "text.txt"], ["text.txt"]),
    (["study", "run", "losse"], ["losse", "'losses'"]),
    (["study", "run", "temperature", "--scale", "gpu"], ["'gpu'", "cpu"]),
    (["study", "status", "empty"], ["empty", "study.yaml"]),
]


@pytest.mark.parametrize(("words", "told"), REFUSED, ids=lambda part: " ".join(part))
def test_what_is_wrong_is_one_line_and_exit_code_2(
    words: list[str], told: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    ended = run(words, capsys)
    assert ended.code == 2, ended
    assert len(ended.problems) == 1, ended
    assert ended.problems[0].startswith("error: ")
    for part in told:
        assert part in ended.problems[0]


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("free", "told"),
    [
        ("runs", ["storage: ", "/runs has 0.0 MiB free; 3 checkpoints of", "set another storage"]),
        (tempfile.gettempdir(), ["TMPDIR: ", "1 checkpoint of", "set TMPDIR"]),
    ],
)
def test_a_disk_without_room_for_the_checkpoints_is_one_line(
    free: str,
    told: list[str],
    options: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = Path(free).absolute()
    monkeypatch.setattr(
        disk_space, "space_at", lambda path: Space(0 if Path(path) == full else 2**40, None)
    )
    ended = run([*PRETRAIN, *options], capsys)
    assert ended.code == 2, ended
    (line,) = ended.problems
    for part in told:
        assert part in line


@pytest.mark.long  # S3's client tries for seconds
@pytest.mark.parametrize(
    "words", [["prepare", "shapes", BUCKET], ["prepare", BUCKET, "out"], ["inspect", BUCKET]]
)
def test_a_bucket_that_does_not_answer_is_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    ended = run(words, capsys)
    assert ended.code == 2, ended
    assert len(ended.problems) == 1, ended
    assert "127.0.0.1 port 9" in ended.problems[0]


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("RAY_ADDRESS", "garbage", "HOST:PORT"),
        ("RAY_ADDRESS", "127.0.0.1:9", "no Ray cluster answers"),
        ("RAY_ADDRESS", "127.0.0.1:99999", "no Ray cluster answers"),
        ("MLFLOW_TRACKING_URI", "htp://x:5000", "htp://"),
        ("SIMCLR_RAY_NATIVE", "yes", "off, package, build"),
    ],
)
def test_a_wrong_variable_is_named(
    variable: str,
    value: str,
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, value)
    ended = run(PRETRAIN, capsys)
    assert ended.code == 2, ended
    (line,) = ended.problems
    assert variable in line
    assert told in line


def test_output_that_nobody_reads_on_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m simclr_ray config imagenet_resnet50 | head -1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, cwd=tmp_path, env=environment,
        check=True,
    )  # fmt: skip
    assert done.stdout.startswith("name: ")
    assert done.stderr == ""
