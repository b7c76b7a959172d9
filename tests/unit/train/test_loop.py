"""The loop is Algorithm 1: each step as written by hand, reports and callbacks when due."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from simclr_ray.augment.views import ViewPair
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.batch import Batch
from simclr_ray.distributed import collectives
from simclr_ray.errors import RunError
from simclr_ray.nn.batchnorm import GlobalBatchNorm
from simclr_ray.nn.build import SimCLRModel
from simclr_ray.nn.losses import BatchMetrics, NTXentLoss
from simclr_ray.nn.precision import Precision, as_input, prepare_model
from simclr_ray.optim import LARS, learning_rate_at
from simclr_ray.train import worker_batches
from simclr_ray.train.loop import Callbacks, Metrics, StepSchedule, train
from simclr_ray.train.meter import ReportInterval, StepMeter
from simclr_ray.train.worker_batches import finish_batches

N, SIDE = 6, 8
TEMPERATURE = 0.5
Event = tuple[Literal["report", "epoch", "checkpoint"], int]


def tiny(precision: Precision = "float32", seed: int = 0) -> SimCLRModel:
    torch.manual_seed(seed)
    encoder = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        GlobalBatchNorm(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    model = SimCLRModel(encoder, nn.Linear(4, 5))
    prepare_model(model, torch.device("cpu"), precision)
    return model


def batches(first: int, last: int, bad: tuple[int, ...] = ()) -> Iterator[Batch]:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        a, b = (
            torch.randint(0, 256, (N, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
            for _ in "ab"
        )
        unusable = torch.tensor([9] if step in bad else [], dtype=torch.int64)
        yield Batch(step, a, b, torch.arange(N), unusable)


def schedule(**changes: int) -> StepSchedule:
    table = StepSchedule(5, 15, 4, 0.8, N, log_every=2)
    return replace(table, **changes)  # type: ignore[arg-type] # all are int


class Log:
    """What the loop called, in order."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.metrics: list[Metrics] = []

    def callbacks(self) -> Callbacks:
        return Callbacks(self._report, self._epoch, lambda s: self.events.append(("checkpoint", s)))

    def _report(self, metrics: Metrics) -> None:
        self.events.append(("report", metrics.step))
        self.metrics.append(metrics)

    def _epoch(self, epochs: int, steps: int) -> None:
        assert steps == epochs * 5
        self.events.append(("epoch", steps))


def run(
    model: nn.Module,
    stream: Iterable[Batch],
    table: StepSchedule,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    precision: Precision = "float32",
    loss: NTXentLoss | None = None,
    meter: StepMeter | None = None,
) -> Log:
    log = Log()
    optimizer = optimizer or LARS(model.parameters(), lr=0.0)
    loss = loss or NTXentLoss(TEMPERATURE)
    train(model, loss, optimizer, stream, table, log.callbacks(), precision=precision, meter=meter)
    return log


def test_reports_and_hooks_come_at_their_steps_and_in_order() -> None:
    log = run(tiny(), batches(0, 10), schedule(checkpoint_every=3))
    assert log.events == [
        ("report", 2),
        ("checkpoint", 3),
        ("report", 4),
        ("report", 5),  # epochs end with a report, due or not
        ("epoch", 5),
        ("report", 6),
        ("checkpoint", 6),
        ("report", 8),
        ("checkpoint", 9),
        ("report", 10),
        ("epoch", 10),
    ]


def test_a_stream_from_the_middle_of_an_epoch_keeps_the_runs_own_count() -> None:
    log = run(tiny(), batches(7, 11), schedule(checkpoint_every=3))
    assert log.events == [
        ("report", 8),
        ("checkpoint", 9),
        ("report", 10),
        ("epoch", 10),
    ]
    assert [m.epoch for m in log.metrics] == [8 / 5, 2.0]


def test_a_checkpoint_that_falls_on_the_end_of_an_epoch_is_left_to_the_epochs_hook() -> None:
    log = run(tiny(), batches(0, 5), schedule(checkpoint_every=5, log_every=100))
    assert log.events == [("report", 5), ("epoch", 5)]


