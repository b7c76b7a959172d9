"""The terminal: where lines and tables go, and how a command is written that can be copied."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from simclr_ray.config import logging as config_logging
from simclr_ray.config.uris import without_passwords

# a log has no edge, and rich takes 80 columns where it finds none
LOG_COLUMNS = 200


class _Console(Console):
    """Shows no password of a URI."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Same as rich's."""
        super().print(*(without_passwords(item) for item in objects), **options)


out = _Console(
    highlight=False,
    width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else LOG_COLUMNS,
)
err = _Console(stderr=True, highlight=False)

PROGRAM, MODULE = "simclr-ray", "simclr_ray"


class ConsoleHandler(logging.Handler):
    """Prints log lines as `HH:MM:SS message` above a progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line; a level is named from warnings on."""
        if config_logging.is_json():
            print(
                config_logging.json_line(self.format(record), record.levelname, record.created),
                file=sys.stderr,
            )
            return
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        say(f"{at} {level}{self.format(record)}")


def say(text: str) -> None:
    """Print a line on stderr."""
    if config_logging.is_json():
        level = "ERROR" if text.startswith("error: ") else "INFO"
        print(
            config_logging.json_line(text.removeprefix("error: "), level),
            file=sys.stderr,
            flush=True,
        )
        return
    err.print(text, soft_wrap=True, markup=False)


def is_live() -> bool:
    """Return whether bars and tables can move: on a terminal, where lines are text."""
    return err.is_terminal and not config_logging.is_json()


def loading(*packages: str) -> None:
    """Say which libraries are imported next, of those that are not there yet: it takes seconds."""
    missing = [name for name in packages if name not in sys.modules]
    if missing:
        say(f"loading {' and '.join(missing)} ...")


def command(*arguments: str) -> str:
    """Return a command of this program, as it was called, that can be copied into a shell."""
    called = Path(sys.argv[0])
    if called.name != PROGRAM:
        return shlex.join(["python", "-m", MODULE, *arguments])
    return shlex.join([_shortest(called), *arguments])


_done: set[str] = set()  # options of this command that are done, and would be done again


def is_done(option: str) -> None:
    """Leave an option out of the command that goes on."""
    _done.add(option)


def to_continue() -> str:
    """Return the command by which what this one has begun goes on."""
    return command(*(word for word in sys.argv[1:] if word not in _done))


def sibling(program: str, *arguments: str) -> str:
    """Return a command of another program, of the environment that this one was called from."""
    beside = Path(sys.argv[0]).with_name(program)
    if not beside.is_file():
        beside = Path(sys.executable).with_name(program)
    return shlex.join([_shortest(beside) if beside.is_file() else program, *arguments])


def _shortest(program: Path) -> str:
    """Return the name of a program if the shell finds it by that, else its path."""
    on_path = shutil.which(program.name)
    if on_path and Path(on_path).resolve() == program.resolve():
        return program.name
    return str(program)


def show_pairs(rows: Mapping[str, str]) -> None:
    """Print name and value, a line each."""
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        out.print(f"{name:<{width}}  {value}", soft_wrap=True, markup=False)


def show_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table."""
    out.print(text_table(title, columns, rows))


def text_table(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1
) -> Table:
    """Return a table of text as it is: brackets in a name are no markup.

    Args:
        title: Above it.
        columns: Headings.
        rows: Cells.
        left: Columns, of the first, that begin at the left; the others end at the right.
    """
    table = Table(title=Text(without_passwords(title), "table.title"), title_justify="left")
    for index, name in enumerate(columns):
        justify: Literal["left", "right"] = "left" if index < left else "right"
        table.add_column(Text(name), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(without_passwords(cell)) for cell in row))
    return table
