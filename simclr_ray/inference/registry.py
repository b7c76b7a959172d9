"""Models in MLflow's registry: an encoder stored under its run, and fetched again by its name."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from simclr_ray.augment import decode
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.decoding import evaluation_decoder
from simclr_ray.data.source import Source
from simclr_ray.errors import ConfigError, DataError
from simclr_ray.evaluation.scores import TRAINED
from simclr_ray.inference.encoder_files import (
    DECODE_FOLDER,
    ENCODER_FOLDER,
    class_names_of,
    read_card,
    read_encoder,
    write_encoder_of,
)
from simclr_ray.inference.gate import check_scores
from simclr_ray.inference.mlflow_model import ModelParts, log_model, pinned_requirements
from simclr_ray.inference.model_address import model_address, what_there_is
from simclr_ray.inference.version_files import drop_repeated_weights
from simclr_ray.nn.pretrained import experiment_of
from simclr_ray.storage.provenance import code_commit
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.storage.run_status import CLASSIFIER_SCORES, SCORES
from simclr_ray.tracking import moved, store
from simclr_ray.tracking.runs import TrackedRun, mlflow_client
from simclr_ray.tracking.store import RegisteredEncoder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

EXAMPLES_TRIED: Final = 64
VERSIONS_TAG: Final = "mlflow.modelVersions"
OF_THE_RUN: Final = ("study", "trial", store.CLUSTER_TAG)  # tags that its versions carry too
ABSENT: Final = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the latter of an alias


def register_run(
    run: str, name: str, alias: str | None, *, force: bool = False
) -> RegisteredEncoder:
    """Make the newest checkpoint of a run folder a version of the registered model `name`.

    Args:
        run: Folder or URI.
        name: Of the model.
        alias: Moved to the new version; None: none is.
        force: Also where the encoder is no better than an untrained one.

    Raises:
        CollapseError: By its stored scores or, without, its log it is no better than untrained.
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
            raise ConfigError.of(run, "holds no whole checkpoint to register")
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
        made = register_encoder(
            target,
            TrackedRun.attach(record.tracking_uri, record.mlflow_run_id),
            name=name,
            alias=alias,
            example=_example(experiment),
            tags=tags,
            scores=scores_of(folder),
        )
        folder.put_folder(target, ENCODER_FOLDER)  # after all that can be refused
    return made


def scores_of(folder: RunFolder) -> dict[str, float]:
    """Return the stored scores of a run's trained encoder, and of its classifier, by name."""
    scores: dict[str, float] = {}
    for row in folder.read_json(SCORES, list) or []:
        if row["name"] == TRAINED:
            scores |= {k: v for k, v in row.items() if isinstance(v, float)}
    classifier = folder.read_json(CLASSIFIER_SCORES, dict) or {}
    return scores | {f"classifier_{k}": v for k, v in classifier.items() if isinstance(v, float)}


def register_encoder(
    folder: Path,
    run: TrackedRun,
    *,
    name: str,
    alias: str | None,
    example: bytes,
    tags: Mapping[str, str | int | float],
    scores: Mapping[str, float] | None = None,
) -> RegisteredEncoder:
    """Make the encoder in `folder` a new version of the registered model `name`.

    The same weights and checkpoint of a run are one version, however often they are registered.

    Args:
        folder: written by `write_encoder`; travels in the version, for `load_encoder`.
        run: the run that the version belongs to.
        name: registered model, created where it does not exist.
        alias: moved to the new version at the very end; None: none is.
        example: one encoded image, kept as the input example.
        tags: lineage, such as `dataset_fingerprint`, `experiment_digest`, `seed`;
            `weights_sha256` is added, and `code_commit` in a git checkout.
        scores: such as `knn_top1`: tags of the version, and metrics of the logged model.

    Raises:
        CheckpointError: `folder` is no whole encoder.
        ImageError: `example` cannot be decoded.
        TrackingError: the alias is reserved, or the registry refuses or cannot be reached.
    """
    card = read_card(folder)
    read_encoder(folder)
    card.decoder.decode(example)
    commit = code_commit()
    all_tags = {key: str(value) for key, value in {**tags, **(scores or {})}.items()}
    all_tags["weights_sha256"] = card.weights_sha256
    if commit:
        all_tags.setdefault("code_commit", commit)
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch) / ENCODER_FOLDER  # MLflow names an artifact by its last path part
        shutil.copytree(folder, staged)
        drop_repeated_weights(staged)
        decoder = Path(scratch) / DECODE_FOLDER
        bytecode = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(decode.__file__).parent, decoder, ignore=bytecode)
        parts = ModelParts(
            code=Path(__file__).with_name("pyfunc.py"),
            artifacts={"encoder": staged, "decode": decoder},
            requirements=pinned_requirements(),
            example=example,
            outputs=class_names_of(card) or card.feature_dim,
            metadata={"encoder": card.as_tree(), "tags": all_tags},
        )
        return _register_model(
            run,
            name,
            parts,
            alias=alias,
            tags=all_tags,
            scores=scores or {},
            same=[key for key in ("weights_sha256", "checkpoint") if key in all_tags],
        )


class RegistryVersion(NamedTuple):
    """A version of a registered model.

    Attributes:
        name: Of the model.
        version: Its number.
        run_id: MLflow's run that it is of.
        tags: Of the version.
        source: Where its files are, as the store says.
    """

    name: str
    version: int
    run_id: str
    tags: dict[str, str]
    source: str


