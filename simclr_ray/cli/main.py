"""Run the command line, mapping errors to exit codes."""

from __future__ import annotations

import errno
import sys

import typer

from simclr_ray.augment.decode import ImageError
from simclr_ray.cli.app import app
from simclr_ray.cli.console import ConsoleHandler, say
from simclr_ray.cli.signals import STOPPED_BY_USER, exit_code_of_stop, listen, was_stopped
from simclr_ray.config import logging as logs
from simclr_ray.config.imports import EVERYTHING, allow
from simclr_ray.errors import ConfigError, SimclrRayError
from simclr_ray.storage.filesystem import one_line

ALLOW_CODE = "--allow-code"
# What a path of the user's can be, wherever it is met: the system says it better than we could.
OF_A_PATH = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.EEXIST,
    errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
}  # fmt: skip
app.info.epilog = (
    f"{ALLOW_CODE}, anywhere on the line: permit the code that a file imports by `name: import`; "
    "what the line itself names is permitted by that."
)


def permitted(arguments: list[str]) -> list[str]:
    """Return the arguments without `--allow-code`, which holds for the whole process."""
    if ALLOW_CODE in arguments:
        allow(EVERYTHING)
    return [argument for argument in arguments if argument != ALLOW_CODE]


def say_error(error: Exception) -> int:
    """Say what is wrong in a line an issue, and return the exit code; other errors are raised."""
    if isinstance(error, ConfigError):
        for issue in error.issues:
            say(f"error: {issue}")
        return error.exit_code
    if isinstance(error, SimclrRayError | ImageError):
        say(f"error: {error}")
        return error.exit_code if isinstance(error, SimclrRayError) else 2
    if isinstance(error, OSError) and error.errno in OF_A_PATH:
        say(f"error: {one_line(error)}")
        return 2
    raise error


def main() -> None:
    """Run the command line, mapping errors to exit codes."""
    logs.configure(ConsoleHandler())
    listen()
    code = 0
    try:
        app(permitted(sys.argv[1:]))
    except SystemExit as stop:  # typer ends by one, whatever happened; interrupts are 130
        code = stop.code if isinstance(stop.code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED_BY_USER
    except Exception as error:  # noqa: BLE001 - raised again where it is no message
        code = STOPPED_BY_USER if was_stopped() else say_error(error)
    if code == STOPPED_BY_USER:
        code = exit_code_of_stop()
    sys.exit(code)
