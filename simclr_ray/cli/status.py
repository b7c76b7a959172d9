"""The status verb: how a run stands, by its folder alone, from any machine that sees that."""

from __future__ import annotations

import json
import math
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simclr_ray.cli.arguments import RunPlace
from simclr_ray.cli.console import show_pairs, show_table
from simclr_ray.config.uris import hide_passwords, without_passwords
from simclr_ray.config.wording import clock, counted
from simclr_ray.errors import ConfigError

if TYPE_CHECKING:  # no torch and no ray: the verb answers within two seconds
    from simclr_ray.storage.rank_states import RankStates
    from simclr_ray.storage.run_status import RunStatus

LAST_METRICS = ("train/mean_loss", "train/contrastive_top1", "train/classifier_top1")
RANKS_SHOWN = 32
JSON = ".json"


def status(
    run: RunPlace,
    record: Annotated[
        str, typer.Option("--json", metavar="FILE.json", help="Write it as JSON; - prints it.")
    ] = "",
) -> None:
    """Show how a run stands, from its folder alone: steps, time left, ranks, last error.

    Example: simclr-ray status runs/cifar10_cpu-1a2b3c4d
    """
    from simclr_ray.cli.scores import show_bad_rows
    from simclr_ray.storage.run_folder import RunFolder
    from simclr_ray.storage.run_status import status_of_run

    if record and record != "-" and not record.endswith(JSON):
        raise ConfigError.of("--json", f"{record} does not end in {JSON}")
    run_status = status_of_run(RunFolder.at(run))
    if record:
        tree = _finite(without_passwords(_tree(run_status)))
        text = json.dumps(tree, indent=1, allow_nan=False)
        if record == "-":
            print(text)
        else:
            Path(record).write_text(f"{text}\n", encoding="utf-8")
        return
    show_pairs(_rows(run_status))
    _show_ranks(run_status.ranks)
    show_bad_rows(run_status.folder)
    _show_scores(run_status.scores)


def _rows(run_status: RunStatus) -> dict[str, str]:
    """Return what is shown, by its name."""
    from simclr_ray.cli.scores import open_mlflow, short_scores

    steps = (
        f"{run_status.step:,} of {run_status.total_steps:,}"
        if run_status.total_steps
        else "none yet"
    )
    last = {
        n.partition("/")[2]: run_status.metrics[n] for n in LAST_METRICS if n in run_status.metrics
    }
    rows = {
        "run": run_status.folder.uri,
        "state": _state(run_status),
        "steps": f"{steps}, epoch {run_status.epoch:.2f}",
        "training": ", ".join(f"{name} {value:.4f}" for name, value in last.items()) or "-",
        "evaluation": short_scores(run_status.metrics) or "-",
        "checkpoints": ", ".join(run_status.checkpoints) or "none yet",
        "last written": f"{run_status.written_at:%Y-%m-%d %H:%M:%S} UTC"
        if run_status.written_at
        else "-",
    }
    if run_status.state == "running":
        rows["time left"] = _left(run_status.seconds_left)
    if run_status.error is not None:
        error = run_status.error
        rows["last error"] = f"{_utc(error.at)} on {error.node}: {error.kind}: {error.message}"
    if run_status.record is not None:
        uri = hide_passwords(run_status.record.tracking_uri)
        rows["MLflow run"] = f"{run_status.record.mlflow_run_id} of {uri}"
        rows["open MLflow"] = open_mlflow(uri)
    return rows


def _state(run_status: RunStatus) -> str:
    is_unscored = run_status.state == "finished" and not run_status.scores
    unscored = ", not evaluated (`pretrain` again, or `evaluate`)" if is_unscored else ""
    held = "held by a driver" if run_status.state == "running" else "no driver holds it"
    return f"{run_status.state}{unscored}; {held}"


def _left(seconds: float | None) -> str:
    if seconds is None:
        return "not known yet: it takes two reports since the last start"
    return f"{clock(seconds)}, until about {_utc(time.time() + seconds)}, without the evaluation"


def _utc(at: float) -> str:
    try:
        return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, ValueError, OSError):
        return "-"


def _show_ranks(states: RankStates) -> None:
    """Show where the ranks stand; of many those that are in their phase for longest."""
    if not states.ranks:
        return
    shown = sorted(states.ranks, key=lambda rank: -rank.seconds)[:RANKS_SHOWN]
    rows = [
        [str(r.rank), r.node, r.phase, f"{r.step:,}", f"{r.seconds:.0f} s"] for r in sorted(shown)
    ]
    more = len(states.ranks) - len(shown)
    rest = f"; {counted(more, 'rank')} more, for less long in their phases" if more else ""
    age = max(0.0, time.time() - states.at)
    title = f"{counted(len(states.ranks), 'rank')}, {clock(age)} ago{rest}"
    show_table(title, ["rank", "node", "phase", "step", "for"], rows)


def _show_scores(scores: list[dict[str, Any]]) -> None:
    if not scores:
        return
    names = [n for n, v in scores[0].items() if n.endswith("_top1") and v is not None]
    cells = [[row["name"], *(f"{100 * row[n]:.1f} %" for n in names)] for row in scores]
    if names:
        show_table("scores", ["features", *(n.removesuffix("_top1") for n in names)], cells)


def _tree(run_status: RunStatus) -> dict[str, Any]:
    """Return a status as JSON has it."""
    error, record, written = run_status.error, run_status.record, run_status.written_at
    return {
        "run": run_status.folder.uri,
        "state": run_status.state,
        "step": run_status.step,
        "total_steps": run_status.total_steps,
        "epoch": run_status.epoch,
        "seconds_left": run_status.seconds_left,
        "metrics": run_status.metrics,
        "ranks": json.loads(run_status.ranks.text),
        "last_error": error.tree if error else None,
        "checkpoints": run_status.checkpoints,
        "written_at": written.isoformat() if written else None,
        "mlflow_run_id": record.mlflow_run_id if record else None,
        "tracking_uri": record.tracking_uri if record else None,
        "scores": run_status.scores,
    }


def _finite(value: Any) -> Any:
    """Return a tree with null for each number that is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
