"""The command tree: `simclr-ray VERB ...`, everyday verbs flat, the rest in groups.

Exit codes: 0 done · 1 the run failed · 2 bad config, arguments or data · 75 stopped by the system
(SIGTERM) or a full disk, run the same command again to continue · 130 stopped by Ctrl-C, likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Annotated

import typer

from simclr_ray.cli import (
    cluster,
    dataset,
    demo,
    embeddings,
    encoder,
    model,
    pretrain,
    run,
    serve,
    settings,
    status,
    study,
    study_advise,
    study_plan,
)
from simclr_ray.errors import ConfigError

MOVED = {  # verbs that were flat: what they are called now
    "register": "model register RUN NAME",
    "finetune": "model finetune RUN",
    "distill": "model distill TEACHER",
    "probe": "run probe RUN",
}


def _group(text: str, verbs: Sequence[tuple[str, Callable[..., None]]]) -> typer.Typer:
    made = typer.Typer(no_args_is_help=True, add_completion=False, help=text)
    for name, verb in verbs:
        made.command(name=name)(verb)
    return made


app = _group(
    "SimCLR on Ray: images in, a pretrained encoder out, its scores and its record.",
    [
        ("prepare", dataset.prepare),
        ("inspect", dataset.inspect),
        ("preview", dataset.preview),
        ("pretrain", pretrain.pretrain),
        ("evaluate", run.evaluate),
        ("embed", encoder.embed),
        ("predict", encoder.predict),
        ("export", encoder.export),
        ("status", status.status),
        ("doctor", cluster.doctor),
        ("demo", demo.demo),
        ("config", settings.config),
    ],
)
app.pretty_exceptions_enable = False
app.add_typer(
    _group(
        "Make more of a run: register, promote and compare its encoder, fine-tune it, distil it, "
        "and find images by what it has embedded.",
        [
            ("register", model.register),
            ("promote", model.promote),
            ("rollback", model.rollback),
            ("compare", model.compare),
            ("rm", model.remove),
            ("finetune", model.finetune),
            ("distill", model.distill),
            ("search", embeddings.search),
            ("duplicates", embeddings.duplicates),
            ("map", embeddings.draw_map),
            ("serve", serve.serve),
        ],
    ),
    name="model",
)
app.add_typer(
    _group(
        "Runs of a storage.",
        [
            ("list", run.list_runs),
            ("probe", run.probe),
            ("report", run.report),
            ("stop", run.stop),
            ("sync", run.sync),
            ("rm", run.remove),
        ],
    ),
    name="run",
)
app.add_typer(
    _group(
        "Studies: what the paper varied, as commands.",
        [
            ("list", study.list_studies),
            ("run", study.run),
            ("resume", study.resume),
            ("status", study.status),
            ("stop", study.stop),
            ("report", study.report),
            ("best", study.best),
            ("plan", study_plan.plan),
            ("advise", study_advise.advise),
        ],
    ),
    name="study",
)
app.add_typer(
    _group(
        "Clusters: a launch file before it is used, and the Ray cluster at hand.",
        [("check", cluster.check), ("status", cluster.status)],
    ),
    name="cluster",
)


def _moved(verb: str, now: str) -> Callable[[list[str] | None], None]:
    def refuse(arguments: list[str] | None = None) -> None:  # noqa: ARG001 - whatever was given
        raise ConfigError.of(verb, f"is now: simclr-ray {now}")

    return refuse


for _verb, _now in MOVED.items():
    app.command(
        name=_verb,
        hidden=True,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )(_moved(_verb, _now))


def _show_version(value: bool) -> None:  # noqa: FBT001 - typer's callback
    if value:
        print(f"simclr-ray {metadata.version('simclr-ray')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[  # noqa: FBT002 - typer makes it a flag
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """SimCLR on Ray: images in, a pretrained encoder out, its scores and its record."""
