"""Unusable images: the same list, and the same others in their place, after any fault."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.storage import checkpoint
from simclr_ray.storage.run_folder import BAD_ROWS, RunFolder
from simclr_ray.train.resolve import resolve
from tests.ray import processes
from tests.ray.images import write_splits
from tests.ray.test_pretrain import losses_of, tree_of
from tests.reference.bombs import BOMBS

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]
WAIT_S = 300.0
FIRST_ID = 1000
UNUSABLE = {  # row -> what it is instead, and the reason
    3: (b"no image", "not an image"),
    50: (None, "null image"),
    51: (b"", "empty"),
    120: (BOMBS["jpeg"](), "too many pixels: 50000x50000"),
    200: (BOMBS["png"](), "too many pixels: 50000x5000"),
    201: (BOMBS["tiff_tile"](), "too many pixels: 30000x30000"),
    329: (BOMBS["gif"](), "too many pixels: 50000x50000"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 330 images, of which seven cannot be used and one is cut off."""
    made = write_splits(tmp_path_factory.mktemp("bad"), 330)
    table = pq.read_table(made / "train.parquet")
    images = table["image"].to_pylist()
    for row, (instead, _) in UNUSABLE.items():
        images[row] = instead
    whole = io.BytesIO()
    Image.open(io.BytesIO(images[7])).save(whole, "PNG")
    images[7] = whole.getvalue()[: len(whole.getvalue()) // 2]
    at = table.schema.get_field_index("image")
    table = table.set_column(at, "image", pa.array(images, pa.binary()))
    pq.write_table(table, made / "train.parquet", row_group_size=100)
    return made


def started(folder: Path, storage: str, workers: int) -> tuple[subprocess.Popen[str], RunFolder]:
    tree = tree_of(folder, storage, workers, "float64")
    tree["data"] = tree["data"] | {"max_bad_fraction": 0.05}  # type: ignore[operator] # a mapping
    tree["checkpoint"] = {"every_steps": 2}
    config = folder / f"{storage}{workers}.yaml"
    config.write_text(cfg.dump_yaml(tree))
    program = [sys.executable, "-m", "simclr_ray", "pretrain", str(config)]
    driver = subprocess.Popen(
        program, stdout=subprocess.DEVNULL, stderr=(folder / f"{storage}.log").open("a"), text=True
    )
    return driver, resolve(cfg.validate(Experiment, tree)).folder


def wait_for(step: int, run: RunFolder, driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not (run.local and run.local.exists() and run.checkpoints()) or (
        checkpoint.step_of(run.checkpoints()[0]) < step
    ):
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


def list_of(run: RunFolder) -> dict[int, str]:
    rows = [json.loads(line) for line in (run.read_text(BAD_ROWS) or "").splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)  # each once
    return {row["id"]: row["reason"] for row in rows}


def test_a_kill_a_stop_and_other_numbers_of_workers_change_neither_list_nor_batches(
    folder: Path, ray_cluster: str
) -> None:
    driver, undisturbed = started(folder, "undisturbed", 1)
    assert driver.wait(timeout=WAIT_S) == 0, (folder / "undisturbed.log").read_text()
    driver, run = started(folder, "faulty", 2)
    wait_for(4, run, driver)
    os.kill(processes.named("RayTrainWorker")[-1], signal.SIGKILL)
    wait_for(10, run, driver)
    driver.terminate()
    assert driver.wait(timeout=WAIT_S) == 75, (folder / "faulty.log").read_text()
    driver, again = started(folder, "faulty", 3)
    assert again == run
    assert driver.wait(timeout=WAIT_S) == 0, (folder / "faulty.log").read_text()
    expected = {row + FIRST_ID: reason for row, (_, reason) in UNUSABLE.items()}
    expected[7 + FIRST_ID] = "truncated"
    assert list_of(run) == list_of(undisturbed) == expected
    ours, theirs = losses_of(Path(run.uri)), losses_of(Path(undisturbed.uri))
    assert sorted(ours) == sorted(theirs) == list(range(1, 31))
    # one other image among 32 changes a loss by more than 1e-4
    assert max(abs(ours[s] - theirs[s]) / theirs[s] for s in range(1, 31)) < 1e-6
    said = (folder / "faulty.log").read_text()
    assert f"8 images of 330 could not be used, and others stood in for them: {run.uri}" in said
