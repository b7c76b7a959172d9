"""The command line in a process of its own: what it prints, with which exit code, and when."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import simclr_ray
from simclr_ray import config as cfg
from simclr_ray.config import preset_names
from simclr_ray.config.experiment import Experiment
from tests.unit.cli.in_turn import Ended, run_in_turn

ROOT = Path(simclr_ray.__file__).parents[1]
# Runs the command line, then says which engines it has loaded: none may be, before it is needed.
PROGRAM = """
import atexit, sys
atexit.register(lambda: print("LOADED", *[m for m in ("ray", "mlflow") if m in sys.modules]))
from simclr_ray.cli.main import main
main()
"""


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Return what `simclr-ray ARGUMENTS` printed and its exit code, run in `cwd`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=cwd, env=environment, check=False
    )


def started_an_engine(done: subprocess.CompletedProcess[str]) -> bool:
    return done.stdout.rstrip().splitlines()[-1] != "LOADED"


def errors(done: subprocess.CompletedProcess[str] | Ended) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    out = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(out, "PNG")
    table = pa.table({"photo": pa.array([out.getvalue()] * 100), "class": pa.array([0] * 100)})
    pq.write_table(table, tmp_path / "set.parquet")
    return tmp_path / "set.parquet"


def test_wrong_keys_and_values_end_in_2_with_a_line_each_before_ray_starts(tmp_path: Path) -> None:
    done = run("pretrain", "cifar10_cpu", "batchsize=3", "loss.temperature=hot", cwd=tmp_path)
    assert done.returncode == 2
    lines = errors(done)
    assert len(lines) == 2
    assert any(line.startswith("error: batchsize: unknown key (did you mean") for line in lines)
    assert any(line.startswith("error: loss.temperature: got 'hot'") for line in lines)
    assert "Traceback" not in done.stderr
    assert not started_an_engine(done)
    assert list(tmp_path.iterdir()) == []  # nothing was written either


def test_an_unknown_preset_ends_in_2_and_is_told_with_the_nearest(tmp_path: Path) -> None:
    done = run("pretrain", "cifar10_cpuu", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = errors(done)
    assert "did you mean 'cifar10_cpu'?" in line
    assert not started_an_engine(done)


def test_arguments_that_make_no_command_end_in_2_without_a_traceback(tmp_path: Path) -> None:
    missing, verb, option = ["pretrain"], ["pretend", "x"], ["pretrain", "cifar10_cpu", "--dry"]
    for done in run_in_turn(missing, verb, option, cwd=tmp_path):
        assert "Traceback" not in done.stderr
        assert done.returncode == 2


def test_missing_images_end_in_2_and_are_named(tmp_path: Path) -> None:
    done = run("pretrain", "cifar10_cpu", "data.train=not/there", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = errors(done)
    assert "not/there" in line


def test_a_parquet_without_the_image_column_is_told_with_the_columns_it_has(
    tmp_path: Path, parquet: Path
) -> None:
    done = run("pretrain", "cifar10_cpu", f"data.train={parquet}", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = errors(done)
    assert "no image column 'image'" in line
    assert "photo, class" in line or "class, photo" in line
    assert "data.columns.image=" in line


def test_a_dry_run_prints_the_arithmetic_and_starts_nothing(tmp_path: Path, parquet: Path) -> None:
    done = run(
        "pretrain",
        "cifar10_resnet18",
        f"data.train={parquet}",
        "data.columns.image=photo",
        "data.limit=90",
        "data.test=",
        "batch_size=30",
        "epochs=40",
        "schedule.learning_rate=1.0",
        "schedule.warmup_epochs=10",
        "scaling.num_workers=4",
        "storage=runs",
        "--dry-run",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    for expected in (
        "global batch 30 images, 60 views",
        "local batch 8 or 7 images on 4 workers",
        "steps 3 per epoch, 120 in 40 epochs",
        "warm-up 30 steps",
        "peak learning rate 0.117188 (linear scaling of 1)",
        "memory of a step",
    ):
        assert expected in text
    assert "time not measured; --time " in text
    assert not started_an_engine(done)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_time_of_a_run_is_told_and_nothing_is_written(tmp_path: Path, parquet: Path) -> None:
    data = [f"data.train={parquet}", "data.columns.image=photo", "data.test="]
    small = ["encoder.width=0.25", "augment.size=16", "batch_size=16", "epochs=2"]
    made = ["cifar10_cpu", *data, *small, "storage=runs"]
    done = run("pretrain", *made, "--time", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    time, measured = done.stdout.splitlines()[-3:-1]
    assert re.fullmatch(r"time +\d:\d\d, 0:\d\d of it evaluation; .*", time)
    assert re.fullmatch(r"measured +[\d.,]+ images/s here by one worker, in .*", measured)
    assert "not measured" not in done.stdout
    assert not (tmp_path / "runs").exists()


def test_config_alone_lists_the_presets(tmp_path: Path) -> None:
    done = run("config", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.splitlines()[:-1] == preset_names()
    assert not started_an_engine(done)


def test_config_prints_yaml_that_is_the_same_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # local paths are taken from there
    overrides = ("optimizer.name=adamw", "loss.temperature=1e-1", "data.train=yes")
    done = run("config", "cifar10_cpu", *overrides, cwd=tmp_path)
    assert done.returncode == 0
    (tmp_path / "mine.yaml").write_text(done.stdout.rpartition("LOADED")[0])
    again = Experiment.load(str(tmp_path / "mine.yaml"))
    assert again == Experiment.load("cifar10_cpu", *overrides)
    assert cfg.leaves(cfg.to_tree(again))["optimizer.name"] == "adamw"


def test_help_shows_every_verb(tmp_path: Path) -> None:
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    for verb in ("prepare", "pretrain", "evaluate", "model", "preview", "config", "doctor"):
        assert verb in done.stdout


def test_a_file_where_a_run_is_expected_ends_in_2(parquet: Path, tmp_path: Path) -> None:
    verbs = ("evaluate", "status", "run probe", "model finetune", "model distill")
    commands = [[*verb.split(), str(parquet)] for verb in verbs]
    commands.append(["model", "register", str(parquet), "name"])
    for command, done in zip(commands, run_in_turn(*commands, cwd=tmp_path), strict=True):
        assert done.returncode == 2, command
        assert errors(done) == [f"error: {parquet}: is a file; a run is a folder"], command


def test_a_preview_finds_out_what_is_white_as_a_run_does(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 4096, (40, 40), dtype=np.uint16)
        Image.fromarray(pixels).save(tmp_path / "deep" / f"{number}.png")
    words = ["photos_cpu", "data.train=deep", "data.channels=1", "data.white=auto"]
    done = run("preview", *words, "augment.grayscale=0", "augment.size=32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "data.white=4" in done.stderr
    assert (tmp_path / "views.png").is_file()


def test_a_preview_that_cannot_be_drawn_or_written_ends_in_2(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([b"no image"] * 4, pa.binary())})
    pq.write_table(table, tmp_path / "bad.parquet")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff")
    cases = (
        (["photos_cpu", "data.train=bad.parquet", "--out", "new/x.png"], "is an image"),
        (["photos_cpu", "data.train=bad.parquet", "--out", "x.txt"], "must end in .png"),
        (["latin.yaml"], "is not UTF-8"),
    )
    ends = run_in_turn(*(["preview", *arguments] for arguments, _ in cases), cwd=tmp_path)
    for (_, message), done in zip(cases, ends, strict=True):
        assert done.returncode == 2, done.stderr
        assert message in errors(done)[0]


def test_paths_that_cannot_serve_end_in_2_with_a_line(parquet: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    where, data = "/proc/nowhere", f"data.train={parquet}"
    pretrain = ["pretrain", "photos_cpu", data, "data.columns.image=photo", "batch_size=50"]
    pretrain += ["epochs=1", "evaluation.every_epochs=0"]
    commands = [
        ["prepare", str(parquet), where, "columns.image=photo"],
        ["prepare", str(parquet), str(tmp_path / "file"), "columns.image=photo"],
        ["prepare", str(parquet), str(tmp_path / "file" / "sub"), "columns.image=photo"],
        ["prepare", str(tmp_path / "nothing"), "out"],
        ["run", "list", str(tmp_path / "file")],
        ["run", "list", str(tmp_path / "nowhere")],
        ["preview", "photos_cpu", data, "data.columns.image=photo", "--out", f"{where}/x.png"],
        [*pretrain, f"storage={where}"],
        [*pretrain, f"storage={tmp_path / 'file'}", "--dry-run"],
        [*pretrain, f"tracking.uri=sqlite:///{where}/m.db", "storage=runs"],
        [*pretrain, "registry.name=team/enc", "--dry-run"],
        [*pretrain, "registry.name=enc", "registry.alias=a/b", "--dry-run"],
        ["doctor", "--workers", "0"],
    ]
    for command, done in zip(commands, run_in_turn(*commands, cwd=tmp_path), strict=True):
        assert "Traceback" not in done.stderr, command
        assert done.returncode == 2, (command, done.stderr)


def test_a_store_that_is_not_there_is_said_and_not_made(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"unread")
    uri = f"sqlite:///{tmp_path}/none/mlflow.db"
    done = run("embed", "models:/enc@best", "x.png", "--tracking-uri", uri, cwd=tmp_path)
    assert done.returncode == 2
    where = f"no MLflow store at {uri}: there is no file {uri[10:]}"
    assert errors(done) == [f"error: {where} (--tracking-uri URI)"]
    assert not (tmp_path / "none").exists()
