"""The trials of a study: every point of its space as a whole experiment, checked before any runs.

Where the rate does not depend on the length of the run (`schedule.decay=constant`), a run of 1,000
epochs passes through those of 100 to 900: such lengths share one run. A cosine that ends at zero
has another rate at every step for every length, so there each length is a run of its own.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from simclr_ray import config as cfg
from simclr_ray.config import Scalar
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.metrics import EPOCH_METRICS
from simclr_ray.config.moves import Move, relocated
from simclr_ray.config.wording import counted
from simclr_ray.data.image_groups import open_grouped
from simclr_ray.data.source import Source
from simclr_ray.errors import ConfigError, ConfigIssue, DataError
from simclr_ray.storage.filesystem import address_above, address_below
from simclr_ray.studies.definition import CLASSIFIER_METRICS, EITHER, VIEW_METRICS, Study
from simclr_ray.studies.space import label_of
from simclr_ray.tracking.store import DATABASE, store_uri

if TYPE_CHECKING:
    from simclr_ray.augment.crop_statistics import CropTaskFractions

FOLDER, RUNS = "studies", "runs"
EPOCHS = "epochs"
MAX_NAME_CHARS = 100
LABEL_FREE = ("views/", "probe/")  # beside what `EPOCH_METRICS` says
OF_CLASSES = ("probe/class_h", "probe/class_z")

Point = dict[str, Scalar]  # dimension -> value, or the name of a case


class Cell(NamedTuple):
    """One point of the space, and where in its trial's run it is read."""

    point: Point
    epoch: int  # 0: at the end


class Trial(NamedTuple):
    """One run: usually one point with one seed, of a shared run several lengths."""

    name: str
    cells: tuple[Cell, ...]
    seed: int
    experiment: Experiment

    @property
    def point(self) -> Point:
        """The point that names it: the longest."""
        return self.cells[-1].point


class Forecast(NamedTuple):
    """What a study will take."""

    num_trials: int
    num_points: int
    epochs: int
    images: int  # that pass the encoder, two views each
    hours: float  # of one trial after the other; 0: unknown
    device_hours: float


def points_of(study: Study) -> list[Point]:
    """Return every point of a space whose dimensions are all listed."""
    names = list(study.space)
    values = ([label_of(v) for v in dim.listed] for dim in study.space.values())
    return [
        dict(zip(names, combination, strict=True)) for combination in itertools.product(*values)
    ]


def make_trials(study: Study, tree: Mapping[str, Any], points: Iterable[Point]) -> list[Trial]:
    """Return the trials of some points, all seeds; the first seed's come first.

    Args:
        study: What varies.
        tree: As `base_tree` returns it.
        points: Of the study's space.

    Raises:
        ConfigError: A path or value cannot be; every issue once.
    """
    trials: dict[str, Trial] = {}
    issues: dict[str, ConfigIssue] = {}  # one a path: what is wrong with a key is so for all values
    points = list(points)
    for seed in study.seeds:
        for point in points:
            try:
                trial = _trial(study, tree, point, seed)
            except ConfigError as error:
                issues = {issue.path or issue.problem: issue for issue in error.issues} | issues
                continue
            trials.setdefault(trial.name, trial)
    if issues:
        raise ConfigError(list(issues.values()))
    made = _shared_runs(study, _merged(trials.values()))
    for trial in made:
        _check_reports(study, trial)
    longest = max((t.experiment.epochs for t in made), default=1)
    if study.scheduler.grace_epochs > (study.scheduler.max_epochs or longest):
        problem = (
            f"must be at most {study.scheduler.max_epochs or longest}, the epochs of the last rung"
        )
        raise ConfigError.of("scheduler.grace_epochs", problem)
    if study.budget.trials and len(made) > study.budget.trials:
        problem = f"{len(made)} trials are wanted, budget.trials={study.budget.trials} allows fewer"
        raise ConfigError.of("budget.trials", problem)
    return made


