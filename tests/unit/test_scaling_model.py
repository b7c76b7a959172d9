"""The model and the simulations of `docs/scaling.md`, where the answer is known without them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import scaling_model
from benchmarks.billion import footer_of
from benchmarks.data_nodes import busy_fraction
from benchmarks.scaling_model import LINKS, rate_alone, smallest, step_of


@pytest.mark.parametrize("what", ["TPU v3 core", "V100"])
def test_the_rate_of_a_device_is_that_at_which_the_model_gives_the_smallest_figure(
    what: str,
) -> None:
    figure, rate = smallest(what), rate_alone(what)
    local = figure.batch // figure.devices
    step = step_of(figure.devices, local, rate, LINKS[figure.network])
    assert figure.batch / step.total == pytest.approx(figure.images_per_s, rel=1e-9)
    assert rate > figure.images_per_s / figure.devices, "the figure has the exchange in it"
    assert step_of(1, local, rate, 1e9).total == local / rate, "alone it exchanges nothing"


def test_errors_are_those_of_the_predicted_figures() -> None:
    rows = scaling_model.against_published()
    assert [row["error"] is None for row in rows] == [True, False, True, False, False]
    assert all(row["model"] == row["published"] for row in rows if row["error"] is None)
    for row in rows:
        if row["error"] is not None:
            assert row["error"] == pytest.approx(row["model"] / row["published"] - 1, abs=1e-3)


def test_a_step_waits_for_its_slowest_actor() -> None:
    # of equal times nothing but the first step is waited for
    assert busy_fraction(2.0, 1e-3, actors=16) == pytest.approx(1, abs=1e-3)
    assert busy_fraction(0.5, 1e-3, actors=16) == pytest.approx(0.5, abs=2e-3)
    # with one step ahead, actors so slow that no step waits: the mean of the slowest of two
    # exponential times is 1.5 of their mean, of three 11/6
    for actors, slowest in ((1, 1.0), (2, 1.5), (3, 11 / 6)):
        busy = busy_fraction(0.001, 1.0, actors=actors, ahead=1)
        assert busy == pytest.approx(0.001 / slowest, rel=0.05)
    few, many = (busy_fraction(1.5, 1.0, actors=n, steps=2000) for n in (4, 256))
    assert many < few < 1
    assert busy_fraction(1.5, 1.0, actors=4, ahead=8) > busy_fraction(1.5, 1.0, actors=4)


def test_a_footer_is_measured_on_a_file_of_so_many_row_groups(tmp_path: Path) -> None:
    table = pa.table({"image": [b"x"] * 90, "label": list(range(90))})
    pq.write_table(table, tmp_path / "one.parquet")
    few, many = (footer_of(tmp_path / "one.parquet", groups) for groups in (3, 9))
    assert (few["row_groups"], many["row_groups"], many["columns"]) == (3, 9, 2)
    assert 100 < few["bytes"] < many["bytes"]
    assert many["ms"] > 0


def test_what_a_billion_images_take_follows_from_what_was_measured() -> None:
    stored = json.loads(scaling_model.stored_text("scaling_model"))
    b, plan = stored["billion"], stored["plans"][-1]
    assert (b["images"], plan["images"]) == (10**9, 10**9)
    assert b["files"] * b["footer"]["row_groups"] >= b["row_groups"] == plan["row_groups"]
    assert b["node_all_mib"] == pytest.approx(8 * b["worker_mib"] + 64 * b["actor_mib"], rel=0.01)
    assert b["aws_data_node_mib"] == pytest.approx(16 * b["actor_mib"], rel=0.01)
    assert "+changes" not in stored["commit"]
