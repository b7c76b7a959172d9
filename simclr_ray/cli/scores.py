"""What a run has reached, shown: scores, where it lies, and what to do with it next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from simclr_ray.cli.console import command, out, show_pairs, show_table, sibling
from simclr_ray.config.metrics import EPOCH_METRICS
from simclr_ray.config.uris import hide_passwords
from simclr_ray.config.wording import counted
from simclr_ray.storage.metrics_log import read_records
from simclr_ray.storage.run_folder import BAD_ROWS, RunFolder
from simclr_ray.storage.run_record import RunRecord

if TYPE_CHECKING:
    from simclr_ray.evaluation.classification import Classification
    from simclr_ray.evaluation.scores import Score
    from simclr_ray.train.outcome import Run

REASONS_SHOWN = 5
PATHS_SHOWN = 3


def show_scores(scores: Sequence[Score]) -> None:
    """Print the score table: accuracies where there are any, else what needs no labels."""
    from simclr_ray.evaluation.scores import short_table

    headings, *rows = short_table(scores)
    show_table("scores", headings, rows)


def show_classifier(title: str, scores: Classification) -> None:
    """Print what a classifier reaches."""
    from simclr_ray.evaluation.classification import LABELS

    values = [f"{100 * value:.1f} %" for value in scores.measures().values()]
    show_table(title, LABELS.values(), [values])


def show_where(run: Run) -> None:
    """Print where a run and its last checkpoint lie, and which rows it had to replace."""
    show_pairs({"checkpoint": run.checkpoint_uri, "run folder": run.folder})
    show_bad_rows(RunFolder.at(run.folder))


def show_bad_rows(folder: RunFolder) -> None:
    """Print how many rows could not be decoded and were replaced by others, and why."""
    rows = {row["id"]: row for row in read_records(folder.read_text(BAD_ROWS) or "")}
    reasons = Counter(str(row["reason"]) for row in rows.values())
    if not reasons:
        return
    shown = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(REASONS_SHOWN))
    summary = f"replaced {counted(sum(reasons.values()), 'row')} that could not be decoded: {shown}"
    paths = [str(row["path"]) for row in rows.values() if row.get("path")]
    named = f"first: {', '.join(paths[:PATHS_SHOWN])}; all" if paths else "ids"
    out.print(f"{summary} ({named} in {folder.below(BAD_ROWS)})", markup=False, soft_wrap=True)


def show_next(folder: RunFolder, model: str = "", image: str = "IMAGE.png") -> None:
    """Print three commands: look at the run, embed an image with it, open MLflow.

    Args:
        folder: Of the run.
        model: Registered model, if it was registered.
        image: File that is embedded.
    """
    uri = hide_passwords(RunRecord.read(folder).tracking_uri)
    where = ["--tracking-uri", uri] if model else []
    rows = {
        "look": command("status", folder.uri),
        "embed": command("embed", model or folder.uri, image, *where),
        "open MLflow": open_mlflow(uri),
    }
    out.print("next:", markup=False)
    show_pairs({f"  {name}": text for name, text in rows.items()})


def open_mlflow(uri: str) -> str:
    """Return the command, or the address, that shows an MLflow store."""
    if uri.startswith(("http://", "https://")):
        return uri
    return sibling("mlflow", "ui", "--backend-store-uri", uri)


def short_scores(metrics: Mapping[str, float]) -> str:
    """Return the evaluation metrics of a run in one line, those that runs are compared by."""
    names = [name for name in metrics if name.startswith("eval/") and name in EPOCH_METRICS]
    return ", ".join(f"{name.removeprefix('eval/')} {metrics[name]:.3f}" for name in names)
