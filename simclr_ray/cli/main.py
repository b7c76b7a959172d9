"""Run the command line, mapping errors to exit codes."""

from __future__ import annotations

import atexit
import errno
import os
import sys
import threading
from contextlib import suppress
from typing import Any

import typer

from simclr_ray.augment.decode import ImageError
from simclr_ray.cli.app import app
from simclr_ray.cli.console import ConsoleHandler, command, say, to_continue
from simclr_ray.cli.signals import (
    STOPPED_BY_SYSTEM,
    STOPPED_BY_USER,
    exit_code_of_stop,
    listen,
)
from simclr_ray.cli.time_limit import is_waiting
from simclr_ray.config import logging as config_logging
from simclr_ray.config.imports import EVERYTHING, allow
from simclr_ray.errors import ConfigError, SimclrRayError, StorageError, one_line
from simclr_ray.storage.space import FULL, storage_error
from simclr_ray.train.stop import was_interrupted

UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # typer gives it no name of its own
ALLOW_CODE = "--allow-code"
# What a path of the user's can be, wherever it is met: the system says it better than we could.
OF_A_PATH = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.EEXIST,
    errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE,
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
    if isinstance(error, OSError) and error.errno in FULL:
        error = storage_error(error, "the disk") or error
    if isinstance(error, ConfigError):
        for issue in error.issues:
            say(f"error: {issue}")
        return error.exit_code
    if isinstance(error, StorageError):
        say(f"error: {error}; to continue: {to_continue()}")
        return error.exit_code
    if isinstance(error, SimclrRayError | ImageError):
        say(f"error: {error}")
        return error.exit_code if isinstance(error, SimclrRayError) else 2
    if isinstance(error, OSError) and error.errno in OF_A_PATH:
        say(f"error: {one_line(error)}")
        return 2
    raise error


def say_usage(error: Any) -> None:
    """Say in a line what is wrong with verbs, options and arguments, or show a group's help."""
    context = error.ctx
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    problem = error.format_message().rstrip(".")
    option = str(getattr(error, "option_name", ""))
    takes_overrides = any(p.nargs == -1 for p in context.command.params) if context else False
    if option.startswith("--") and takes_overrides and not getattr(error, "possibilities", None):
        key = option.removeprefix("--").replace("-", "_")
        problem += f"; keys are set without dashes: {key}=VALUE"
    verbs: list[str] = []
    while context and context.parent:  # the outermost is the program
        verbs.insert(0, context.info_name)
        context = context.parent
    say(f"error: {problem[:1].lower()}{problem[1:]}; see {command(*verbs, '--help')}")


def main() -> None:
    """Run the command line, mapping errors to exit codes."""
    config_logging.configure(ConsoleHandler())
    listen()
    code = 0
    try:
        config_logging.check_format()
        code = app(permitted(sys.argv[1:]), standalone_mode=False) or 0
        sys.stdout.flush()
    except UsageError as error:
        say_usage(error)
        code = 2
    except BrokenPipeError:  # `| head`: who reads our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED_BY_USER
    except Exception as error:  # noqa: BLE001 - raised again where it is no message
        code = STOPPED_BY_USER if was_interrupted() else say_error(error)
    if code == STOPPED_BY_USER:
        code = exit_code_of_stop()
    sys.exit(code)


def program() -> None:
    """Run the command line as this process's program, and end it at once.

    To take an interpreter with torch and Ray apart lasts 1.5 s, and threads of Ray and Arrow that
    were interrupted midway crash at it now and then, and with them goes the exit code. So all that
    is to be done at an end is done here. After an interrupt Ray does not take its client apart,
    which crashes as well: a cluster ends a job whose client is gone, and the one that was started
    here is stopped by another exit function. A command that a store has not answered (`time_limit`)
    ends without any of it: it would wait for the store.
    """
    try:
        main()
    except SystemExit as end:
        if is_waiting():
            _flush()
            os._exit(int(end.code or 0))
        code = int(end.code or 0)
        threading._shutdown()  # type: ignore[attr-defined] # as the interpreter does: waits for them
        if code in (STOPPED_BY_USER, STOPPED_BY_SYSTEM) and (ray := sys.modules.get("ray")):
            atexit.unregister(ray.shutdown)
        atexit._run_exitfuncs()
        _flush()
        os._exit(code)


def _flush() -> None:
    with suppress(OSError):  # a terminal that is gone
        sys.stdout.flush()
        sys.stderr.flush()
