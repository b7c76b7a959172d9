"""Pages of the documentation that the package writes: keys, commands, Python."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

import simclr_ray
from simclr_ray.cli.app import app
from simclr_ray.config.metrics import MEANINGS
from simclr_ray.config.reference import Key, keys

FOLDER = "reference"


def write(docs: Path) -> None:
    """Write the pages below a folder; one that is the same already is left, and not built again."""
    folder = docs / FOLDER
    folder.mkdir(exist_ok=True)
    pages = {
        "keys.md": keys_page(),
        "commands.md": commands_page(),
        "metrics.md": metrics_page(),
        "python.md": python_page(),
    }
    for name, text in pages.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def keys_page() -> str:
    """Return a section a section of an experiment, with a table of its keys."""
    lines = [
        "# Keys",
        "",
        "All keys of an experiment, as a YAML file has them or `key=value` sets them. "
        "`simclr-ray config --explain KEY` prints the same. A default of a preset may be another: "
        "`simclr-ray config PRESET` prints it whole.",
    ]
    sections: dict[str, list[Key]] = {"": []}
    for key in keys():
        first = key.path.split(".")[0].partition("[")[0]
        has_section = "." in key.path or key.takes == "keys"
        sections.setdefault(first if has_section else "", []).append(key)
    for section, own in sections.items():
        title = f"`{section}`" if section else "The experiment itself"
        lines += [
            "",
            f"## {title}",
            "",
            "| key | of | default | takes | |",
            "|---|---|---|---|---|",
        ]
        lines += [_row(key) for key in own if key.takes != "keys"]
    return "\n".join(lines) + "\n"


def _row(key: Key) -> str:
    cells = (
        f"`{key.path}`",
        f"`{key.variant}`" if key.variant else "",
        f"`{key.default}`" if key.default else "must be given",
        key.takes,
        key.says,
    )
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def commands_page() -> str:
    """Return a section a verb, with what its help says and a table of its options."""
    lines = ["# Commands", "", "As `simclr-ray VERB --help` prints them.", ""]
    for words, command in _commands(typer.main.get_command(app), ["simclr-ray"]):
        lines += [f"## `{' '.join(words[1:])}`", ""]
        lines += [*_help(command), ""]
        usage = " ".join([*words, *_arguments(command), "[OPTIONS]"])
        lines += ["```text", usage, "```", ""]
        rows = [row for parameter in command.params if (row := _parameter(parameter))]
        if rows:
            lines += ["| | default | |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _commands(group: Any, words: list[str]) -> Iterator[tuple[list[str], Any]]:
    for name, command in group.commands.items():
        if getattr(command, "hidden", False):
            continue
        if hasattr(command, "commands"):
            yield from _commands(command, [*words, name])
        else:
            yield [*words, name], command


def _help(command: Any) -> list[str]:
    """Return the text of a verb; its examples as commands."""
    text: list[str] = []
    examples: list[str] = []
    for line in (command.help or "").replace("\f", "").splitlines():
        if line.strip().startswith("Example: "):
            examples.append(line.strip().removeprefix("Example: "))
        elif examples and line.strip():
            examples[-1] += f" {line.strip()}"
        else:
            text.append(line.strip())
    block = ["", "```sh", *examples, "```"] if examples else []
    return [*"\n".join(text).strip().splitlines(), *block]


def _arguments(command: Any) -> list[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    shown = [
        (p, (p.metavar or p.name or "").strip("[]").removesuffix("...").upper()) for p in arguments
    ]
    return [name if p.required else f"[{name}]" for p, name in shown]


def _parameter(parameter: Any) -> str:
    if parameter.param_type_name != "option" or getattr(parameter, "hidden", False):
        return ""
    default = parameter.default
    shown = "" if default in (None, "", False) else str(default)
    shown = parameter.show_default if isinstance(parameter.show_default, str) else shown
    names = ", ".join(f"`{name}`" for name in parameter.opts)
    return f"| {names} | {shown} | {(parameter.help or '').replace('|', chr(92) + '|')} |"


def metrics_page() -> str:
    """Return the page of what a run logs."""
    lines = [
        "# Metrics",
        "",
        "Numbers of a run's `metrics.jsonl` and of MLflow. What they say of a run, and what to do "
        "where one looks wrong: [evaluation](../evaluation.md), [wrong](../wrong.md).",
        "",
        "| metric | |",
        "|---|---|",
    ]
    lines += [f"| `{name}` | {says} |" for name, says in MEANINGS.items()]
    return "\n".join(lines) + "\n"


def python_page() -> str:
    """Return the page of what `import simclr_ray as sr` has."""
    lines = [
        "# Python",
        "",
        "What `import simclr_ray as sr` has; `help()` of each says the same.",
        "",
    ]
    for name in sorted(simclr_ray.__all__, key=str.lower):
        kind = "autoclass" if isinstance(getattr(simclr_ray, name), type) else "autofunction"
        members = [":members:"] if kind == "autoclass" else []
        lines += [f"## {name}", "", "```{eval-rst}", f".. {kind}:: simclr_ray.{name}"]
        lines += [f"   {member}" for member in members]
        lines += ["```", ""]
    return "\n".join(lines)
