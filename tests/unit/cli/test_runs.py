"""What is told of runs and data sets from their files: status, run list, inspect, export, embed."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simclr_ray.cli.run import list_runs, stop
from simclr_ray.cli.scores import show_bad_rows, show_next
from simclr_ray.errors import ConfigError
from simclr_ray.storage.last_error import ERROR, LastError
from simclr_ray.storage.rank_states import RANKS, RankState, RankStates
from simclr_ray.storage.run_folder import BAD_ROWS, METRICS, RunFolder
from simclr_ray.storage.run_status import runs_in, status_of_run
from simclr_ray.train.stop import STOP, is_requested
from tests.formats.test_formats import HERE as FORMATS
from tests.unit.cli.in_turn import run_in_turn
from tests.unit.cli.test_app import errors, run, started_an_engine

STEPS = 8


@pytest.fixture
def a_run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FORMATS / "format_2", tmp_path / "runs" / "small-0123"))


def test_a_finished_run_says_how_far_it_came_and_where_it_is_tracked(a_run: Path) -> None:
    found = status_of_run(RunFolder.at(str(a_run)))
    assert (found.state, found.step, found.total_steps, found.epoch) == (
        "finished",
        STEPS,
        STEPS,
        2,
    )
    assert found.record is not None
    assert (
        found.record.mlflow_run_id == json.loads((a_run / "run.json").read_text())["mlflow_run_id"]
    )
    assert len(found.checkpoints) == 1
    assert found.written_at is not None
    done = run("status", str(a_run), cwd=a_run.parent)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert f"steps {STEPS} of {STEPS}, epoch 2.00" in text
    assert "state finished, not evaluated" in text
    assert "; no driver holds it" in text
    assert "mlflow ui --backend-store-uri sqlite:" in text


def test_a_running_run_says_its_time_left_its_ranks_and_its_last_error(a_run: Path) -> None:
    folder = RunFolder.at(str(a_run))
    point = {"total": 1000, "train/loss": 5.0, "train/grad_norm": math.nan}
    lines = [{"time": t, "step": step, **point} for t, step in ((0, 100), (720, 200))]
    (a_run / METRICS).write_text("\n".join(map(json.dumps, lines)))
    ranks = [RankState(n, f"10.0.0.{n}", "data" if n == 39 else "step", 205, n) for n in range(40)]
    folder.write_text(RANKS, RankStates.now(ranks).text)
    LastError.of("restart", "rank 3 on 10.0.0.3 failed: out of memory").write(folder)
    with folder.lock():
        done = run("status", str(a_run), cwd=a_run.parent)
        printed = run("status", str(a_run), "--json", "-", cwd=a_run.parent)
        written = run("status", str(a_run), "--json", "s.json", cwd=a_run.parent)
        refused = run("status", str(a_run), "--json", "s.txt", cwd=a_run.parent)
    assert done.returncode == 0, done.stderr
    assert not started_an_engine(done)
    lines_shown = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "state running; held by a driver" in lines_shown
    assert any(line.startswith("time left 1:36:00, until about ") for line in lines_shown)
    assert any(
        line.startswith("last error ")
        and line.endswith(": restart: rank 3 on 10.0.0.3 failed: out of memory")
        for line in lines_shown
    )
    assert "│ 39 │ 10.0.0.39 │ data │ 205 │ 39 s │" in lines_shown
    assert not any(line.startswith("│ 7 │") for line in lines_shown)  # 8 to 39 are longer in
    tree = json.loads(printed.stdout.rpartition("}")[0] + "}")
    assert tree == json.loads((a_run.parent / "s.json").read_text()), written.stderr
    assert (tree["state"], tree["seconds_left"], len(tree["ranks"]["ranks"])) == (
        "running",
        5760,
        40,
    )
    assert tree["last_error"] == folder.read_json(ERROR, dict)
    assert tree["last_error"]["type"] == "restart"
    assert (tree["metrics"]["train/loss"], tree["metrics"]["train/grad_norm"]) == (5.0, None)
    assert "NaN" not in printed.stdout
    assert refused.returncode == 2
    assert "s.txt does not end in .json" in errors(refused)[0]


def test_a_password_of_the_tracking_server_is_not_printed(
    a_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((a_run / "run.json").read_text())
    uri, shown = "http://me:secret@mlflow.example:5000", "http://me:***@mlflow.example:5000"
    (a_run / "run.json").write_text(json.dumps(record | {"tracking_uri": uri}))
    show_next(RunFolder.at(str(a_run)), "models:/small@best")
    done = run("status", str(a_run), cwd=a_run.parent)
    assert done.returncode == 0, done.stderr
    for text in (done.stdout, capsys.readouterr().out):
        assert "secret" not in text
        assert text.count(shown) == 2


def test_a_run_that_a_driver_holds_runs_and_one_without_a_last_checkpoint_has_stopped(
    a_run: Path,
) -> None:
    folder = RunFolder.at(str(a_run))
    with folder.lock():
        assert status_of_run(folder).state == "running"
    shutil.rmtree(next(a_run.glob("step-*")))
    found = status_of_run(folder)
    assert (found.state, found.step, found.checkpoints) == ("stopped", STEPS, [])


def test_a_stop_is_asked_once_of_who_trains_and_not_of_who_scores(
    a_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder.at(str(a_run))
    with pytest.raises(ConfigError, match="no driver holds it: nothing to stop"):
        stop(str(a_run))
    with folder.lock():
        with pytest.raises(ConfigError, match="has trained to its end and is being scored"):
            stop(str(a_run))
        assert not is_requested(folder)
        for checkpoint in folder.checkpoints():
            shutil.rmtree(a_run / checkpoint)
        stop(str(a_run))
        written = (a_run / STOP).stat().st_mtime_ns
        assert (a_run / STOP).read_text() == folder.holder()
        stop(str(a_run))
        assert (a_run / STOP).stat().st_mtime_ns == written
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"asked {folder.uri} to stop"
    assert second == f"had already asked {folder.uri} to stop"


def test_runs_are_listed_by_name_and_other_folders_are_not(a_run: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "mlartifacts").mkdir()
    shutil.copytree(a_run, tmp_path / "runs" / "another-0000")
    storage = str(tmp_path / "runs")
    assert [folder.name for folder in runs_in(storage)] == ["another-0000", "small-0123"]
    assert runs_in(str(tmp_path / "nowhere")) == []
    done = run("run", "list", storage, cwd=tmp_path)
    assert [line.split()[1] for line in done.stdout.splitlines() if "finished" in line] == [
        "another-0000",
        "small-0123",
    ]


def test_a_run_that_cannot_be_read_hides_no_other(
    a_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("later-0000", "half-0000", "gone-0000"):
        shutil.copytree(a_run, tmp_path / "runs" / name)
    for name, lost in (("later-0000", {"format_version": 99}), ("half-0000", {"digest": 3})):
        path = tmp_path / "runs" / name / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | lost))
    read = RunFolder.checkpoints

    def removed(folder: RunFolder) -> list[str]:
        if folder.name == "gone-0000":
            raise FileNotFoundError(2, "No such file or directory", "step-1")
        return read(folder)

    monkeypatch.setattr(RunFolder, "checkpoints", removed)
    list_runs(str(tmp_path / "runs"))
    printed = capsys.readouterr()
    states = dict(line.split()[1:4:2] for line in printed.out.splitlines() if "-0" in line)
    others = dict.fromkeys(("gone-0000", "half-0000", "later-0000"), "unreadable")
    assert states == {**others, "small-0123": "finished"}
    reasons = dict(line.split(": ", 1) for line in printed.err.splitlines())
    assert reasons.keys() == others.keys()
    assert "format 99" in reasons["later-0000"]
    assert "digest is of another type" in reasons["half-0000"]


def test_a_folder_without_a_run_ends_in_2(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run folder"):
        status_of_run(RunFolder.at(str(tmp_path)))
    done = run("status", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    assert "is no run folder" in errors(done)[0]


def test_replaced_rows_are_told_once_each_with_their_reasons(
    a_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(10, "truncated"), (50, "too small: 1x1"), (10, "truncated"), (11, "truncated")]
    lines = [json.dumps({"step": 0, "id": i, "reason": reason}) for i, reason in rows]
    (a_run / BAD_ROWS).write_text("\n".join(lines) + '\n{"step": 9, "id"')  # a kill cut it off
    show_bad_rows(RunFolder.at(str(a_run)))
    told = " ".join(capsys.readouterr().out.split())
    assert told.startswith(
        "replaced 3 rows that could not be decoded: 2 x truncated; 1 x too small: 1x1 (ids in "
    )
    named = {"step": 0, "id": 7, "reason": "truncated", "path": "cats/7.jpg"}
    (a_run / BAD_ROWS).write_text(json.dumps(named) + "\n")
    show_bad_rows(RunFolder.at(str(a_run)))
    assert "1 x truncated (first: cats/7.jpg; all in " in " ".join(capsys.readouterr().out.split())


def png(side: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.zeros((side, 2 * side, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def test_inspect_tells_rows_columns_classes_sizes_and_what_cannot_be_decoded(
    tmp_path: Path,
) -> None:
    images = [png(8)] * 5 + [b"no image", None] + [png(10)] * 3
    table = pa.table(
        {"image": pa.array(images, pa.binary()), "label": [0, 0, 0, 1, 1, 1, 1, 1, 1, None]}
    ).replace_schema_metadata({"class_names": '["cat", "dog"]'})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    done = run("inspect", str(tmp_path / "a.parquet"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[1].startswith("rows 10 in 1 file, 3 row groups, ")
    for expected in (
        "column image binary (image)",
        "column label int64 (label)",
        "sizes 16 to 20 px wide, 8 to 10 px high, most often 16x8",
        "undecodable 2 of 10 images of a sample",
        "row 5 not an image",
        "row 6 empty",
        "2 classes",
        "│ -1 │ no label │ 1 │",
        "│ 0 │ cat │ 3 │",
        "│ 1 │ dog │ 6 │",
    ):
        assert expected in lines


def test_inspect_takes_other_columns_and_names_those_that_there_are(tmp_path: Path) -> None:
    table = pa.table({"photo": pa.array([png(8)] * 3, pa.binary())})
    pq.write_table(table, tmp_path / "a.parquet")
    done = run("inspect", "a.parquet", cwd=tmp_path)
    assert done.returncode == 2
    assert "its columns: photo" in errors(done)[0]
    for given in ("image=photo", "data.columns.image=photo"):
        assert run("inspect", "a.parquet", given, cwd=tmp_path).returncode == 0


def test_a_run_is_exported_and_embeds_as_its_export_does(a_run: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(40))
    export = ["export", str(a_run), "encoder"]
    embed = [["embed", where, "x.png"] for where in (str(a_run), "encoder")]
    ends = run_in_turn(export, *embed, cwd=tmp_path)
    assert [done.returncode for done in ends] == [0, 0, 0], ends
    names = {p.name for p in (tmp_path / "encoder").iterdir()}
    assert names == {"model.safetensors", "encoder.json", "encoder.pt2"}
    texts = [done.stdout.splitlines()[0] for done in ends[1:]]
    assert texts[0] == texts[1]
    dim = json.loads((tmp_path / "encoder" / "encoder.json").read_text())["feature_dim"]
    assert len(texts[0].split("\t")) == 1 + dim


def test_a_name_with_a_tab_or_line_break_stays_one_field(a_run: Path, tmp_path: Path) -> None:
    names = ["tab\tname.png", "new\nline.png", "plain.png"]
    for name in names:
        (tmp_path / name).write_bytes(png(40))
    done = run("embed", str(a_run), *names, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines() if line != "LOADED"][:3]
    assert [line[0] for line in lines] == [json.dumps(names[0]), json.dumps(names[1]), names[2]]
    assert len({len(line) for line in lines}) == 1
    assert lines[0][1:] == lines[1][1:] == lines[2][1:]


def test_an_export_replaces_no_other_files(a_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    messages = {
        "mine": "holds thesis.tex",
        "mine/thesis.tex": "is a file",
        "out --to onyx": "allowed: safetensors",
    }
    commands = [["export", str(a_run), *given.split()] for given in messages]
    ends = run_in_turn(*commands, cwd=tmp_path)
    for message, done in zip(messages.values(), ends, strict=True):
        assert done.returncode == 2
        assert message in errors(done)[0]


def test_an_export_onto_itself_is_refused_and_loses_nothing(a_run: Path, tmp_path: Path) -> None:
    assert run("export", str(a_run), "encoder", cwd=tmp_path).returncode == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "encoder").iterdir()}
    done = run("export", "encoder", "./encoder", cwd=tmp_path)
    assert done.returncode == 2
    assert "is where the encoder lies" in errors(done)[0]
    assert {path.name: path.read_bytes() for path in (tmp_path / "encoder").iterdir()} == before


def test_a_cluster_is_asked_for_by_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = run("cluster", "status", cwd=tmp_path)
    assert done.returncode == 2
    assert "RAY_ADDRESS is unset" in errors(done)[0]
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    done = run("cluster", "status", cwd=tmp_path)
    assert done.returncode == 2
    (said,) = errors(done)
    assert said.startswith("error: no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1: it names")