def find_version(where: str, *, uri: str) -> RegistryVersion:
    """Return the version at `models:/name@alias`, `models:/name/3` or `models:/name/latest`.

    Args:
        where: Its address.
        uri: tracking URI of the store; its registry is asked, or $MLFLOW_REGISTRY_URI.

    Raises:
        ConfigError: `where` has another form, the store's file is not there, or there is no such
            model, version or alias.
        TrackingError: The store cannot be reached.
    """
    address = model_address(where)
    name, version = address.name, address.version
    store.check_there(uri, " (--tracking-uri URI)")
    store.check_there(store.registry_uri(uri), f" ({store.REGISTRY_VARIABLE})")
    with store.quiet(), mlflow_client(f"find {where}", uri) as client, store.first_contact():
        from mlflow.exceptions import MlflowException

        try:
            if address.alias:
                version = str(client.get_model_version_by_alias(name, address.alias).version)
            elif version == "latest":
                versions = client.search_model_versions(f"name = '{name}'")
                version = str(max((int(v.version) for v in versions), default=1))
            entity = client.get_model_version(name, version)
            source = client.get_model_version_download_uri(name, version)
        except MlflowException as error:
            if error.error_code not in ABSENT:
                raise
            raise ConfigError.of(where, what_there_is(client, name)) from error
    return RegistryVersion(name, int(version), entity.run_id or "", dict(entity.tags), source)


def fetch_model(where: str, folder: Path, *, uri: str, part: str = "") -> Path:
    """Return the path in `folder` of the downloaded model `where`, or of a part of it.

    Where the store's project was moved, artifacts are found in the new place; nothing is written.

    Args:
        where: As in `find_version`.
        folder: an existing folder.
        uri: As in `find_version`.
        part: path inside of the model; empty: the whole model.

    Raises:
        ConfigError: As `find_version`.
        TrackingError: The store cannot be reached, or lacks the files.
    """
    version = find_version(where, uri=uri)
    with store.quiet(), mlflow_client(f"fetch {where}", uri):
        from mlflow.artifacts import download_artifacts

        source = moved.translated(uri, version.source)
        got = download_artifacts(
            artifact_uri=f"{source}/{part}".rstrip("/"),
            dst_path=str(folder),
            tracking_uri=uri,
            registry_uri=store.registry_uri(uri),
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
    raise DataError(f"{source.shown_uri}: none of its first {EXAMPLES_TRIED} images can be decoded")


def _register_model(
    run: TrackedRun,
    name: str,
    parts: ModelParts,
    *,
    alias: str | None,
    tags: Mapping[str, str],
    scores: Mapping[str, float],
    same: Sequence[str] = (),
) -> store.RegisteredEncoder:
    """Store a pyfunc model under a run and make it a new version of `name`.

    The alias moves last, so it never points to a version that is not whole.

    Args:
        run: The run that the version belongs to.
        name: Registered model, created where it does not exist.
        parts: What is stored.
        alias: Moved to the version at the very end; None: none is.
        tags: Of the version.
        scores: Metrics of the logged model.
        same: Keys of `tags`. A version of this run that has the same values of them is the model
            already: it gets the other tags and the alias, and nothing is stored again.

    Raises:
        TrackingError: the alias is reserved, or the registry refuses or cannot be reached.
    """
    store.check_model(name, alias)
    with store.quiet(), mlflow_client(f"register {name!r}", run.uri) as client:
        of_the_run = client.get_run(run.run_id).data.tags
        tags = {**tags, **{key: of_the_run[key] for key in OF_THE_RUN if key in of_the_run}}
        wanted = store.tags_of({key: tags[key] for key in same})
        version = _version_with(client, name, run.run_id, wanted) if wanted else 0
        if version:
            for key, value in store.tags_of(tags).items():
                client.set_model_version_tag(name, str(version), key, value)
        else:
            model = log_model(client, run, parts)
            version = _create_version(client, name, model, run.run_id, tags, scores)
            for metric, reached in scores.items():
                client.log_metric(run.run_id, metric, reached, model_id=model.model_id)
        if alias is not None:
            client.set_registered_model_alias(name, alias, str(version))
    uri = f"models:/{name}/{version}"
    return store.RegisteredEncoder(name, version, uri, run.run_id, alias or "")


def _description(model: LoggedModel, scores: Mapping[str, float]) -> str:
    """Return what MLflow's page of a version shows above its tags, in Markdown.

    The page names the run by itself, and the logged model nowhere.
    """
    page = f"#/experiments/{model.experiment_id}/models/{model.model_id}"
    lines = [f"The logged model is [{model.model_id}]({page})."]
    if scores:
        rows = [f"| {metric} | {value:.4f} |" for metric, value in scores.items()]
        lines += ["", "| metric | of the run's evaluation |", "|---|---:|", *rows]
    return "\n".join(lines)


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
    client: MlflowClient,
    name: str,
    model: LoggedModel,
    run_id: str,
    tags: Mapping[str, str],
    scores: Mapping[str, float],
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
        description=_description(model, scores),
        model_id=model.model_id,
    )
    # by which MLflow's page of the logged model shows where it is registered
    registered = json.dumps([{"name": name, "version": str(made.version)}])
    client.set_logged_model_tags(model.model_id, {VERSIONS_TAG: registered})
    return int(made.version)