def images_of(trials: Sequence[Trial]) -> dict[str, int]:
    """Return how many images each trial trains on, by name; opens each set once.

    Raises:
        DataError: Images cannot be read, or fill no batch.
    """
    sets = {trial.experiment.data for trial in trials}
    num_pairs = {d: open_grouped(d.train, d.columns, d.limit).num_pairs for d in sets}
    without = [t for t in trials if num_pairs[t.experiment.data] < t.experiment.batch_size]
    if without:
        experiment = max((t.experiment for t in without), key=lambda e: e.batch_size)
        kind = "groups" if experiment.data.columns.group else "rows"
        raise DataError(
            f"{experiment.data.train}: {num_pairs[experiment.data]} {kind} do not fill one global "
            f"batch of {experiment.batch_size} ({len(without)} of {counted(len(trials), 'trial')}, "
            f"as {without[0].name}); lower batch_size or bring more images"
        )
    return {
        t.name: t.experiment.total_steps(num_pairs[t.experiment.data]) * t.experiment.batch_size
        for t in trials
    }


def forecast(study: Study, trials: Sequence[Trial]) -> Forecast:
    """Return what trials take, those of a search that learns by the mean of some.

    Raises:
        DataError: As in `images_of`.
    """
    runs_per_trial = study.search.runs_per_trial(len(trials))
    images, rate = images_of(trials), study.images_per_s
    workers = {trial.name: trial.experiment.scaling.max_workers for trial in trials}
    num_images = runs_per_trial * sum(images.values())
    worker_images = runs_per_trial * sum(n * workers[k] for k, n in images.items())
    points = {json.dumps(cell.point) for trial in trials for cell in trial.cells}
    return Forecast(
        round(runs_per_trial * len(trials)),
        round(runs_per_trial * len(points)),
        round(runs_per_trial * sum(trial.experiment.epochs for trial in trials)),
        round(num_images),
        num_images / rate / 3600 if rate else 0.0,
        worker_images / rate / 3600 if rate else 0.0,
    )


def task_fractions_of(experiment: Experiment) -> CropTaskFractions | None:
    """Return how often pairs of crops of square images set each task, or None without crops."""
    from simclr_ray.augment.crop_statistics import crop_task_fractions
    from simclr_ray.data.batches import build_views

    side = experiment.evaluation_size
    return crop_task_fractions(build_views(experiment.augment, experiment.seed), side, side)


def study_folder(study: Study) -> tuple[str, str]:
    """Return the storage and the name of a study's folder."""
    tree, _ = cfg.read_tree(study.base)
    storage = _with(tree, study.set).get("storage", "runs")
    return address_below(cfg.absolute_path(str(storage)), FOLDER), study.name


def base_tree(study: Study) -> dict[str, Any]:
    """Return the tree of the experiment that all points start from, its runs in the study's folder.

    Raises:
        ConfigError: The base or a value of `set` cannot be.
    """
    tree, shown = cfg.read_tree(study.base)
    if isinstance(tree.setdefault("health", {}), dict):  # what is none is refused with the rest
        tree["health"] = {"on_collapse": "warn"} | tree["health"]
    wrong = [ConfigIssue(f"set.{k}", "is what the study decides") for k in study.set if k in _OWN]
    wrong += [
        ConfigIssue(f"space: {path}", "cannot vary" + " but by `seeds`" * (path == "seed"))
        for paths in _dimensions(study)
        for path in paths
        if path in _NOT_VARIED or path.split(".")[0] in _NOT_VARIED
    ]
    if wrong:
        raise ConfigError(wrong)
    base = cfg.validate(Experiment, _with(tree, study.set), shown)
    base.check_num_workers()
    paths = sorted({path for dim in _dimensions(study) for path in dim})
    uri = store_uri(base.tracking.uri, base.storage)
    tracking = base.tracking.model_copy(update={"uri": uri, "only_params": [*paths, "seed"]})
    runs = address_below(address_below(*study_folder(study)), RUNS)
    return cfg.to_tree(base.model_copy(update={"storage": runs, "tracking": tracking}))


