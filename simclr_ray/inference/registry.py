"""Models in MLflow's registry: an encoder stored under its run, and fetched again by its name."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from simclr_ray.augment import decode
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.decoding import evaluation_decoder
from simclr_ray.data.source import Source
from simclr_ray.errors import CollapseError, ConfigError, ConfigIssue, DataError
from simclr_ray.evaluation.scores import TRAINED, UNTRAINED
from simclr_ray.inference.encoder_files import (
    DECODE_FOLDER,
    ENCODER_FOLDER,
    OPTIONAL_DECODERS,
    REQUIREMENTS,
    read_card,
    read_encoder,
    write_encoder_of,
)
from simclr_ray.inference.model_address import model_address, what_there_is
from simclr_ray.nn.pretrained import experiment_of
from simclr_ray.storage.provenance import code_commit, versions_of
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.storage.run_status import SCORES
from simclr_ray.tracking import moved, store
from simclr_ray.tracking.runs import TrackedRun, door
from simclr_ray.tracking.store import RegisteredEncoder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel


EXAMPLES_TRIED: Final = 64
FEW_DIMENSIONS: Final = 2.0  # effective rank; a trained encoder has ten times that and more
NO_WORSE: Final = ("effective_rank", "feature_std")  # known of every encoder with two images
ABSENT: Final = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the latter of an alias


class ModelParts(NamedTuple):
    """What a pyfunc model is made of; nothing in it is pickled.

    Attributes:
        code: models-from-code file, which calls `mlflow.models.set_model`.
        artifacts: files and folders that the code finds in `context.artifacts`.
        requirements: pinned, as in a requirements file.
        example: one encoded image, stored as the input example.
        feature_dim: F, the width of the output.
        metadata: a JSON tree that is stored in the MLmodel file.
    """

    code: Path
    artifacts: Mapping[str, Path]
    requirements: Sequence[str]
    example: bytes
    feature_dim: int
    metadata: Mapping[str, Any]


def register_run(run: str, name: str, alias: str, *, force: bool = False) -> RegisteredEncoder:
    """Make the newest checkpoint of a run folder a version of the registered model `name`.

    Args:
        run: Folder or URI.
        name: Of the model.
        alias: Moved to the new version.
        force: Also where the encoder is no better than an untrained one.

    Raises:
        CollapseError: By its stored scores the encoder is no better than an untrained one.
        ConfigError: `run` is no run folder, its store is gone, or name or alias cannot be.
        CheckpointError: It holds no whole checkpoint.
        TrackingError: The registry refuses or cannot be reached.
    """
    store.check_model(name, alias)
    folder = RunFolder.at(run)
    record = RunRecord.read(folder)
    store.check_there(record.tracking_uri)
    if not force:
        check_scores(folder)
    with folder.newest_checkpoint() as newest, tempfile.TemporaryDirectory() as scratch:
        if newest is None:
            raise ConfigError([ConfigIssue(run, "holds no whole checkpoint to register")])
        experiment, target = experiment_of(newest), Path(scratch) / ENCODER_FOLDER
        write_encoder_of(newest, target)
        tags: dict[str, str | int | float] = {
            "experiment_digest": experiment.digest(),
            "dataset_fingerprint": record.fingerprint,
            "seed": experiment.seed,
            "checkpoint": newest.name,
        }
        if record.rollbacks:  # not the plain setting
            tags |= {"rollbacks": record.rollbacks, "rate_multiplier": record.rate_multiplier}
        for score in folder.read_json(SCORES, list) or []:
            if score["name"] == TRAINED:
                tags |= {k: v for k, v in score.items() if isinstance(v, float)}
        made = register_encoder(
            target,
            TrackedRun.attach(record.tracking_uri, record.mlflow_run_id),
            name=name,
            alias=alias,
            example=_example(experiment),
            tags=tags,
        )
        folder.put_folder(target, ENCODER_FOLDER)  # after all that can be refused
    return made


def check_scores(folder: RunFolder) -> None:
    """Raise `CollapseError` where, by a run's stored scores, its encoder has not learned.

    Its features span next to nothing, and fewer dimensions than those of the untrained encoder; or
    it is better than that in nothing: no accuracy, no effective rank and no deviation.
    """
    scores = {score["name"]: score for score in folder.read_json(SCORES, list) or []}
    trained, before = scores.get(TRAINED, {}), scores.get(UNTRAINED, {})
    both = {k: (v, before[k]) for k, v in trained.items() if _is_number(v, before.get(k))}
    if "effective_rank" not in both:
        return
    now, then = both["effective_rank"]
    if now < min(FEW_DIMENSIONS, then):
        problem = (
            f"the features' effective rank is {now:.2f}, that of the untrained encoder {then:.2f}: "
            "all images look alike to it"
        )
    elif set(NO_WORSE) <= both.keys() and not any(
        ours > theirs for key, (ours, theirs) in both.items() if key != "uniformity"
    ):
        shown = ", ".join(
            f"{key} {ours:.3g} (untrained {theirs:.3g})"
            for key, (ours, theirs) in both.items()
            if key != "uniformity"
        )
        problem = f"the encoder is no better than the untrained one: {shown}"
    else:
        return
    raise CollapseError(f"{folder.uri}: {problem}, so it is not registered (--force)")


def _is_number(*values: object) -> bool:
    return all(isinstance(value, float) for value in values)


def register_encoder(
    folder: Path,
    run: TrackedRun,
    *,
    name: str,
    alias: str,
    example: bytes,
    tags: Mapping[str, str | int | float],
) -> RegisteredEncoder:
    """Make the encoder in `folder` a new version of the registered model `name`.

    The same weights and checkpoint of a run are one version, however often they are registered.

    Args:
        folder: written by `write_encoder`; travels in the version, for `load_encoder`.
        run: the run that the version belongs to.
        name: registered model, created where it does not exist.
        alias: moved to the new version at the very end.
        example: one encoded image, kept as the input example.
        tags: lineage and scores, such as `dataset_fingerprint`, `experiment_digest`, `seed`,
            `knn_top1`; `weights_sha256` is added, and `code_commit` in a git checkout.

    Raises:
        CheckpointError: `folder` is no whole encoder.
        ImageError: `example` cannot be decoded.
        TrackingError: the alias is reserved, or the registry refuses or cannot be reached.
    """
    card = read_card(folder)
    read_encoder(folder)
    card.decoder.decode(example)
    commit = code_commit()
    all_tags = {key: str(value) for key, value in tags.items()}
    all_tags["weights_sha256"] = card.weights_sha256
    if commit:
        all_tags.setdefault("code_commit", commit)
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch) / ENCODER_FOLDER  # MLflow names an artifact by its last path part
        shutil.copytree(folder, staged)
        decoder = Path(scratch) / DECODE_FOLDER
        bytecode = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(decode.__file__).parent, decoder, ignore=bytecode)
        parts = ModelParts(
            code=Path(__file__).with_name("pyfunc.py"),
            artifacts={"encoder": staged, "decode": decoder},
            requirements=pinned_requirements(),
            example=example,
            feature_dim=card.feature_dim,
            metadata={"encoder": card._asdict(), "tags": all_tags},
        )
        return _register_model(
            run,
            name,
            parts,
            alias=alias,
            tags=all_tags,
            same=[key for key in ("weights_sha256", "checkpoint") if key in all_tags],
        )


def fetch_model(where: str, folder: Path, *, uri: str, part: str = "") -> Path:
    """Return the path in `folder` of the downloaded model `where`, or of a part of it.

    Where the store's project was moved, artifacts are found in the new place; nothing is written.

    Args:
        where: `models:/name@alias`, `models:/name/3` or `models:/name/latest`.
        folder: an existing folder.
        uri: tracking URI of the store; its registry is asked.
        part: path inside of the model; empty: the whole model.

    Raises:
        ConfigError: `where` has another form, the store's file is not there, or there is no such
            model, version or alias.
        TrackingError: The store cannot be reached, or lacks the files.
    """
    address = model_address(where)
    name, version = address.name, address.version
    store.check_there(uri)
    with store.quiet(), door(f"find {where}", uri) as client:
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        with store.first_contact():
            try:
                if address.alias:
                    version = str(client.get_model_version_by_alias(name, address.alias).version)
                elif version == "latest":
                    versions = client.search_model_versions(f"name = '{name}'")
                    version = str(max((int(v.version) for v in versions), default=1))
                stored = client.get_model_version_download_uri(name, version)
            except MlflowException as error:
                if error.error_code not in ABSENT:
                    raise
                raise ConfigError([ConfigIssue(where, what_there_is(client, name))]) from error
            source = moved.translated(uri, stored)
        got = download_artifacts(
            artifact_uri=f"{source}/{part}".rstrip("/"),
            dst_path=str(folder),
            tracking_uri=uri,
            registry_uri=uri,
        )
    return Path(got)


def _example(experiment: Experiment) -> bytes:
    """Return the first image that can be decoded: a run may have some that cannot."""
    data = experiment.data
    source, decoder = Source.open(data.train, data.columns, data.limit), evaluation_decoder(data)
    for image in source.read_first_images(0, EXAMPLES_TRIED):
        with suppress(decode.ImageError):
            decoder.decode(image or b"")
            return image or b""
    raise DataError(f"{source.uri}: none of its first {EXAMPLES_TRIED} images can be decoded")


def _register_model(
    run: TrackedRun,
    name: str,
    parts: ModelParts,
    *,
    alias: str,
    tags: Mapping[str, str],
    same: Sequence[str] = (),
) -> store.RegisteredEncoder:
    """Store a pyfunc model under a run and make it a new version of `name`.

    The alias moves last, so it never points to a version that is not whole.

    Args:
        run: The run that the version belongs to.
        name: Registered model, created where it does not exist.
        parts: What is stored.
        alias: Moved to the version at the very end.
        tags: Of the version.
        same: Keys of `tags`. A version of this run that has the same values of them is the model
            already: it gets the other tags and the alias, and nothing is stored again.

    Raises:
        TrackingError: the alias is reserved, or the registry refuses or cannot be reached.
    """
    store.check_model(name, alias)
    with store.quiet(), door(f"register {name!r}", run.uri) as client:
        wanted = store.tags_of({key: tags[key] for key in same})
        version = _version_with(client, name, run.run_id, wanted) if wanted else 0
        if version:
            for key, value in store.tags_of(tags).items():
                client.set_model_version_tag(name, str(version), key, value)
        else:
            version = _create_version(client, name, _stored(client, run, parts), run.run_id, tags)
        client.set_registered_model_alias(name, alias, str(version))
    return store.RegisteredEncoder(name, version, f"models:/{name}/{version}", run.run_id)


def _stored(client: MlflowClient, run: TrackedRun, parts: ModelParts) -> LoggedModel:
    """Return the model, stored under the run."""
    model = client.create_logged_model(
        run.experiment_id, name="encoder", source_run_id=run.run_id, model_type="encoder"
    )
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            _save_pyfunc(folder, parts, run.run_id, model)
            client.log_model_artifacts(model.model_id, str(folder))
    except BaseException:
        client.finalize_logged_model(model.model_id, "FAILED")
        raise
    client.finalize_logged_model(model.model_id, "READY")
    return model


def _save_pyfunc(folder: Path, parts: ModelParts, run_id: str, logged: LoggedModel) -> None:
    """Write the MLflow model folder that `Model.log` would write, without an active run."""
    import pandas as pd
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    image = Schema([ColSpec(DataType.binary, "image")])
    features = Schema([TensorSpec(np.dtype(np.float32), (-1, parts.feature_dim))])
    pyfunc.save_model(
        path=str(folder),
        python_model=str(parts.code),
        artifacts={name: str(path) for name, path in parts.artifacts.items()},
        signature=ModelSignature(inputs=image, outputs=features),
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


def _version_with(client: MlflowClient, name: str, run_id: str, tags: Mapping[str, str]) -> int:
    """Return the newest version of a run that has these tags, or 0."""
    versions = client.search_model_versions(f"name = '{name}'")
    same = [
        v
        for v in versions
        if v.run_id == run_id and v.status == "READY" and v.tags.items() >= tags.items()
    ]
    return max((int(v.version) for v in same), default=0)


def _create_version(
    client: MlflowClient, name: str, model: LoggedModel, run_id: str, tags: Mapping[str, str]
) -> int:
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = client.create_model_version(
        name,
        model.artifact_location,  # `models:/<id>` is looked up in the global store, not in this one
        run_id,
        tags=store.tags_of(tags),
        model_id=model.model_id,
    )
    return int(made.version)


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
