"""Every verb finds the same encoder by the same name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from simclr_ray.errors import ConfigError
from simclr_ray.inference.embed import load_encoder
from simclr_ray.inference.encoder_files import CARD, WEIGHTS, read_encoder, write_encoder_of
from simclr_ray.inference.export import export_encoder
from simclr_ray.inference.version_files import drop_repeated_weights
from simclr_ray.storage import checkpoint
from tests.formats.test_formats import HERE as FORMATS


@pytest.fixture
def a_run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FORMATS / "format_2", tmp_path / "runs" / "small-0123"))


def add_later(run: Path) -> Path:
    """Return a checkpoint of one step more, whose weights are twice those of the first."""
    (first,) = run.glob("step-*")
    kept = checkpoint.read(first)
    tensors = {name: t * 2 if t.is_floating_point() else t for name, t in kept.tensors.items()}
    later = run / checkpoint.new_name(kept.step + 1)
    checkpoint.write(later, kept.step + 1, tensors, {"experiment": kept.record["experiment"]})
    return later


def weight_of(encoder: torch.nn.Module) -> torch.Tensor:
    return next(encoder.parameters())


def test_training_that_went_on_after_a_registration_is_what_every_verb_takes(
    a_run: Path, tmp_path: Path
) -> None:
    (first,) = a_run.glob("step-*")
    write_encoder_of(first, a_run / "encoder")
    registered = weight_of(read_encoder(a_run / "encoder"))
    add_later(a_run)
    assert torch.equal(weight_of(load_encoder(a_run)), 2 * registered)
    export_encoder(str(a_run), tmp_path / "out", ["safetensors"])
    assert torch.equal(weight_of(read_encoder(tmp_path / "out")), 2 * registered)


def test_a_checkpoint_by_its_uri_is_taken_by_every_verb(a_run: Path, tmp_path: Path) -> None:
    (first,) = a_run.glob("step-*")
    expected = weight_of(load_encoder(first))
    for where in (first.as_uri(), a_run.as_uri()):
        assert torch.equal(weight_of(load_encoder(where)), expected)
    export_encoder(first.as_uri(), tmp_path / "out", ["safetensors"])
    assert torch.equal(weight_of(read_encoder(tmp_path / "out")), expected)


def test_a_version_that_was_downloaded_by_hand_is_whole_and_stays_as_it_is(
    a_run: Path, tmp_path: Path
) -> None:
    (first,) = a_run.glob("step-*")
    version = tmp_path / "artifacts" / "encoder"
    write_encoder_of(first, version)
    expected = weight_of(read_encoder(version))
    drop_repeated_weights(version)
    files = {path.name for path in version.iterdir()}
    assert WEIGHTS not in files
    assert torch.equal(weight_of(load_encoder(version)), expected)
    assert {path.name for path in version.iterdir()} == files


def test_a_run_without_checkpoints_has_the_encoder_that_it_kept(
    a_run: Path, tmp_path: Path
) -> None:
    (first,) = a_run.glob("step-*")
    write_encoder_of(first, a_run / "encoder")
    shutil.rmtree(first)
    for where in (str(a_run), a_run.as_uri()):
        export_encoder(where, tmp_path / "out", ["safetensors"])
        assert torch.equal(
            weight_of(load_encoder(where)), weight_of(read_encoder(tmp_path / "out"))
        )


def test_a_format_that_was_not_asked_for_is_not_computed_and_a_missing_one_is(
    a_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.delattr("torch.export.export")
        made = export_encoder(str(a_run), tmp_path / "weights", ["safetensors"])
    assert made == ["encoder.json", "model.safetensors"]
    made = export_encoder(str(tmp_path / "weights"), tmp_path / "both", ["torch-export"])
    assert {path.name for path in (tmp_path / "both").iterdir()} == set(made)
    assert "encoder.pt2" in made


def test_where_there_is_no_encoder_every_verb_says_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, message in (("file", "is a file"), ("empty", r"holds no encoder\.json")):
        where = str(tmp_path / name)
        with pytest.raises(ConfigError, match=message):
            load_encoder(where)
        with pytest.raises(ConfigError, match=message):
            export_encoder(where, tmp_path / "out")


def test_a_run_whose_checkpoints_are_all_broken_is_not_replaced_by_an_older_encoder(
    a_run: Path,
) -> None:
    (first,) = a_run.glob("step-*")
    write_encoder_of(first, a_run / "encoder")
    record = json.loads((first / checkpoint.RECORD).read_text())
    (first / checkpoint.RECORD).write_text(json.dumps(record | {"format_version": 1}))
    with pytest.raises(ConfigError, match="holds no whole checkpoint"):
        load_encoder(a_run)
    assert (a_run / "encoder" / WEIGHTS).is_file()


@pytest.mark.parametrize("card", [None, '{"hidden_size": 768}'])
def test_files_that_no_export_wrote_are_never_replaced(
    a_run: Path, tmp_path: Path, card: str | None
) -> None:
    out = tmp_path / "out"
    (out / "huggingface").mkdir(parents=True)
    theirs = [out / WEIGHTS, out / "huggingface" / "config.json"]
    for path in theirs:
        path.write_text("theirs")
    if card is not None:
        (out / CARD).write_text(card)
    with pytest.raises(ConfigError, match=r"no encoder\.json of an earlier export; choose another"):
        export_encoder(str(a_run), out, ["safetensors"])
    assert [path.read_text() for path in theirs] == ["theirs", "theirs"]


@pytest.mark.parametrize("killed_at", ["_remove", "shutil.move"])
def test_an_export_that_was_killed_while_it_replaced_another_goes_on(
    a_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    export_encoder(str(a_run), tmp_path / "out", ["safetensors"])
    (tmp_path / "out" / "huggingface").mkdir()
    add_later(a_run)
    with monkeypatch.context() as patch:
        patch.setattr(f"simclr_ray.inference.export.{killed_at}", killed)
        with pytest.raises(KeyboardInterrupt):
            export_encoder(str(a_run), tmp_path / "out", ["safetensors"])
    export_encoder(str(a_run), tmp_path / "out", ["safetensors"])
    assert torch.equal(weight_of(load_encoder(tmp_path / "out")), weight_of(load_encoder(a_run)))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {CARD, WEIGHTS}


def test_formats_of_an_earlier_export_stay_unless_they_are_of_another_encoder(
    a_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    export_encoder(str(a_run), out, ["safetensors"])
    (out / "encoder.pt2").write_text("of the same weights")
    (out / "huggingface").mkdir()
    assert export_encoder(str(a_run), out, ["safetensors"]) == [CARD, WEIGHTS]
    assert (out / "encoder.pt2").read_text() == "of the same weights"
    assert not caplog.text
    add_later(a_run)
    export_encoder(str(a_run), out, ["safetensors"])
    assert {path.name for path in out.iterdir()} == {CARD, WEIGHTS}
    assert f"{out}: removed encoder.pt2, huggingface, which were of another" in caplog.text