def restored(tree: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the tree of a stored base as it was given: its storage is the one above the study.

    A study's folder that was moved goes on where it lies now, with what was moved with it.
    """
    storage, before = address_above(folder, 2), address_above(tree["storage"], 3)
    is_local = before.startswith("/") and storage.startswith("/")
    move = Move.between(before, storage) if is_local else None
    if move is not None:
        tree = relocated(tree, move)
    tracking = {k: v for k, v in tree["tracking"].items() if k != "only_params"}
    of_storage = [f"sqlite:///{address_below(of, DATABASE)}" for of in (before, storage)]
    if tracking["uri"] in of_storage:  # wherever it is
        tracking["uri"] = ""
    return {**tree, "storage": storage, "tracking": tracking}


def check_labels(study: Study, trials: Sequence[Trial]) -> None:
    """Raise `ConfigError` for a metric that needs labels where splits have none; opens them."""
    metric = EPOCH_METRICS.get(study.metric)
    is_free = study.metric.startswith(LABEL_FREE) and study.metric not in OF_CLASSES
    needs_labels = metric.needs_labels if metric else not is_free
    if not needs_labels:
        return
    for data in {t.experiment.data for t in trials}:
        for path in (data.test, data.eval_train or data.train):
            if not Source.open(path, data.columns).has_labels:
                problem = f"{study.metric} needs labels, and {path} has none"
                raise ConfigError.of("metric", problem)


def note_on_lengths(study: Study, trials: Sequence[Trial]) -> str:
    """Return whether lengths share runs, and why; nothing where length does not vary."""
    if EPOCHS not in study.space:
        return ""
    if any(len(trial.cells) > 1 for trial in trials):
        return "lengths are read off one run each, since the rate does not depend on the length"
    if study.metric not in EPOCH_METRICS:
        return f"each length is a run of its own: {study.metric} is known at the end alone"
    if all(trial.experiment.schedule.decay == "constant" for trial in trials):
        return "each length is a run of its own: a scheduler, a case or growing views need it"
    return "each length is a run of its own: the cosine schedule has another rate at every step"


_OWN = ("seed", "name", "tracking.parent_run", "tracking.only_params", "registry.name")
_NOT_VARIED = (*_OWN, "storage", "tracking")


def _dimensions(study: Study) -> Iterator[list[str]]:
    for name, dim in study.space.items():
        paths = [path.rstrip("+") for case in dim.cases.values() for path in case]
        yield paths if dim.cases else [name]


def _trial(study: Study, tree: Mapping[str, Any], point: Point, seed: int) -> Trial:
    values: dict[str, Any] = {"seed": seed}
    for name, dim in study.space.items():
        if not dim.cases:
            listed = {label_of(v): v for v in dim.listed}
            values[name] = listed.get(point[name], point[name])
    cases = [dim.cases[str(point[name])] for name, dim in study.space.items() if dim.cases]
    for case in cases:  # one may say that another dimension has no place
        values |= {path: value for path, value in case.items() if not path.endswith("+")}
    made = _with(tree, {path: value for path, value in values.items() if value is not None})
    for case in cases:
        made = _appended(made, {p[:-1]: v for p, v in case.items() if p.endswith("+")})
    name = name_of(study, point, seed)
    experiment = cfg.validate(Experiment, {**made, "name": name})
    if experiment.health.rolls_back:  # a setting that learns nothing is a point as well
        raise ConfigError.of("health", "rollback changes the rate: not in studies")
    return Trial(name, (Cell(point, 0),), seed, experiment)


def name_of(study: Study, point: Point, seed: int) -> str:
    """Return the name of a trial, which is that of its run: readable, and its own."""
    parts = [f"{key.split('.')[-1]}-{value}" for key, value in point.items()]
    text = "_".join([*parts, f"seed-{seed}"])
    short = re.sub(r"[^A-Za-z0-9_.-]+", "-", text)
    if len(short) > MAX_NAME_CHARS or short != text:
        digest = cfg.digest_of({"point": point, "seed": seed, "study": study.name})[:6]
        short = f"{short[: MAX_NAME_CHARS - 7]}-{digest}"
    return short.lstrip("_.-")


def _with(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree with `path=value` set; JSON is YAML, so that any value can be written down."""
    texts = [f"{path}={json.dumps(value)}" for path, value in values.items()]
    return cfg.apply_overrides(tree, texts, Experiment)


def _appended(tree: Mapping[str, Any], added: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Return a tree with items added to its lists; what is there already is not added again."""
    texts = []
    for path, items in added.items():
        node: Any = tree
        for key in path.split("."):
            node = node.get(key, []) if isinstance(node, Mapping) else []
        if not isinstance(node, list):
            raise ConfigError.of(f"{path}+", "is no list, so nothing can be added to it")
        texts.append((path, [*node, *(item for item in items if item not in node)]))
    return _with(tree, dict(texts))


def _merged(trials: Iterable[Trial]) -> list[Trial]:
    """Return trials that are one experiment as one, which stands for all their points."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        same = {k: v for k, v in cfg.to_tree(trial.experiment).items() if k != "name"}
        groups.setdefault(cfg.digest_of(same), []).append(trial)
    return [
        group[-1]._replace(cells=tuple(cell for trial in group for cell in trial.cells))
        for group in groups.values()
    ]


def _shared_runs(study: Study, trials: list[Trial]) -> list[Trial]:
    """Return trials that differ in length alone as one, where one run passes through all."""
    shared = (
        EPOCHS in study.space
        and not study.space[EPOCHS].cases
        and study.metric in EPOCH_METRICS
        and study.scheduler.name == "none"
        and all(t.experiment.schedule.decay == "constant" for t in trials)
        and not any(t.experiment.augment.start_size for t in trials)  # grows with the length
    )
    if not shared:
        return trials
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        rest = {k: v for k, v in trial.point.items() if k != EPOCHS}
        groups.setdefault(json.dumps([rest, trial.seed]), []).append(trial)
    return [_shared_run(group) for group in groups.values()]


def _shared_run(group: list[Trial]) -> Trial:
    group = sorted(group, key=lambda t: t.experiment.epochs)
    lengths = [t.experiment.epochs for t in group]
    every = math.gcd(*lengths)
    longest = group[-1]
    evaluation = longest.experiment.evaluation.model_copy(update={"every_epochs": every})
    experiment = longest.experiment.model_copy(update={"evaluation": evaluation})
    cells = tuple(Cell(c.point, t.experiment.epochs) for t in group for c in t.cells)
    return Trial(longest.name, cells, longest.seed, experiment)


def _check_reports(study: Study, trial: Trial) -> None:
    """Raise for a metric that this trial cannot report."""
    experiment, metric = trial.experiment, study.metric
    problem = ""
    if metric in EPOCH_METRICS and not experiment.evaluation.every_epochs:
        problem = "nobody reports it: evaluation.every_epochs is 0"
    elif metric == "eval/knn_top1" and not experiment.data.test:
        problem = "nobody reports it: data.test is empty"
    elif metric not in EPOCH_METRICS and not experiment.data.test:
        problem = "needs labelled images in data.test"
    elif metric in CLASSIFIER_METRICS and experiment.head.name != "classifier":
        problem = f"is a classifier's; trial {trial.name} has head.name={experiment.head.name}"
    elif (
        metric == EITHER
        and experiment.head.name != "classifier"
        and "linear" not in study.protocols
    ):
        problem = "needs `linear` among protocols"
    elif metric in VIEW_METRICS and task_fractions_of(experiment) is None:
        problem = "views that do not begin with a crop each have no such shares"
    if problem:
        raise ConfigError.of("metric", f"{metric}: {problem}")
