"""Which run a launch file carries: of its own command, or of what was typed beside it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.studies.files import load_study
from simclr_ray.studies.plan import base_tree
from simclr_ray.studies.trials import plan


def run_of(command: str, typed: Sequence[str]) -> tuple[Experiment | None, int]:
    """Return the experiment of a launch file, and how many trials it has.

    Args:
        command: The file's own, `pretrain ...` or `study run ...`; empty for none.
        typed: A preset or YAML file with overrides, in place of the command's; or overrides alone,
            after the command's.

    Raises:
        ConfigError: Preset, study or overrides are wrong.
    """
    if typed and "=" not in typed[0]:
        return Experiment.load(*typed), 1
    if not command:
        return None, 1
    words = shlex.split(command)
    if words[0] == "pretrain":
        source, overrides, _ = _split(words[1:])
        return Experiment.load(source, *overrides, *typed), 1
    source, overrides, scale = _split(words[2:])
    study = load_study(source, scale, *overrides, *typed)
    tree = base_tree(study)
    base = cfg.validate(Experiment, tree)
    return base.model_copy(update={"storage": _above(base.storage)}), len(plan(study, tree))


def _split(words: Sequence[str]) -> tuple[str, list[str], str]:
    """Return source, overrides and scale of the words after a verb; other options say nothing."""
    source, scale, overrides = words[0], "", []
    rest = iter(words[1:])
    for word in rest:
        option, equals, value = word.partition("=")
        if option == "--scale":
            scale = value if equals else next(rest, "")
        elif not word.startswith("--"):
            overrides.append(word)
    return source, overrides, scale


def _above(runs: str) -> str:
    """Return the storage of a study, whose runs lie in `storage/studies/NAME/runs`."""
    return "/".join(runs.split("/")[:-3])
