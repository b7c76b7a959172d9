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
from simclr_ray.studies.space import is_same

NEVER_MERGED = ("name", "scales")
ADDED = ("set", "paper")  # of a scale: to the study's, which other keys replace


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
    if isinstance(scales, dict):
        scales = {str(name): values for name, values in scales.items()}
    if not isinstance(scales, dict) or not all(isinstance(v, dict) for v in scales.values()):
        raise ConfigError.of("scales", "must be a mapping: scale -> keys of the study")
    if scale and scale not in scales:
        hint = cfg.nearest(scale, scales)
        there = ", ".join(scales) or "none"
        raise ConfigError.of("--scale", f"{shown} has no {scale!r}{hint}; it has: {there}")
    chosen = scale or next(iter(scales), "")
    trees = {name: _merged(tree, name, values) for name, values in scales.items()} or {"": tree}
    for name, merged in trees.items():
        if name != chosen:
            cfg.validate(Study, merged, f"{shown}, scale {name}")
    study = cfg.validate(Study, _overridden(trees[chosen], overrides), shown)
    paths = [text.partition("=")[0] for text in overrides]
    wrong = [
        ConfigIssue(path, f"varies in space.{name}: what is given here would never count")
        for name, dim in study.space.items()
        for path in paths
        if path == name
        or (dim.cases and all(case.get(path) is not None for case in dim.cases.values()))
    ]
    if wrong:
        raise ConfigError(wrong)
    for text in overrides:
        allow_typed(cfg.parse_yaml(text.partition("=")[2], text))
    return study


def _read(source: str) -> tuple[dict[str, Any], str]:
    if not source.endswith(cfg.YAML_SUFFIXES):
        if source not in study_names():
            hint = cfg.nearest(source, study_names())
            names = ", ".join(study_names())
            is_there = bool(source) and Path(source).exists()
            problem = "is no .yaml file" if is_there else f"no study and no .yaml file{hint}"
            raise ConfigError.of(source or repr(source), f"{problem}; studies: {names}")
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
        raise ConfigError.of(f"scales.{scale}.{wrong[0]}", "is the same at every scale")
    merged = {**tree, **values, "scale": scale}
    for key in ADDED:
        if key in tree and key in values:
            merged[key] = {**_mapping(tree, key), **_mapping(values, key)}
    whole: dict[str, Any] = json.loads(json.dumps(merged))  # keys that look like numbers are text
    return whole


def _overridden(tree: dict[str, Any], overrides: tuple[str, ...]) -> dict[str, Any]:
    prefix = "study."
    own = [text.removeprefix(prefix) for text in overrides if text.startswith(prefix)]
    rest = [text for text in overrides if not text.startswith(prefix)]
    inside = [text for text in own if text.startswith("space.")]
    if inside:  # its keys are paths themselves
        problem = "values of the space are set as a whole: study.space='{path: {grid: [...]}}'"
        raise ConfigError.of(f"{prefix}{inside[0].partition('=')[0]}", problem)
    tree = cfg.apply_overrides(tree, own, Study)
    values, issues = cfg.parse_overrides(rest)
    if issues:
        raise ConfigError(issues)
    tree["set"] = {**_mapping(tree, "set"), **dict(values)}
    if any(text.startswith("space=") for text in own):
        tree = _without_matches_of_others(tree)
    return tree


def _without_matches_of_others(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a study whose space is another than its file's, less matches of what is not run."""
    paper, space = _mapping(tree, "paper"), _mapping(tree, "space")
    matches = {}
    for name, theirs in _mapping(paper, "matches").items():
        dim = space.get(name)
        listed = dim if isinstance(dim, dict) else {}
        settings = [value for key in ("grid", "choice", "cases") for value in listed.get(key) or ()]
        matches[name] = {
            k: v for k, v in theirs.items() if any(is_same(k, own) for own in settings)
        }
    kept = {name: values for name, values in matches.items() if values}
    return {**tree, "paper": {**paper, "matches": kept}} if paper else tree


def _mapping(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a mapping of the file; raise `ConfigError` where something else stands there."""
    value = tree.get(key, {})
    if not isinstance(value, dict):
        raise ConfigError.of(key, f"got {value!r}; it must be keys and values")
    return value
