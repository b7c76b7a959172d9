"""An alias moves to a better version, or stays: what it has to show, tested on the same images.

Both versions are scored anew, by one code on one test split; stored scores may be of another. What
was measured is kept as tags of the version, where it was refused as well.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.imports import permit_code
from simclr_ray.config.moves import CONFIG_FILE, Move, relocated, relocated_run, stored_tree
from simclr_ray.config.protocols import DEFAULT_PROTOCOLS, PROTOCOLS
from simclr_ray.errors import CollapseError, ConfigError, NotPromotedError
from simclr_ray.evaluation.evaluate import untrained_encoder
from simclr_ray.evaluation.scores import UNTRAINED
from simclr_ray.inference.comparison import (
    Contender,
    EncoderScores,
    score_all,
    standard_errors,
    table,
)
from simclr_ray.inference.embed import load_encoder
from simclr_ray.inference.gate import classes_of, why_not_learned
from simclr_ray.inference.model_address import model_address
from simclr_ray.inference.registry import find_version
from simclr_ray.inference.requirement import Facts, Requirement, RuleResult
from simclr_ray.nn.pretrained import experiment_of, open_checkpoint
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.tracking import moved, store
from simclr_ray.tracking.runs import mlflow_client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

LOGGED_MODEL: Final = re.compile(r"/(m-[0-9a-f]{32})(?:/|$)")  # in a version's source
TRIES: Final = 3  # where somebody else moves the alias meanwhile


class Promotion(NamedTuple):
    """An alias that has moved.

    Attributes:
        name: Of the model.
        alias: That has moved.
        version: Where it points now.
        previous: Where it did; 0: nowhere.
        lines: What was tested, with its numbers.
    """

    name: str
    alias: str
    version: int
    previous: int
    lines: list[str]


def promote(
    where: str,
    alias: str,
    *overrides: str,
    require: str = "",
    force: bool = False,
    tracking_uri: str = "",
) -> Promotion:
    """Move an alias to a version of a registered model, where that is good enough.

    A store whose project was moved is rewritten first (`tracking.moved`).

    Args:
        where: `models:/name/3`, or another address of the version.
        alias: Such as `champion`.
        overrides: Of the experiment that the version was trained by, such as `data.test=DIR`.
        require: A rule, as `requirement` has it; empty: that of the experiment.
        force: Also an encoder that has learned nothing; the rule is tested nevertheless.
        tracking_uri: Store of the registry; empty: $MLFLOW_TRACKING_URI, else SQLite in `runs`.

    Raises:
        NotPromotedError: The rule does not hold.
        ClusterError: `evaluation.actors` ask for more than the cluster has.
        CollapseError: The encoder has learned nothing.
        ConfigError: There is no such version, or the rule is none.
        CheckpointError: The files of the version, or of the one that has the alias, are not whole.
        DataError: The test images cannot be read.
        TrackingError: The registry refuses or cannot be reached.

    Example:
        >>> made = promote("models:/enc/4", "champion", require="linear_top1 >= champion - se")
        >>> made.version, made.previous
        (4, 3)
    """
    uri, address = store.store_uri(tracking_uri), model_address(where)
    store.check_model(address.name, alias)
    Requirement.parse(require, "--require")  # what is wrong with it is said before anything is read
    moved.rewrite_moved_store(store.registry_uri(uri))
    version = find_version(where, uri=uri)
    experiment = _experiment_of(version.run_id, uri, overrides)
    rule = Requirement.parse(require or experiment.registry.require, "--require")
    contest = _Contest(address.name, version.version, experiment, rule, uri)
    contest.score(_version_of(uri, address.name, alias), with_untrained=not force)
    if not force:
        problem = contest.why_not_learned()
        if problem:
            _note(uri, address.name, version.version, f"refused.{alias}", [problem])
            raise CollapseError(f"{where}: {problem}, so {alias} stays (--force)")
    for _ in range(TRIES):
        champion = _version_of(uri, address.name, alias)
        verdict = contest.verdict(champion)
        if not verdict.holds:
            _note(uri, address.name, version.version, f"refused.{alias}", verdict.lines)
            raise NotPromotedError(
                f"{where} does not become {alias}, which stays "
                f"{f'version {champion}' if champion else 'nowhere'}: {'; '.join(verdict.lines)}"
            )
        if _moved(uri, address.name, alias, version.version, champion, verdict):
            return Promotion(address.name, alias, version.version, champion, verdict.lines)
    problem = f"{alias} of {address.name} is being moved by others; try again"
    raise ConfigError.of("", problem)


def rollback(name: str, alias: str, *, tracking_uri: str = "") -> Promotion:
    """Move an alias back to the version that it pointed to before.

    Raises:
        ConfigError: There is no such model or alias, or nothing before it.
        TrackingError: The registry refuses or cannot be reached.
    """
    uri = store.store_uri(tracking_uri)
    store.check_model(name, alias)
    moved.rewrite_moved_store(store.registry_uri(uri))
    now = find_version(f"models:/{name}@{alias}", uri=uri)
    previous = int(now.tags.get(f"previous.{alias}", 0))
    if not previous:
        problem = f"pointed to no version before {now.version} that is on record"
        raise ConfigError.of(f"models:/{name}@{alias}", problem)
    find_version(f"models:/{name}/{previous}", uri=uri)  # it may be gone
    with store.quiet(), mlflow_client(f"move {alias!r}", uri) as client:
        client.set_model_version_tag(name, str(now.version), f"rolled_back.{alias}", _now())
        client.set_registered_model_alias(name, alias, str(previous))
    return Promotion(name, alias, previous, now.version, [])


def remove_version(where: str, *, force: bool = False, tracking_uri: str = "") -> int:
    """Delete a version of a registered model, and return its number.

    Its logged model is marked as deleted, as MLflow does it: `mlflow gc` frees the files.

    Args:
        where: `models:/name/3`.
        force: Also one that an alias points to.
        tracking_uri: As in `promote`.

    Raises:
        ConfigError: There is no such version, or an alias points to it.
        TrackingError: The registry refuses or cannot be reached.
    """
    uri = store.store_uri(tracking_uri)
    moved.rewrite_moved_store(store.registry_uri(uri))
    stored = find_version(where, uri=uri)
    with store.quiet(), mlflow_client(f"delete {where}", uri) as client:
        aliases = client.get_registered_model(stored.name).aliases
        pointing = sorted(a for a, version in aliases.items() if int(version) == stored.version)
        if pointing and not force:
            problem = f"{', '.join(pointing)} points to version {stored.version} (--force)"
            raise ConfigError.of(where, problem)
        for alias in pointing:
            client.delete_registered_model_alias(stored.name, alias)
        client.delete_model_version(stored.name, str(stored.version))
        if logged := LOGGED_MODEL.search(stored.source):
            client.delete_logged_model(logged[1])
    return stored.version


def compare(one: str, other: str, *overrides: str, tracking_uri: str = "") -> list[list[str]]:
    """Return headings and rows that set two encoders side by side, on the test images of the first.

    Nothing is written, also where the store's project was moved.

    Args:
        one: As in `load_encoder`; a run, a checkpoint or a registered version.
        other: Likewise.
        overrides: Of the first one's experiment, such as `data.test=DIR`.
        tracking_uri: As in `promote`.

    Raises:
        ClusterError: `evaluation.actors` ask for more than the cluster has.
        ConfigError: There is no such encoder, or nothing says what the first was trained by.
        CheckpointError: The files of one are not whole.
        DataError: The images cannot be read.
        TrackingError: The registry cannot be reached.

    Example:
        >>> headings, *rows = compare("models:/enc/4", "models:/enc@champion")
        >>> headings[1:4]
        ['models:/enc/4', 'models:/enc@champion', 'difference']
    """
    uri = store.store_uri(tracking_uri)
    if one.startswith("models:"):
        experiment = _experiment_of(find_version(one, uri=uri).run_id, uri, overrides)
    else:
        with open_checkpoint(one, "RUN_OR_MODEL") as (_, folder):
            experiment = experiment_of(folder, *overrides)
    names = [one, other]
    contenders = [Contender.of(w, load_encoder(w, tracking_uri=tracking_uri)) for w in names]
    return table(names, score_all(contenders, experiment))


class _Contest:
    """A version before a rule: what it, the champion and an untrained encoder reach.

    Args:
        name: Of the model.
        version: That is to become champion.
        experiment: Whose images are seen.
        rule: By which it is tested.
        uri: Of the store.
    """

    def __init__(
        self, name: str, version: int, experiment: Experiment, rule: Requirement, uri: str
    ) -> None:
        self.name, self.version, self.uri = name, version, uri
        self.experiment, self.rule = experiment, rule
        self.scored: dict[int, EncoderScores] = {}  # of versions; 0: untrained

    def score(self, champion: int, *, with_untrained: bool) -> None:
        """Score what was not yet, all at once, so that images are read once."""
        versions = [self.version]
        if champion and self.rule.needs_champion:
            versions.append(champion)
        contenders = {
            version: self._contender(version)
            for version in dict.fromkeys(versions)
            if version not in self.scored
        }
        if with_untrained:
            network = untrained_encoder(self.experiment)
            like = contenders[self.version]
            contenders[0] = like._replace(name=UNTRAINED, network=network, classifier=None)
        protocols = _protocols_for(self.rule)
        reached = score_all(list(contenders.values()), self.experiment, protocols)
        self.scored |= dict(zip(contenders, reached, strict=True))

    def why_not_learned(self) -> str:
        """Return why the version is no use beside the untrained encoder; "": it is."""
        trained, untrained = (self.scored[version].metrics for version in (self.version, 0))
        return why_not_learned(trained, untrained, classes_of(self.experiment))

    def verdict(self, champion: int) -> RuleResult:
        """Return the verdict of the rule, the champion scored where it is asked about."""
        candidate = self.scored[self.version]
        facts = Facts(candidate.metrics, None, {}, candidate.absent)
        if champion and self.rule.needs_champion:
            self.score(champion, with_untrained=False)  # where the alias has moved meanwhile
            other = self.scored[champion]
            errors = standard_errors(candidate, other)
            facts = facts._replace(champion=other.metrics, se=errors, champion_absent=other.absent)
        return self.rule.check(facts)

    def _contender(self, version: int) -> Contender:
        where = f"models:/{self.name}/{version}"
        return Contender.of(where, load_encoder(where, tracking_uri=self.uri))


def _protocols_for(rule: Requirement) -> list[str]:
    """Return the protocols that a rule asks about, and the usual ones, as the gate does."""
    named = [p.name for p in PROTOCOLS if p.metric in rule.metrics]
    return list(dict.fromkeys([*DEFAULT_PROTOCOLS, *named]))


def _experiment_of(run_id: str, uri: str, overrides: Sequence[str]) -> Experiment:
    """Return the experiment of a version's run: as MLflow has it, or as its folder has it.

    Where the project was moved, both are read in the new place, and so are the paths in it.
    """
    with store.quiet(), mlflow_client(f"find run {run_id}", uri) as client:
        run = client.get_run(run_id)
        text = _logged_config(client, run, uri)
    place = moved.translated(uri, run.data.tags.get("storage", ""))
    folder = RunFolder.at(place) if place else None
    if not text and folder is not None:
        text = folder.read_text(CONFIG_FILE) or ""
    if not text:
        problem = f"MLflow's run {run_id} has no {CONFIG_FILE}, and its folder is not here"
        raise ConfigError.of("", problem)
    local = None if folder is None else folder.local
    tree = _relocated(stored_tree(cfg.parse_yaml(text)), local, store.sqlite_file(uri))
    whole = cfg.apply_overrides(tree, overrides, Experiment)
    permit_code(whole, tree, "the run")
    return cfg.validate(Experiment, whole)


def _relocated(tree: dict[str, Any], folder: Path | None, database: Path | None) -> dict[str, Any]:
    """Return a run's config with its paths where they lie now.

    Versions outlive the folder of their run, which `run rm` deletes. Without it the default store,
    which lies in the storage, tells where that is, if there is nothing in the old place.
    """
    if folder is not None and (folder / CONFIG_FILE).is_file():
        return relocated_run(tree, folder)
    storage = tree.get("storage")
    if database is None or not isinstance(storage, str) or not storage.startswith("/"):
        return tree
    move = None if Path(storage).exists() else Move.between(storage, str(database.parent))
    return relocated(tree, move) if move else tree


def _logged_config(client: MlflowClient, run: MlflowRun, uri: str) -> str:
    """Return the config among the artifacts of a run; empty: it is not among them."""
    here = moved.path_of(moved.translated(uri, run.info.artifact_uri or ""))
    if here:  # MLflow itself looks where a store that was moved says
        file = Path(here) / CONFIG_FILE
        return file.read_text(encoding="utf-8") if file.is_file() else ""
    run_id = run.info.run_id
    if not any(stored.path == CONFIG_FILE for stored in client.list_artifacts(run_id)):
        return ""
    with tempfile.TemporaryDirectory() as scratch:
        return Path(client.download_artifacts(run_id, CONFIG_FILE, scratch)).read_text("utf-8")


def _version_of(uri: str, name: str, alias: str) -> int:
    """Return the version that an alias points to; 0: none."""
    with store.quiet(), mlflow_client(f"look up {name}", uri) as client:
        return int(client.get_registered_model(name).aliases.get(alias, 0))


def _moved(uri: str, name: str, alias: str, version: int, before: int, verdict: RuleResult) -> bool:
    """Move an alias, unless it points elsewhere than before; return whether it has moved."""
    with store.quiet(), mlflow_client(f"move {alias!r}", uri) as client:
        if int(client.get_registered_model(name).aliases.get(alias, 0)) != before:
            return False
        if before not in (0, version):
            _tag(client, name, version, {f"previous.{alias}": str(before)})
        _tag(client, name, version, {f"promoted.{alias}": _test_record(verdict.lines)})
        client.set_registered_model_alias(name, alias, str(version))
        return True


def _note(uri: str, name: str, version: int, key: str, lines: Sequence[str]) -> None:
    with store.quiet(), mlflow_client(f"note {key!r}", uri) as client:
        _tag(client, name, version, {key: _test_record(lines)})


def _tag(client: MlflowClient, name: str, version: int, tags: Mapping[str, str]) -> None:
    for key, value in store.tags_of(tags).items():
        client.set_model_version_tag(name, str(version), key, value)


def _test_record(lines: Sequence[str]) -> str:
    return json.dumps({"at": _now(), "tested": list(lines)})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
