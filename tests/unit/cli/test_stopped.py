"""An interrupt decides the exit code, whatever error it comes out of the program as."""

from __future__ import annotations

import subprocess
import sys

from simclr_ray.cli.signals import STOPPED_BY_SYSTEM, STOPPED_BY_USER

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


def test_an_interrupt_that_the_shell_has_ignored_stays_ignored() -> None:
    code, said = ended("SIGINT", before="SIG_IGN")
    assert code == 0, said
