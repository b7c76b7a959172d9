"""A run's page: one HTML file with all that its folder says, and a look at what it has learned.

What is stored comes first: curves, scores, cost, what went wrong on the way. Neighbours and
confused classes take the images and the newest checkpoint; where either is gone they are left out.
"""

from __future__ import annotations

import logging
import shlex
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from PIL import Image

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.moves import relocated_run, stored_tree
from simclr_ray.config.wording import clock, counted
from simclr_ray.data.contact_sheet import Thumbnail, data_uri, thumbnail_of
from simclr_ray.data.source import Source
from simclr_ray.errors import SimclrRayError, one_line
from simclr_ray.evaluation.classification import LABELS, Classification
from simclr_ray.evaluation.evaluate import probed_source
from simclr_ray.evaluation.neighbours import Neighbour, NeighbourSample, sample_neighbours
from simclr_ray.evaluation.scores import Score, metrics_shown, short_table
from simclr_ray.nn.build import build_loss
from simclr_ray.nn.loss import ChanceLevel
from simclr_ray.storage.filesystem import filesystem, write_text_whole
from simclr_ray.storage.metrics_log import FIRST_BATCH, TIME, read_records
from simclr_ray.storage.page import render_page
from simclr_ray.storage.run_folder import BAD_ROWS, CONFIG_FILE, METRICS, RunFolder
from simclr_ray.storage.run_status import CLASSIFIER_SCORES, RunStatus, status_of_run
from simclr_ray.train.figures import curve_drawings, draw_views
from simclr_ray.train.health import START
from simclr_ray.train.rollback import Rollbacks

REPORT: Final = "report.html"
CLASSES_SHOWN: Final = 25
VIEWS_SHOWN: Final = 4
TRAINS: Final = "train"  # that a start has logged more than what it begins with

log = logging.getLogger(__name__)


class TextTable(NamedTuple):
    """A head, and rows of text."""

    head: list[str]
    rows: list[list[str]]


def write_report(folder: RunFolder, out: str = "", images: int = 1000) -> str:
    """Write the page of a run; return where.

    Args:
        folder: Of the run; it may be running.
        out: Path or URI; empty: `report.html` in the folder.
        images: Test images that neighbours and confused classes are of; 0: neither.

    Raises:
        ConfigError: There is no run.
        OSError: The page cannot be written.
    """
    status = status_of_run(folder)
    page = report_page(status, _experiment(folder), images)
    if not out:
        folder.write_text(REPORT, page)
        return folder.below(REPORT)
    fs, path = filesystem(out)
    write_text_whole(fs, path, page)
    return out


def report_page(status: RunStatus, experiment: Experiment, images: int = 0) -> str:
    """Return the page. Same arguments as `write_report` otherwise."""
    folder = status.folder
    lines = folder.read_text(METRICS) or ""
    records = read_records(lines)
    seen = _sample(status, experiment, images) if images else None
    scores = [Score.from_tree(row) for row in status.scores]
    return render_page(
        "train",
        "run_report.html.j2",
        title=folder.name,
        state=f"{status.state}, step {status.step:,} of {status.total_steps:,}"
        if status.total_steps
        else f"{status.state}, no step yet",
        facts=facts(experiment, status),
        curves=curve_drawings(lines, _chance(experiment)),
        scores=score_table(scores, _num_scored(scores, experiment)) if scores else None,
        classifier=_classifier_table(folder, experiment),
        views=_views(experiment),
        neighbours=[_row(row) for row in seen.rows] if seen else [],
        classes=class_table(seen) if seen and seen.confusion is not None else None,
        sample=_about(seen) if seen else "",
        cost=cost(records, experiment),
        events=events(folder, records, status),
        command=shlex.join(["simclr-ray", "pretrain", folder.below(CONFIG_FILE)]),
        definition=folder.read_text(CONFIG_FILE) or "",
    )


def facts(experiment: Experiment, status: RunStatus) -> dict[str, str]:
    """Return what was trained on what, name -> words."""
    data, encoder = experiment.data, experiment.encoder
    own = {k: v for k, v in encoder.model_dump(mode="json").items() if k != "name"}
    options = ", ".join(
        f"{key} {value}" for key, value in own.items() if not isinstance(value, dict)
    )
    rows = {
        "images": data.train,
        "test images": data.test or "none",
        "encoder": f"{encoder.name}{f' ({options})' if options else ''}",
        "views": f"{experiment.augment.size} px",
        "batch": f"{counted(experiment.batch_size, 'image')}, global",
        "epochs": f"{experiment.epochs:g}",
        "loss": experiment.loss.name,
        "optimizer": experiment.optimizer.name,
        "workers": f"{experiment.scaling.max_workers}",
    }
    if status.record is not None:
        uri = status.record.tracking_uri
        rows["MLflow run"] = f"{status.record.mlflow_run_id} of {uri}"
    return rows


