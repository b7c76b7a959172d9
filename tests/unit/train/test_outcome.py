"""What a run has registered is stored with it: where the alias is, or why it stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from simclr_ray.cli.pretrain import _show
from simclr_ray.storage import checkpoint
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.storage.run_status import SCORES
from simclr_ray.tracking.store import RegisteredEncoder
from simclr_ray.train.outcome import (
    OUTCOME,
    PretrainOutcome,
    Run,
    _registered_in,
    store_outcome,
    stored_outcome,
)
from tests.unit.train.test_identity import begun, resolved

MADE = RegisteredEncoder("enc", 4, "models:/enc/4", "id")
WHY = "models:/enc/4 does not become champion, which stays version 3: knn_top1 > champion: fails"
OLD = {"name": "enc", "version": 4, "uri": "models:/enc/4", "run_id": "id"}


@pytest.mark.parametrize(
    ("made", "shown", "address"),
    [
        (MADE._replace(alias="champion"), "models:/enc@champion (version 4)", "enc@champion"),
        (MADE._replace(refusal=WHY), f"models:/enc/4\n{WHY}", "enc/4"),
    ],
)
def test_the_terminal_names_the_alias_where_it_moved_and_else_the_version_and_why(
    made: RegisteredEncoder,
    shown: str,
    address: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ("registry.name=enc", "registry.alias=champion", "registry.require=knn_top1 > champion")
    experiment = begun(resolved(str(tmp_path / "runs"), tmp_path, *asked))
    folder = experiment.folder
    outcome = PretrainOutcome(Run(folder.name, folder.uri, "s", "m", {}), [], made, None)
    store_outcome(experiment, outcome)
    stored = json.loads(folder.read_text(OUTCOME) or "")
    assert _registered_in(stored) == made
    _show(experiment, outcome, "IMAGE.png")
    said = capsys.readouterr().out
    uri = RunRecord.read(folder).tracking_uri
    assert f"registered  {shown}\n" in said
    assert f"embed models:/{address} IMAGE.png --tracking-uri {uri}\n" in said


@pytest.mark.parametrize(
    ("registry", "expected"),
    [
        ({"name": "enc", "alias": "best"}, MADE._replace(alias="best")),  # of before there were any
        ({"name": "enc", "alias": "best", "require": ""}, MADE._replace(alias="best")),
        ({"name": "enc", "alias": "best", "require": "knn_top1 > 0"}, MADE),  # nobody knows
        (None, MADE),
    ],
)
def test_an_outcome_that_says_nothing_of_the_alias_claims_it_only_without_a_rule(
    registry: dict[str, Any] | None, expected: RegisteredEncoder
) -> None:
    assert _registered_in({"registered": OLD, "registry": registry}) == expected
    assert _registered_in({"registered": None, "registry": registry}) is None


def test_a_finished_run_answers_beside_a_damaged_checkpoint_that_it_has_made_good(
    tmp_path: Path,
) -> None:
    uri = "http://mlflow.example:5000"
    run = begun(resolved(str(tmp_path / "runs"), tmp_path, f"tracking.uri={uri}"))
    folder, last = run.folder, run.total_steps
    RunRecord("m", uri, run.source.fingerprint, run.digest).write(folder)
    row = {"name": "trained", "uniformity": -2.0, "effective_rank": 9.0, "feature_std": 1.0}
    folder.write_text(SCORES, json.dumps([row]))
    names = [f"step-{last:08d}-{suffix * 8}" for suffix in "0f"]
    for name in names:
        place = Path(folder.below(name))
        checkpoint.write(place, last, {"model.w": torch.ones(2)}, run.identity)
    Path(folder.below(names[1]), checkpoint.STATE).write_bytes(b"")  # then 0 was written

    def stored(name: str) -> PretrainOutcome | None:
        made = Run(folder.name, folder.uri, name, "m", {})
        store_outcome(run, PretrainOutcome(made, [], None, None))
        return stored_outcome(run)

    outcome = stored(names[0])
    assert outcome is not None
    assert outcome.run.checkpoint_name == names[0]
    assert stored(names[1]) is None  # it was evaluated, and is damaged now
    (Path(folder.below(names[0])) / checkpoint.STATE).unlink()
    assert stored(names[0]) is None