@pytest.mark.parametrize("at", [3, 4, 5, 7])
def test_what_is_asked_after_a_step_is_done_with_that_step(at: int) -> None:
    """Its checkpoint, and no further step."""
    log, steps = Log(), iter(range(1, 100))
    answers = replace(log.callbacks(), request=lambda: "stop" if next(steps) == at else "")
    model = tiny()
    train(
        model, NTXentLoss(TEMPERATURE), LARS(model.parameters(), lr=0.0), batches(0, 10),
        schedule(log_every=1), answers,
    )  # fmt: skip
    assert [step for what, step in log.events if what == "checkpoint"] == [at]
    assert max(step for what, step in log.events if what == "report") == at


def test_after_the_last_step_nothing_is_asked_for_again() -> None:
    """The run's end saves by itself."""
    log, model = Log(), tiny()
    train(
        model, NTXentLoss(TEMPERATURE), LARS(model.parameters(), lr=0.0), batches(10, 15),
        schedule(), replace(log.callbacks(), request=lambda: "stop"),
    )  # fmt: skip
    assert log.events[-1] == ("checkpoint", 11)
    log = Log()
    train(
        model, NTXentLoss(TEMPERATURE), LARS(model.parameters(), lr=0.0), batches(14, 15),
        schedule(), replace(log.callbacks(), request=lambda: "stop"),
    )  # fmt: skip
    assert log.events == [("report", 15), ("epoch", 15)]


def test_each_step_takes_the_rate_of_its_schedule() -> None:
    seen: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override] # as torch has it
            seen.extend(group["lr"] for group in self.param_groups)
            return super().step(closure)  # type: ignore[no-any-return] # as above

    model = tiny()
    groups = [{"params": [p]} for p in list(model.parameters())[:2]]
    log = run(model, batches(3, 15), schedule(), optimizer=Watched(groups, lr=9.0))
    expected = [learning_rate_at(s, 0.8, 4, 15) for s in range(3, 15) for _ in groups]
    assert seen == expected
    assert [m.learning_rate for m in log.metrics] == [
        learning_rate_at(m.step - 1, 0.8, 4, 15) for m in log.metrics
    ]


def by_hand(z: Tensor) -> Tensor:
    """Return eq. 1 over z [2N, D], view 1 above view 2, as the paper writes it."""
    z = z / z.norm(dim=1, keepdim=True)
    s = z @ z.T / TEMPERATURE
    total = z.new_zeros(())
    for i in range(2 * N):
        j = (i + N) % (2 * N)
        others = torch.stack([s[i, k] for k in range(2 * N) if k != i])
        total = total + torch.logsumexp(others, 0) - s[i, j]
    return total / (2 * N)


def test_a_step_is_the_step_written_by_hand() -> None:
    ours, theirs = tiny("float64"), tiny("float64").train()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.0, momentum=0.9)
    table = schedule(log_every=1)
    log = run(
        ours,
        batches(2, 5),
        table,
        optimizer=torch.optim.SGD(ours.parameters(), lr=0.0, momentum=0.9),
        precision="float64",
    )
    for metrics, batch in zip(log.metrics, batches(2, 5), strict=True):
        x = torch.cat([batch.a, batch.b]).double() / 255
        loss = by_hand(theirs(x).z)
        assert metrics.loss == pytest.approx(loss.item(), rel=1e-12)
        optimizer.param_groups[0]["lr"] = table.learning_rate(batch.step)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12), name


def test_reported_losses_are_the_last_and_the_mean_since_the_last_report() -> None:
    each = run(tiny(), batches(0, 5), schedule(log_every=1)).metrics
    some = run(tiny(), batches(0, 5), schedule(log_every=3)).metrics
    assert [m.step for m in some] == [3, 5]
    losses = [m.loss for m in each]
    assert [m.loss for m in some] == [losses[2], losses[4]]
    assert some[0].mean_loss == pytest.approx(sum(losses[:3]) / 3, rel=1e-12)
    assert some[1].mean_loss == pytest.approx(sum(losses[3:]) / 2, rel=1e-12)
    assert all(m.mean_loss == m.loss for m in each)


