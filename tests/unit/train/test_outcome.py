"""What a run has registered is stored with it: where the alias is, or why it stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simclr_ray.cli.pretrain import _show
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.tracking.store import RegisteredEncoder
from simclr_ray.train.outcome import OUTCOME, PretrainOutcome, Run, _registered_in, store_outcome
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
