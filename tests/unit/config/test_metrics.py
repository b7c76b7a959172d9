"""Every number that a run logs has a sentence, and none is of a name that nothing logs."""

from __future__ import annotations

import pytest

from simclr_ray.config.metrics import EPOCH_METRICS, MEANINGS, meaning_of
from simclr_ray.config.protocols import PROTOCOLS
from simclr_ray.storage.metrics_log import read_series
from tests.formats.test_formats import FORMATS, HERE


@pytest.mark.parametrize("name", FORMATS)
def test_what_stored_runs_have_logged_has_a_sentence(name: str) -> None:
    logged = read_series((HERE / name / "metrics.jsonl").read_text(encoding="utf-8"))
    of_a_run = {metric for metric in logged if "/" in metric}
    assert {metric for metric in of_a_run if not meaning_of(metric)} <= {"train/top1"}


def test_the_metrics_of_studies_and_tables_have_one() -> None:
    assert all(meaning_of(metric) for metric in EPOCH_METRICS)
    for protocol in PROTOCOLS:
        assert meaning_of(f"final/{protocol.metric}")
        assert meaning_of(f"final/raw_pixels/{protocol.metric}")
    assert meaning_of("train/nothing") == ""
    assert all((says and says[0].islower()) or says[0] in "τ1" for says in MEANINGS.values())