def test_metrics_are_in_their_ranges_and_replaced_rows_are_counted() -> None:
    log = run(tiny(), batches(0, 10, bad=(0, 1, 4, 7)), schedule())
    assert [m.bad_rows for m in log.metrics] == [2, 0, 1, 0, 1, 0]
    for m in log.metrics:
        assert 0 <= m.data_wait_fraction <= 1
        assert m.images_per_s > 0
        assert 0 <= m.top1 <= 1
        assert 0 <= m.entropy <= math.log(N) + 1e-6


def test_a_checkpoint_within_an_epoch_takes_nothing_from_the_next_report() -> None:
    plain = run(tiny(), batches(0, 5, bad=(0, 2)), schedule(log_every=5)).metrics
    saved = run(tiny(), batches(0, 5, bad=(0, 2)), schedule(log_every=5, checkpoint_every=3))
    assert ("checkpoint", 3) in saved.events
    (report,) = saved.metrics
    assert (report.mean_loss, report.bad_rows) == (plain[0].mean_loss, 2)


def stable(metrics: Metrics) -> Metrics:
    """Return what repeats to the last bit: all but the speed."""
    return metrics._replace(images_per_s=0.0, data_wait_fraction=0.0)


def test_a_resumed_run_reports_what_one_that_was_not_broken_does() -> None:
    """The mean of the loss too, whose steps are from before and from after the checkpoint."""
    table = schedule(log_every=4, checkpoint_every=3)
    kept: dict[int, tuple[nn.Module, torch.optim.Optimizer, str]] = {}

    def reports(
        first: int, model: nn.Module, optimizer: torch.optim.Optimizer, record: str
    ) -> list[Metrics]:
        meter = StepMeter(torch.device("cpu"), table, ReportInterval.of(json.loads(record)))

        def keep(step: int) -> None:
            interval = meter.interval()
            said = json.dumps(interval.record if interval else {})
            kept[step] = (*copy.deepcopy((model, optimizer)), said)

        log = Log()
        callbacks = replace(log.callbacks(), checkpoint=keep)
        stream = batches(first, 15, bad=(1, 6, 13))
        train(model, NTXentLoss(TEMPERATURE), optimizer, stream, table, callbacks, meter=meter)
        return [stable(metrics) for metrics in log.metrics]

    model = tiny()
    whole = reports(0, model, torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9), "{}")
    assert len({m.mean_loss for m in whole}) == len(whole) == 6
    for step in (3, 6, 9, 12):  # 3, 1, 1 and, with a report, 0 steps into an interval
        assert reports(step, *kept[step]) == [m for m in whole if m.step > step]
    assert [json.loads(kept[step][2]) == {} for step in (9, 12)] == [False, True]


