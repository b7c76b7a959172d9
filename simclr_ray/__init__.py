"""simclr_ray: SimCLR (Chen et al. 2020) as a distributed training system.

    import simclr_ray as sr

    exp   = sr.Experiment.load("cifar10_cpu", "loss.temperature=0.5", "scaling.num_workers=2")
    run   = sr.pretrain(exp)                      # Run: checkpoint, metrics, mlflow_run_id
    table = sr.evaluate(run.checkpoint, ["knn", "linear"])
    enc   = sr.load_encoder(run.checkpoint)       # nn.Module in eval mode
    h     = enc(images)                           # [N, 3, H, W] in [0, 1] -> [N, F]

Names are loaded when first used: importing the package imports neither torch, ray nor mlflow.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simclr_ray.augment import TwoViews, ViewPair
    from simclr_ray.data.prepare import prepare
    from simclr_ray.data.source import Source
    from simclr_ray.evaluation.table import Score, format_table
    from simclr_ray.experiment import Experiment
    from simclr_ray.export import embed_images, load_encoder
    from simclr_ray.judge import judge as evaluate
    from simclr_ray.nn.losses import NTXentLoss
    from simclr_ray.optim import LARS
    from simclr_ray.pipeline import complete
    from simclr_ray.pipeline import register_run as register
    from simclr_ray.pretrain import Run
    from simclr_ray.pretrain import pretrain as pretrain
    from simclr_ray.studies.definition import load_study
    from simclr_ray.studies.page import publish_report
    from simclr_ray.studies.run import run_study

_WHERE = {
    "Experiment": "experiment",
    "LARS": "optim",
    "NTXentLoss": "nn.losses",
    "Run": "pretrain",
    "Score": "evaluation.table",
    "Source": "data.source",
    "TwoViews": "augment",
    "ViewPair": "augment",
    "complete": "pipeline",
    "embed_images": "export",
    "evaluate": "judge:judge",
    "format_table": "evaluation.table",
    "load_encoder": "export",
    "load_study": "studies.definition",
    "prepare": "data.prepare",
    "pretrain": "pretrain",
    "publish_report": "studies.page",
    "register": "pipeline:register_run",
    "run_study": "studies.run",
}

__all__ = [
    "LARS",
    "Experiment",
    "NTXentLoss",
    "Run",
    "Score",
    "Source",
    "TwoViews",
    "ViewPair",
    "complete",
    "embed_images",
    "evaluate",
    "format_table",
    "load_encoder",
    "load_study",
    "prepare",
    "pretrain",
    "publish_report",
    "register",
    "run_study",
]


def __getattr__(name: str) -> object:
    """Return a public name, importing its module on first use."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    found = getattr(import_module(f"{__name__}.{module}"), attribute or name)
    globals()[name] = found
    return found


class _Door(ModuleType):
    """This package: a public name does not become the submodule of that name once it is loaded."""

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute, except where the import system would cover a public name."""
        if name in _WHERE and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Door
