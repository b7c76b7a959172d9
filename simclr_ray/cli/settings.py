"""The config verb."""

from __future__ import annotations

from typing import Annotated

import typer

from simclr_ray import config as cfg
from simclr_ray.cli.arguments import Overrides
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.uris import hide_passwords


def config(
    source: Annotated[
        str, typer.Argument(metavar="PRESET_OR_YAML", help="A preset, or a .yaml file.")
    ] = "",
    overrides: Overrides = None,
    explain: Annotated[
        str, typer.Option(metavar="KEY", help="Say what a key means, such as loss.temperature.")
    ] = "",
) -> None:
    """Print a config whole, defaults included; without arguments, list the presets.

    Example: simclr-ray config cifar10_cpu batch_size=512
    Example: simclr-ray config --explain loss.temperature
    """
    if explain:
        from simclr_ray.config.reference import described, keys_at

        values = cfg.to_tree(Experiment.load(source, *(overrides or []))) if source else {}
        print("\n\n".join(described(key, source, values) for key in keys_at(explain)))
        return
    if not source:
        for name in cfg.preset_names():
            print(name)
        return
    text = cfg.dump_yaml(cfg.to_tree(Experiment.load(source, *(overrides or []))))
    print(hide_passwords(text), end="")
