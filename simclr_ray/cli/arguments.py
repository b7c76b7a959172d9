"""Arguments that several verbs take."""

from __future__ import annotations

from typing import Annotated

import typer

from simclr_ray.config.imports import IMPORT_PATH, allow

ConfigSource = Annotated[
    str, typer.Argument(metavar="PRESET_OR_YAML", help="A preset, or a .yaml file.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Values to override.")
]
RunOrCheckpoint = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder or its URI, or one checkpoint in it.")
]
RunPlace = Annotated[str, typer.Argument(metavar="RUN", help="A run folder or its URI.")]
TrackingUri = Annotated[
    str, typer.Option(help="MLflow store; empty: $MLFLOW_TRACKING_URI, else SQLite in `runs` here.")
]


def permitted_names(names: str) -> list[str]:
    """Return comma-separated names; import paths among them are permitted by being typed."""
    split = names.split(",")
    allow(*(name for name in split if IMPORT_PATH.fullmatch(name)))
    return split
