"""An encoder as an MLflow model: what it is made of, and how it is stored under a run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from simclr_ray.inference.encoder_files import OPTIONAL_DECODERS, REQUIREMENTS
from simclr_ray.storage.provenance import versions_of
from simclr_ray.tracking.runs import TrackedRun
from simclr_ray.tracking.uploads import upload_model

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.models import ModelSignature

SERVED_BATCH: Final = 256


class ModelParts(NamedTuple):
    """What a pyfunc model is made of; nothing in it is pickled.

    Attributes:
        code: models-from-code file, which calls `mlflow.models.set_model`.
        artifacts: files and folders that the code finds in `context.artifacts`.
        requirements: pinned, as in a requirements file.
        example: one encoded image, stored as the input example.
        outputs: of an encoder F, the width of its embeddings; of a classifier its class names.
        metadata: a JSON tree that is stored in the MLmodel file.
    """

    code: Path
    artifacts: Mapping[str, Path]
    requirements: Sequence[str]
    example: bytes
    outputs: int | Sequence[str]
    metadata: Mapping[str, Any]


def log_model(client: MlflowClient, run: TrackedRun, parts: ModelParts) -> LoggedModel:
    """Return the model, stored under the run."""
    model = client.create_logged_model(
        run.experiment_id, name="encoder", source_run_id=run.run_id, model_type="encoder"
    )
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            _save_pyfunc(folder, parts, run.run_id, model)
            upload_model(client, model.model_id, folder)
    except BaseException:
        client.finalize_logged_model(model.model_id, "FAILED")
        raise
    client.finalize_logged_model(model.model_id, "READY")
    return model


def _save_pyfunc(folder: Path, parts: ModelParts, run_id: str, logged: LoggedModel) -> None:
    """Write the MLflow model folder that `Model.log` would write, without an active run."""
    import pandas as pd
    from mlflow import pyfunc
    from mlflow.models import Model

    pyfunc.save_model(
        path=str(folder),
        python_model=str(parts.code),
        artifacts={name: str(path) for name, path in parts.artifacts.items()},
        signature=_signature(parts.outputs),
        input_example=pd.DataFrame({"image": [parts.example]}),
        pip_requirements=list(parts.requirements),
        metadata=dict(parts.metadata),
        mlflow_model=Model(
            artifact_path=logged.artifact_location,
            run_id=run_id,
            model_uuid=logged.model_id,
            model_id=logged.model_id,
        ),
    )


def _signature(outputs: int | Sequence[str]) -> ModelSignature:
    """Return what a model takes and gives; `pyfunc` says it at length."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    returned_schema = (
        Schema([TensorSpec(np.dtype(np.float32), (-1, outputs))])
        if isinstance(outputs, int)
        else Schema([
            ColSpec(DataType.string, "label"),
            *(ColSpec(DataType.float, f"p({name})") for name in outputs),
        ])
    )  # fmt: skip
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=returned_schema,
        params=ParamSchema([ParamSpec("batch_size", DataType.long, SERVED_BATCH)]),
    )


def pinned_requirements() -> list[str]:
    """Return `name==version` of what a registered model needs, as installed here.

    Decoders of the extras are needed where they are installed: images may need them, and others
    may be decoded otherwise without them. Local parts such as `+cpu` or `+cu130` are dropped: the
    package index knows no such versions.
    """
    versions = versions_of((*REQUIREMENTS, *OPTIONAL_DECODERS))
    return [
        f"{name}=={version.partition('+')[0]}"
        for name, version in versions.items()
        if version != "absent" or name in REQUIREMENTS
    ]
