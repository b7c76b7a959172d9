"""An interrupt decides the exit code, whatever error it comes out of the program as."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from simclr_ray.cli import console
from simclr_ray.cli.signals import STOPPED_BY_SYSTEM, STOPPED_BY_USER
from simclr_ray.config.experiment import Experiment
from simclr_ray.distributed import demand
from simclr_ray.errors import ClusterError
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.train import stop

PROGRAM = """
import os, signal, sys
from simclr_ray.cli import main

def app(arguments, standalone_mode):
    try:
        os.kill(os.getpid(), signal.{signal})
    except KeyboardInterrupt:
        raise ImportError("numpy failed to import")  # as an extension module has it

signal.signal(signal.SIGINT, signal.{before})
main.app = app
main.main()
"""


def ended(sent: str, before: str = "default_int_handler") -> tuple[int, str]:
    program = PROGRAM.format(signal=sent, before=before)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stderr


def test_an_error_that_an_interrupt_turned_into_is_the_interrupt() -> None:
    code, said = ended("SIGINT")
    assert code == STOPPED_BY_USER
    assert said.startswith("stopped; to continue: ")
    assert "Traceback" not in said
    code, said = ended("SIGTERM")
    assert code == STOPPED_BY_SYSTEM
    assert said.startswith("stopped by the system; to continue: ")


LOST = """
import os, signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run by nohup
signal.signal(signal.SIGINT, signal.default_int_handler)  # or beside a shell
from simclr_ray.cli import main

class Closing:
    def __del__(self):
        os.kill(os.getpid(), signal.{signal})

def app(arguments, standalone_mode):
    Closing()  # an exception in there goes no further
    time.sleep(20)

main.app = app
main.main()
"""


@pytest.mark.parametrize("sent", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_an_interrupt_is_not_lost_where_it_cannot_be_raised(sent: str) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", LOST.format(signal=sent)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == (STOPPED_BY_USER if sent == "SIGINT" else STOPPED_BY_SYSTEM)
    assert "ignored" not in done.stderr
    assert time.monotonic() - began < 15


def test_where_workers_train_the_first_signal_is_theirs_and_the_second_interrupts(
    tmp_path: Path,
) -> None:
    folder = RunFolder.of(str(tmp_path), "r-1")
    assert not stop.defer()  # nobody trains
    with stop.writing_requests(folder):
        assert not stop.defer()  # nobody trains yet
        stop.workers_can_save()
        stop.workers_are_gone()
        assert not stop.defer()  # nobody until the next group trains
        stop.workers_can_save()
        watch = stop.FileWatch(folder, [stop.STOP, stop.RESIZE])
        assert stop.defer()
        assert not stop.defer()
        deadline = time.monotonic() + 20
        while not watch.seen and time.monotonic() < deadline:
            time.sleep(0.01)
        assert watch.seen == {stop.STOP}
        assert stop.is_requested(folder)
    assert not stop.is_requested(folder)
    assert not stop.defer()


def test_an_option_that_is_done_is_not_in_the_command_that_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(console, "_done", set())
    monkeypatch.setattr(sys, "argv", ["simclr-ray", "pretrain", "a.yaml", "--restart", "epochs=3"])
    assert console.to_continue().endswith("pretrain a.yaml --restart epochs=3")
    console.is_done("--restart")
    assert console.to_continue().endswith("pretrain a.yaml epochs=3")


def test_what_a_killed_driver_was_asked_is_not_asked_of_the_next(tmp_path: Path) -> None:
    folder = RunFolder.of(str(tmp_path), "r-1")
    stop.request_stop(folder, "process 1 on elsewhere")
    with stop.writing_requests(folder):
        assert not stop.is_requested(folder)


def test_what_a_driver_is_asked_while_it_starts_holds_when_workers_train(tmp_path: Path) -> None:
    folder = RunFolder.of(str(tmp_path), "r-1")
    with folder.lock():
        stop.request_stop(folder, folder.holder())
        with stop.writing_requests(folder):
            assert stop.is_requested(folder)
        assert not stop.is_requested(folder)


def test_a_driver_says_that_somebody_has_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop, "LOOK_S", 0.01)
    folder = RunFolder.of(str(tmp_path), "r-1")
    with caplog.at_level("INFO"), stop.writing_requests(folder):
        stop.request_stop(folder, "process 1 on elsewhere")
        until = time.monotonic() + 20
        while "as `run stop` asks" not in caplog.text and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(1.0)  # for it to be said again
    assert caplog.text.count("as `run stop` asks") == 1


def test_who_waits_for_nodes_can_be_asked_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(_: object) -> None:
        raise ClusterError("the cluster has 1 node")

    monkeypatch.setattr(demand, "check_cluster", lacks)
    monkeypatch.setattr(demand, "Demand", lambda _: SimpleNamespace(show=lambda _: None))
    config = Experiment.load("cifar10_cpu", "scaling.wait_for_nodes_s=600")
    with pytest.raises(KeyboardInterrupt):
        demand.wait_for_room(config, lambda: True)


def test_an_interrupt_that_the_shell_has_ignored_stays_ignored() -> None:
    code, said = ended("SIGINT", before="SIG_IGN")
    assert code == 0, said
