"""Study files: where they lie, their scales, and what overrides do to them."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from simclr_ray import config as cfg
from simclr_ray.config.imports import EVERYTHING, allow, allow_typed
from simclr_ray.errors import ConfigError, ConfigIssue
from simclr_ray.studies.definition import Study

NEVER_MERGED = ("name", "scales")


def study_names() -> list[str]:
    """Return the names of the studies that come with the package."""
    return sorted(p.stem for p in _folder().glob("*.yaml"))


class StudySummary(NamedTuple):
    """What a study file says of itself."""

    name: str
    answers: str
    question: str
    scales: list[str]


def summaries() -> list[StudySummary]:
    """Return what the studies that come with the package are about; each file is read once."""
    listed = []
    for name in study_names():
        tree, _ = _read(name)
        scales = tree.get("scales") or {}
        merged = {**tree, **next(iter(scales.values()), {})}
        listed.append(
            StudySummary(name, merged.get("answers", ""), merged["question"], list(scales))
        )
    return listed


def load_study(source: str, scale: str = "", *overrides: str, allow_code: bool = False) -> Study:
    """Return a study at one of its scales; every scale is checked, whichever is asked for.

    Args:
        source: A .yaml file, or the name of a study that comes with the package.
        scale: Of its `scales`; empty: the first one, or the study as it stands if it has none.
        overrides: `path=value` of every trial's experiment, or `study.key=value` of the study; code
            that they name is permitted by them.
        allow_code: Permit whatever code the study and its trials name, in this process.

    Raises:
        ConfigError: The file or a value is wrong; one issue each.
    """
    if allow_code:
        allow(EVERYTHING)
    tree, shown = _read(source)
    scales = tree.pop("scales", {}) or {}
    if not isinstance(scales, dict) or not all(isinstance(v, dict) for v in scales.values()):
        raise ConfigError([ConfigIssue("scales", "must be a mapping: scale -> keys of the study")])
    if scale and scale not in scales:
        hint = cfg.nearest(scale, scales)
        there = ", ".join(scales) or "none"
        raise ConfigError(
            [ConfigIssue("--scale", f"{shown} has no {scale!r}{hint}; it has: {there}")]
        )
    chosen = scale or next(iter(scales), "")
    trees = {name: _merged(tree, name, values) for name, values in scales.items()} or {"": tree}
    for name, merged in trees.items():
        if name != chosen:
            cfg.validate(Study, merged)
    study = cfg.validate(Study, _overridden(trees[chosen], overrides))
    given = [text.partition("=")[0] for text in overrides]
    wrong = [
        ConfigIssue(path, f"varies in space.{name}: what is given here would never count")
        for name, dim in study.space.items()
        for path in given
        if path == name
        or (dim.cases and all(case.get(path) is not None for case in dim.cases.values()))
    ]
    if wrong:
        raise ConfigError(wrong)
    for text in overrides:
        allow_typed(cfg.parse_yaml(text.partition("=")[2], text))
    return study


def _read(source: str) -> tuple[dict[str, Any], str]:
    if not source.endswith((".yaml", ".yml")):
        if source not in study_names():
            hint = cfg.nearest(source, study_names())
            names = ", ".join(study_names())
            problem = f"no study and no .yaml file{hint}; studies: {names}"
            raise ConfigError([ConfigIssue(source, problem)])
        source = str(_folder() / f"{source}.yaml")
    return cfg.read_tree(source)


def _folder() -> Path:
    """Return where the study files lie: in the package, or beside it in a checkout."""
    package = Path(str(resources.files("simclr_ray")))
    inside = package / "tune_configs"
    return inside if inside.is_dir() else package.parent / "tune_configs"


def _merged(tree: dict[str, Any], scale: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the study at a scale: `set` and `paper` are added to, other keys replaced."""
    wrong = [key for key in values if key in NEVER_MERGED]
    if wrong:
        raise ConfigError([ConfigIssue(f"scales.{scale}.{wrong[0]}", "is the same at every scale")])
    merged = {**tree, **values, "scale": scale}
    for key in ("set", "paper"):
        merged[key] = {**tree.get(key, {}), **values.get(key, {})}
    whole: dict[str, Any] = json.loads(json.dumps(merged))  # keys that look like numbers are text
    return whole


def _overridden(tree: dict[str, Any], overrides: tuple[str, ...]) -> dict[str, Any]:
    prefix = "study."
    own = [text.removeprefix(prefix) for text in overrides if text.startswith(prefix)]
    rest = [text for text in overrides if not text.startswith(prefix)]
    inside = [text for text in own if text.startswith("space.")]
    if inside:  # its keys are paths themselves
        problem = "values of the space are set as a whole: study.space='{path: {grid: [...]}}'"
        raise ConfigError([ConfigIssue(f"{prefix}{inside[0].partition('=')[0]}", problem)])
    tree = cfg.apply_overrides(tree, own, Study)
    given, issues = cfg.parse_overrides(rest)
    if issues:
        raise ConfigError(issues)
    tree["set"] = {**tree.get("set", {}), **dict(given)}
    return tree
