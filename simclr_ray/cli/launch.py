"""Which run a launch file carries: of its own command, or of what was typed beside it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.studies.files import load_study
from simclr_ray.studies.plan import base_tree
from simclr_ray.studies.trials import plan


def runs_of(command: str, typed: Sequence[str]) -> list[Experiment]:
    """Return the run of a launch file, or the trials of its study; empty where it starts none.

    Args:
        command: The file's own, `pretrain ...` or `study run ...`; empty for none.
        typed: A preset or YAML file with overrides, in place of the command's; or overrides alone,
            after the command's.

    Raises:
        ConfigError: Preset, study or overrides are wrong.
    """
    if typed and "=" not in typed[0]:
        return [_loaded(*typed)]
    if not command:
        return []
    words = shlex.split(command)
    if words[0] == "pretrain":
        source, overrides, _ = _split(words[1:])
        return [_loaded(source, *overrides, *typed)]
    source, overrides, scale = _split(words[2:])
    study = load_study(source, scale, *overrides, *typed)
    base, _ = cfg.read_tree(study.base)
    trials = plan(study, base_tree(study))
    return [_as_stated(trial.experiment, base, study.set) for trial in trials]


def _loaded(source: str, *overrides: str) -> Experiment:
    experiment = Experiment.load(source, *overrides).check_num_workers()
    tree, _ = cfg.read_tree(source)
    return _as_stated(experiment, cfg.apply_overrides(tree, overrides, Experiment), {})


def _as_stated(run: Experiment, tree: Mapping[str, Any], values: Mapping[str, Any]) -> Experiment:
    """Return a run with its places as they were written, not as this machine completes them.

    A relative path, which each node has for itself, is an absolute one by then, and a store that
    nobody named is a file.
    """

    def stated(section: str, key: str) -> dict[str, Any]:
        inner = tree.get(section, {})
        value = values.get(f"{section}.{key}", inner.get(key) if isinstance(inner, dict) else None)
        return {} if value is None else {key: str(value)}

    data = {k: v for key in ("train", "test", "eval_train") for k, v in stated("data", key).items()}
    uri = {"uri": ""} | stated("tracking", "uri")
    return run.model_copy(
        update={
            "storage": str(values.get("storage", tree.get("storage", "runs"))),
            "tracking": run.tracking.model_copy(update=uri),
            "data": run.data.model_copy(update=data),
        }
    )


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
