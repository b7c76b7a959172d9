"""`study advise` with real trials: they are run, evaluated, and not run again."""

from __future__ import annotations

from pathlib import Path

import pytest

from simclr_ray import config as cfg
from simclr_ray.studies.driver import run_study
from simclr_ray.studies.tuning_advice import TrialLengths, advice_task, advise
from tests.ray.images import write_splits
from tests.ray.test_pretrain import tree_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_trials_are_run_evaluated_and_not_run_again(tmp_path: Path, ray_cluster: str) -> None:
    folder = write_splits(tmp_path, 130)
    base = folder / "base.yaml"
    base.write_text(cfg.dump_yaml({**tree_of(folder, "advised", 1, "float32"), "epochs": 8}))
    task = advice_task("small", str(base), ["data.test="])  # fewer settings without labels
    lengths = TrialLengths(rows=130, epochs=1, seconds=0.0)
    advice = advise(task, lengths, run_study)
    assert advice.metric == "eval/effective_rank"
    assert advice.fit.freedom == 1
    assert len(advice.finalists) == 3
    assert {end.name for end in advice.finalists} >= {"as it is"}
    assert all(1 <= end.value <= 64 for end in advice.finalists)
    assert all(end.images > 0 for end in advice.finalists)

    def refuse(*_: object) -> None:
        raise AssertionError("a trial was run again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("simclr_ray.studies.trial_runner.run_trial", refuse)
        again = advise(task, lengths, run_study)
    assert again == advice
