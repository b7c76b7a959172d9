"""One process and R processes compute the same: loss, gradients, statistics, three LARS steps."""

from __future__ import annotations

import pytest

from simclr_ray.train.gradient_parity import ParityReport, compare_processes, gradient_parity

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# float64 rounding over the depth of the network; what is measured is 1e-13.
TOLERANCE = 1e-9


@pytest.fixture(scope="module", params=[2, 4, 3], ids=lambda r: f"{r} processes")
def comparison(request: pytest.FixtureRequest) -> ParityReport:
    """Return all figures of one spawn; 10 images over 3 and 4 processes are uneven."""
    return compare_processes(int(request.param))


def test_the_loss_is_that_of_one_process(comparison: ParityReport) -> None:
    assert comparison.loss.difference < TOLERANCE


def test_every_parameters_gradient_is_that_of_one_process(comparison: ParityReport) -> None:
    assert comparison.gradients.difference < TOLERANCE, comparison.gradients


def test_no_parameters_gradient_is_zero_so_the_check_sees_all_of_them(
    comparison: ParityReport,
) -> None:
    assert comparison.least_gradient > 1e-3


def test_running_statistics_are_those_of_one_process(comparison: ParityReport) -> None:
    assert comparison.statistics.difference < TOLERANCE, comparison.statistics


def test_parameters_after_three_lars_steps_are_those_of_one_process(
    comparison: ParityReport,
) -> None:
    assert comparison.weights.difference < TOLERANCE, comparison.weights


def test_in_float32_the_whole_gradient_is_that_of_one_process_to_1e_4(
    comparison: ParityReport,
) -> None:
    assert 0 < comparison.float32_gradient < 1e-4


def test_the_users_check_reports_one_figure_and_refuses_what_cannot_be_shared() -> None:
    parity = gradient_parity(1)
    assert parity.max_relative_difference < TOLERANCE
    assert parity.worst
    with pytest.raises(ValueError, match="num_workers"):
        gradient_parity(11)
