"""simclr_ray: SimCLR (Chen et al. 2020) as a distributed training system.

    import simclr_ray as sr

    exp   = sr.Experiment.load("cifar10_cpu", "loss.temperature=0.5", "scaling.num_workers=2")
    run   = sr.pretrain(exp)                      # Run: checkpoint, metrics, mlflow_run_id
    table = sr.evaluate(run.checkpoint, ["knn", "linear"])
    enc   = sr.load_encoder(run.checkpoint)       # nn.Module with its preprocessing
    h     = enc.embed(["a.jpg", "b.png"])         # paths, bytes, images, arrays -> [N, F]

Names are loaded when first used: importing the package imports neither torch, ray nor mlflow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simclr_ray.augment import TwoViews, ViewPair
    from simclr_ray.config.experiment import Experiment
    from simclr_ray.data.prepare import prepare
    from simclr_ray.data.source import Source
    from simclr_ray.evaluation.evaluate import evaluate
    from simclr_ray.evaluation.scores import Score, format_table
    from simclr_ray.inference.embed import embed_images, load_encoder
    from simclr_ray.inference.registry import register_run as register
    from simclr_ray.nn.losses import NTXentLoss
    from simclr_ray.optim import LARS
    from simclr_ray.studies.driver import run_study
    from simclr_ray.studies.files import load_study
    from simclr_ray.studies.report import publish_report
    from simclr_ray.train.driver import pretrain as pretrain
    from simclr_ray.train.outcome import Run
    from simclr_ray.train.pipeline import run_pipeline

_WHERE = {
    "Experiment": "config.experiment",
    "LARS": "optim",
    "NTXentLoss": "nn.losses",
    "Run": "train.outcome",
    "Score": "evaluation.scores",
    "Source": "data.source",
    "TwoViews": "augment",
    "ViewPair": "augment",
    "run_pipeline": "train.pipeline",
    "embed_images": "inference.embed",
    "evaluate": "evaluation.evaluate",
    "format_table": "evaluation.scores",
    "load_encoder": "inference.embed",
    "load_study": "studies.files",
    "prepare": "data.prepare",
    "pretrain": "train.driver",
    "publish_report": "studies.report",
    "register": "inference.registry:register_run",
    "run_study": "studies.driver",
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
    "embed_images",
    "evaluate",
    "format_table",
    "load_encoder",
    "load_study",
    "prepare",
    "pretrain",
    "publish_report",
    "register",
    "run_pipeline",
    "run_study",
]

_RENAMED = {"complete": "run_pipeline"}


def __getattr__(name: str) -> object:
    """Return a public name, importing its module on first use."""
    if name not in _WHERE:
        hint = f"; it is called {_RENAMED[name]!r} now" if name in _RENAMED else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    module, _, attribute = _WHERE[name].partition(":")
    value = getattr(import_module(f"{__name__}.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, those not loaded yet included."""
    return sorted({*globals(), *__all__})