def score_table(scores: Sequence[Score], num: int) -> TextTable:
    """Return the scores beside the baselines, each accuracy with its 95 % interval.

    Args:
        scores: The rows.
        num: Test images, whose choice the interval is about; 0: not known, and no interval.
    """
    head, *rows = short_table(scores)
    shown = [list(row) for row in rows]
    for score, row in zip(scores, shown, strict=True):
        for column, metric in enumerate(metrics_shown(scores), start=1):
            if metric in score.accuracies:
                row[column] += _interval(score.accuracies[metric], num)
    return TextTable(list(head), shown)


def classifier_table(scores: Classification) -> TextTable:
    """Return what a classifier reaches; of what is counted in images with its 95 % interval."""
    row = []
    for name, value in scores.measures().items():
        counts = name in ("top1", "top5")  # the others are means over classes
        row.append(f"{100 * value:.1f} %{_interval(value, scores.num_images) if counts else ''}")
    return TextTable(list(LABELS.values()), [row])


def _interval(accuracy: float, num: int) -> str:
    if not num:
        return ""
    from scipy import stats  # half a second, for a page alone

    interval = stats.binomtest(round(accuracy * num), num).proportion_ci(method="wilson")
    return f" [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def class_table(seen: NeighbourSample) -> TextTable:
    """Return the recall of each class, and what it was confused with.

    The worst first; of many classes those alone.
    """
    assert seen.confusion is not None
    rows = []
    for label, counts in enumerate(seen.confusion):
        total = int(counts.sum())
        if not total:
            continue
        others = [(int(n), seen.class_names[c]) for c, n in enumerate(counts) if c != label and n]
        most = sorted(others, key=lambda other: -other[0])[:3]
        taken = ", ".join(f"{name} {100 * n / total:.0f} %" for n, name in most) or "-"
        rows.append((counts[label] / total, seen.class_names[label], total, taken))
    rows.sort(key=lambda row: row[0])
    head = ["class", "images", "recall", "confused with"]
    shown = [[n, f"{t:,}", f"{100 * s:.0f} %", o] for s, n, t, o in rows[:CLASSES_SHOWN]]
    return TextTable(head, shown)


def cost(records: Sequence[Mapping[str, Any]], experiment: Experiment) -> dict[str, str]:
    """Return what training took, name -> words; empty before the first step."""
    starts = _starts(records)
    steps = [record for record in records if "train/loss" in record]
    if not steps:
        return {}
    seconds = sum(last - first for first, last in starts)
    speeds = sorted(float(r["train/images_per_s"]) for r in steps if "train/images_per_s" in r)
    rows = {
        "training": clock(seconds),
        "worker-hours": f"{seconds * experiment.scaling.max_workers / 3600:.2f}",
        "images seen": f"{int(steps[-1]['step']) * experiment.batch_size:,}",
    }
    if speeds:
        rows["images a second"] = f"{speeds[len(speeds) // 2]:,.0f} (median of reports)"
    return rows


def events(folder: RunFolder, records: Sequence[Mapping[str, Any]], status: RunStatus) -> list[str]:
    """Return what the run has survived, and what it ended by, a sentence each."""
    starts = [record for record in records if FIRST_BATCH in record]
    sentences = [f"Started again after step {int(r.get('step', 0)):,}." for r in starts[1:]]
    try:
        rollbacks = Rollbacks.read(folder)
    except SimclrRayError as error:  # it was, and the file that says when is lost
        rollbacks = Rollbacks()
        sentences.append(str(error))
    if rollbacks.count:
        steps = ", ".join(f"{step:,}" for step in rollbacks.halved_at)
        sentences.append(
            f"Went back to a checkpoint {counted(rollbacks.count, 'time')} by itself, and on at "
            f"{rollbacks.rate_multiplier:g} times the rate (from step {steps} on)."
        )
    bad = {row.get("id"): row for row in read_records(folder.read_text(BAD_ROWS) or "")}
    if bad:
        reasons = Counter(str(row.get("reason", "")) for row in bad.values())
        most = "; ".join(f"{n:,} x {reason}" for reason, n in reasons.most_common(3))
        sentences.append(f"Replaced {counted(len(bad), 'row')} that could not be decoded: {most}.")
    if status.error is not None:
        last = status.error
        sentences.append(f"Last error, on {last.node}: {last.kind}: {last.message}")
    return sentences


