"""Run folders that releases have left behind are read by this one, or refused with the reason.

From format 2 on, each release reads the formats of the two before it (`docs/upgrade.md`); `make.py`
made the folders.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import simclr_ray as sr
from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import CheckpointError, ConfigError
from simclr_ray.nn.pretrained import experiment_of
from simclr_ray.storage import checkpoint
from simclr_ray.storage.metrics_log import read_series
from simclr_ray.storage.run_folder import METRICS, RUN_FILE, RunFolder
from simclr_ray.storage.run_record import RunRecord

HERE = Path(__file__).parent
FORMATS = sorted(path.name for path in HERE.glob("format_*"))


def step_folder(run: Path) -> Path:
    (found,) = run.glob("step-*")
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_a_run_of_each_format_is_read_whole(name: str) -> None:
    run = HERE / name
    expected = json.loads((run / "expected.json").read_text(encoding="utf-8"))
    folder = RunFolder.at(str(run))
    record = RunRecord.read(folder)
    experiment = experiment_of(step_folder(run))
    assert experiment.digest() == record.digest  # from format 2 on digests stay what they are
    stored = cfg.parse_yaml((run / "experiment.yaml").read_text(encoding="utf-8"))
    assert cfg.validate(Experiment, stored) == experiment
    kept = checkpoint.read(step_folder(run))
    assert kept.step == 8
    assert kept.record["digest"] == record.digest
    assert 8 in read_series(folder.read_text(METRICS) or "")["train/loss"]
    image = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    features = sr.load_encoder(step_folder(run))(image)[0]
    torch.testing.assert_close(features, torch.tensor(expected["features"]), rtol=1e-4, atol=1e-5)


def as_format_1(run: Path) -> None:
    record = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
    del record["format_version"]
    (run / RUN_FILE).write_text(json.dumps(record), encoding="utf-8")
    path = step_folder(run) / checkpoint.RECORD
    path.write_text(
        path.read_text(encoding="utf-8").replace('"format_version": 2', '"format_version": 1')
    )
    config = run / "experiment.yaml"
    text = config.read_text(encoding="utf-8").replace("\ninit:", "\nstart:")
    config.write_text(text.replace("group_size:", "images:"), encoding="utf-8")


def test_what_format_1_left_is_refused_with_the_reason_and_the_new_names(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(HERE / "format_2", run)
    as_format_1(run)
    with pytest.raises(
        ConfigError, match=r"run\.json: format 1, this release reads 2 and 3; see docs/up"
    ):
        RunRecord.read(RunFolder.at(str(run)))
    with pytest.raises(CheckpointError, match="format 1, this release reads 2 and 3"):
        checkpoint.read(step_folder(run))
    with pytest.raises(ConfigError) as caught:
        Experiment.load(str(run / "experiment.yaml"))
    told = [str(issue) for issue in caught.value.issues]
    assert sorted(told) == [
        "batch_norm.images: is called batch_norm.group_size since format 2 (docs/upgrade.md)",
        "start: is called init since format 2 (docs/upgrade.md)",
    ]