def test_the_speed_after_a_resume_is_that_of_the_steps_since(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    meter = StepMeter(torch.device("cpu"), schedule(), ReportInterval(3, [6.0], 2))
    (batch,) = batches(3, 4, bad=(3,))
    meter.add(batch, torch.tensor(2.0))
    now = 102.0
    of_batch = BatchMetrics(torch.tensor(0.5), torch.tensor(0.1))
    metrics = meter.read(4, of_batch, torch.tensor(1.0))
    assert (metrics.mean_loss, metrics.bad_rows) == (8 / 4, 3)
    assert metrics.images_per_s == N / 2
    assert meter.interval() is None


@pytest.mark.parametrize(
    ("num_ranks", "expected"),
    [(2, [(1.0, 3), (4.0, 0)]), (3, [(2.5, 3), (2.5, 0), (2.5, 0)]), (1, [(2.5, 3)])],
)
def test_each_rank_goes_on_with_its_own_sum_or_among_others_with_the_mean(
    num_ranks: int, expected: list[tuple[float, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "world_size", lambda: num_ranks)
    resumed = []
    for rank in range(num_ranks):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        meter = StepMeter(torch.device("cpu"), schedule(), ReportInterval(2, [1.0, 4.0], 3))
        resumed.append((float(meter.loss_sum), meter.bad_rows))
    assert resumed == expected


def test_a_checkpoint_of_before_there_were_intervals_begins_one() -> None:
    assert ReportInterval.of({"step": 3, "experiment": {}}) is None


def test_a_checkpoint_is_no_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    meter = StepMeter(torch.device("cpu"), schedule())
    now = 103.0
    with meter.paused():
        now = 110.0
    assert now - meter.began == 3.0


def test_waiting_for_data_is_measured() -> None:
    waited: list[float] = []

    def slow() -> Iterator[Batch]:
        for batch in batches(0, 4):
            began = time.perf_counter()
            sum(i for i in range(2_000_000))  # work, many times what a step takes
            waited.append(time.perf_counter() - began)
            yield batch

    began, meter = time.perf_counter(), StepMeter(torch.device("cpu"), schedule(log_every=4))
    log = run(tiny(), meter.timed(slow()), schedule(log_every=4), meter=meter)
    elapsed = time.perf_counter() - began
    # on a loaded machine a step may take as long as the work, and the fraction must say so
    assert 0.9 * sum(waited) / elapsed < log.metrics[0].data_wait_fraction <= 1


def test_what_a_worker_does_to_a_batch_is_no_waiting_for_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU it waits for the step before, which would count as data."""

    def slow(_: object, batch: Batch, *__: object) -> ViewPair:
        time.sleep(0.05)
        return ViewPair(batch.a, batch.b)

    monkeypatch.setattr(worker_batches, "apply_color", slow)
    config: Any = Experiment.load(
        "cifar10_cpu", "data.train=x", f"batch_size={N}", "scaling.color_augment_on=worker"
    )
    meter = StepMeter(torch.device("cpu"), schedule(log_every=4))
    source: Any = SimpleNamespace(num_pairs=2 * N)
    stream = finish_batches(config, source, meter.timed(batches(0, 4)), meter.device)
    log = run(tiny(), stream, schedule(log_every=4), meter=meter)
    assert log.metrics[0].data_wait_fraction < 0.1


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(poison: float) -> None:
    model = tiny()

    def stream() -> Iterator[Batch]:
        for batch in batches(0, 5):
            if batch.step == 2:
                with torch.no_grad():
                    model.head.get_parameter("bias").fill_(poison)
            yield batch

    with pytest.raises(RunError, match="the loss is not finite at step 4 "):
        run(model, stream(), schedule(log_every=4))


def test_a_step_under_bf16_keeps_weights_and_loss_in_float32() -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    class Watched(NTXentLoss):
        def forward(self, z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> Tensor:
            value = super().forward(z1, z2, labels)
            seen.append((z1.dtype, value.dtype))
            return value

    model = tiny("bf16")
    low = run(
        model, batches(2, 5), schedule(log_every=1), precision="bf16", loss=Watched(TEMPERATURE)
    )
    assert set(seen) == {(torch.bfloat16, torch.float32)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    full = run(tiny(), batches(2, 5), schedule(log_every=1))
    for a, b in zip(low.metrics, full.metrics, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=2e-2)  # bf16 has 8 bits


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float64", torch.float64), ("float32", torch.float32), ("bf16", torch.float32)],
)
def test_images_enter_as_numbers_from_0_to_1_channels_last(
    precision: Precision, dtype: torch.dtype
) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    x = as_input(images, torch.device("cpu"), precision)
    assert x.dtype == dtype
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert float(x.min()) == 0.0
    assert float(x.max()) == pytest.approx(1.0, abs=1e-7)
    assert torch.allclose(x[0, 0].flatten(), torch.arange(256, dtype=dtype) / 255)


def test_training_resumes_training_mode_after_an_epochs_hook() -> None:
    model = tiny()
    modes: list[bool] = []
    model.encoder.register_forward_pre_hook(lambda m, _: modes.append(m.training))

    def evaluate(*_: int) -> None:
        model.eval()

    callbacks = Callbacks(lambda _: None, evaluate, lambda _: None)
    model.eval()
    loss, optimizer = NTXentLoss(TEMPERATURE), LARS(model.parameters(), lr=0.0)
    train(model, loss, optimizer, batches(0, 7), schedule(), callbacks)
    assert modes == [True] * 7


def test_gradients_do_not_reach_the_next_step() -> None:
    model = tiny()
    run(model, batches(0, 2), schedule())
    assert all(p.grad is None for p in model.parameters())