def _experiment(folder: RunFolder) -> Experiment:
    tree = stored_tree(cfg.parse_yaml(folder.read_text(CONFIG_FILE) or ""))
    if folder.local is not None:
        tree = relocated_run(tree, folder.local)
    return cfg.validate(Experiment, tree)


def _starts(records: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Return of each start the times of its first and last record.

    A start logs what it begins with, `start/…`, each once and before it trains.
    """
    spans: list[tuple[float, float]] = []
    begun: set[str] = set()
    for record in records:
        at = record.get(TIME)
        if not isinstance(at, int | float):
            continue
        names = {name for name in record if name.startswith(START)}
        if not spans or (names and (TRAINS in begun or names & begun)):
            spans.append((at, at))
            begun = set()
        begun |= names or {TRAINS}
        spans[-1] = (spans[-1][0], max(spans[-1][1], at))
    return spans


def _chance(experiment: Experiment) -> ChanceLevel | None:
    head = experiment.classifier
    try:
        loss = build_loss(experiment)
    except SimclrRayError:  # of code that is not here
        return None
    return loss.chance_level(experiment.batch_size, head.num_classes if head else 0)


def _num_scored(scores: Sequence[Score], experiment: Experiment) -> int:
    """Return how many test images were scored; 0: none, or they are gone.

    Of a run of an earlier release, which did not store it, those with labels.
    """
    stored = max(score.num_images for score in scores)
    if stored:
        return stored
    num = _num_labelled(experiment)
    try:
        # where they alone have labels, one half is scored by the other (`split_halves`)
        return num if not num or probed_source(experiment.data).has_labels else num - num // 2
    except SimclrRayError as error:
        log.warning("no intervals: %s", error)
        return 0


def _num_labelled(experiment: Experiment) -> int:
    """Return how many test images have a label; 0: none, or they are gone."""
    data = experiment.data
    try:
        test = Source.open(data.test, data.columns) if data.test else None
        return int((test.labels() >= 0).sum()) if test is not None and test.has_labels else 0
    except SimclrRayError as error:
        log.warning("no intervals: %s", error)
        return 0


def _classifier_table(folder: RunFolder, experiment: Experiment) -> TextTable | None:
    """Return the stored scores of a run's classifier, as of a fine-tuning; None: it has none."""
    tree = folder.read_json(CLASSIFIER_SCORES, dict)
    if tree is None:
        return None
    try:
        scores = Classification(**tree)
    except TypeError as error:  # of another release, or spoiled
        log.warning("%s cannot be read: %s", folder.below(CLASSIFIER_SCORES), one_line(error))
        return None
    num = scores.num_images or _num_labelled(experiment)
    return classifier_table(scores._replace(num_images=num))


def _views(experiment: Experiment) -> str:
    """Return view pairs as the URI of an image; empty where the images are gone."""
    data = experiment.data
    try:
        source = Source.open(data.train, data.columns, data.limit)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "views.png"
            draw_views(experiment, source, path, rows=VIEWS_SHOWN)
            with Image.open(path) as drawn:
                return data_uri(drawn.convert("RGB"))
    except SimclrRayError as error:
        log.warning("no views: %s", error)
        return ""


def _sample(status: RunStatus, experiment: Experiment, images: int) -> NeighbourSample | None:
    # while it trains its device is full
    device = torch.device("cpu") if status.state == "running" else None
    try:
        with status.folder.newest_checkpoint() as checkpoint:
            if checkpoint is None:
                return None
            return sample_neighbours(experiment, checkpoint, images, device)
    except (SimclrRayError, torch.OutOfMemoryError) as error:
        log.warning("no neighbours: %s", one_line(error))
        return None


def _about(seen: NeighbourSample) -> str:
    text = f"{seen.num_test:,} test images, neighbours from {seen.num_bank:,}"
    if seen.num_unseen:
        unseen = f"{seen.num_unseen:,} of classes without one among those are left out below"
        text += f"; {unseen} (more --num)"
    return text


def _row(row: Sequence[Neighbour]) -> tuple[str, list[Thumbnail]]:
    first, *others = row
    shown = [Thumbnail(first.name, "query", thumbnail_of(first.pixels))]
    shown += [Thumbnail(a.name, f"{a.cosine:.3f}", thumbnail_of(a.pixels)) for a in others]
    return "", shown
