"""Run the command line, mapping errors to exit codes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from simclr_ray.augment.decode import ImageError
from simclr_ray.cli.console import err
from simclr_ray.cli.signals import STOPPED_BY_USER, exit_code_of_stop, listen
from simclr_ray.config import logging as logs
from simclr_ray.errors import ConfigError, SimclrRayError

if TYPE_CHECKING:
    pass
from simclr_ray.cli import demo as _demo  # noqa: F401 - its verb registers itself
from simclr_ray.cli.app import app


def main() -> None:
    """Run the command line, mapping errors to exit codes."""
    logs.configure()
    listen()
    code = 0
    try:
        app()
    except ConfigError as error:
        for issue in error.issues:
            err.print(f"error: {issue}", markup=False, soft_wrap=True)
        code = error.exit_code
    except (SimclrRayError, ImageError) as error:
        err.print(f"error: {error}", markup=False, soft_wrap=True)
        code = error.exit_code if isinstance(error, SimclrRayError) else 2
    except SystemExit as stop:  # typer ends by one, whatever happened; interrupts are 130
        code = stop.code if isinstance(stop.code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED_BY_USER
    if code == STOPPED_BY_USER:
        code = exit_code_of_stop()
    sys.exit(code)
