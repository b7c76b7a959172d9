"""An alias moves to what is better on the same images, not to what is worse, and comes back."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from torch import nn

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment, TrackingConfig
from simclr_ray.errors import CollapseError, ConfigError, NotPromotedError
from simclr_ray.evaluation.scores import UNTRAINED
from simclr_ray.inference import promotion, registry
from simclr_ray.inference.comparison import (
    Contender,
    EncoderScores,
    paired_bootstrap,
    standard_errors,
)
from simclr_ray.inference.embed import load_encoder
from simclr_ray.inference.encoder import Encoder
from simclr_ray.inference.encoder_files import write_encoder
from simclr_ray.inference.requirement import Facts, Requirement
from simclr_ray.nn.build import build_encoder, feature_dim
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.tracking.runs import Tracker
from simclr_ray.tracking.store import RegisteredEncoder
from simclr_ray.train import pipeline
from simclr_ray.train.outcome import Run
from tests.ray.images import write_splits

Hits = npt.NDArray[np.bool_]
RULE = "linear_top1 >= champion - 0.2 * se and effective_rank > 1"


def test_the_standard_error_is_that_of_the_mean_of_paired_differences() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(4000)  # both fail on the same images
    one, other = hard < 0.7 + 0.1 * rng.random(4000), hard < 0.7 + 0.1 * rng.random(4000)
    difference = one.astype(float) - other.astype(float)
    exact = difference.std() / np.sqrt(len(difference))
    assert paired_bootstrap(one, other) == pytest.approx(exact, rel=0.06)
    apart = np.hypot(*(h.std() / np.sqrt(len(h)) for h in (one, other)))
    assert exact < 0.6 * apart  # what unpaired scores would say
    assert paired_bootstrap(one, one) == 0.0


def test_errors_are_of_the_images_that_both_could_read() -> None:
    one = EncoderScores({}, {"knn_top1": (np.array([1, 2, 3, 5]), np.array([1, 0, 1, 1], bool))})
    other = EncoderScores({}, {"knn_top1": (np.array([5, 3, 9]), np.array([0, 1, 0], bool))})
    expected = paired_bootstrap(np.array([1, 1], bool), np.array([1, 0], bool))
    assert standard_errors(one, other) == {"knn_top1": expected}
    assert standard_errors(one, EncoderScores({}, {})) == {}


def simulated(rng: np.random.Generator, shift: float, num: int = 2000) -> tuple[Hits, Hits]:
    """Return what two models say of the same images; the candidate's accuracy is `shift` higher."""
    u, common = rng.random(num), rng.random(num) < 0.6
    champion = np.where(common, u < 0.7, rng.random(num) < 0.7)
    candidate = np.where(common, u < 0.7 + shift, rng.random(num) < 0.7 + shift)
    return candidate, champion


@pytest.mark.parametrize("sign", [1, -1])
def test_of_200_clear_differences_at_most_one_in_twenty_is_decided_wrongly(sign: int) -> None:
    rng = np.random.default_rng(11)
    rule = Requirement.parse("linear_top1 >= champion - 0.2 * se")
    se = float(np.mean([paired_bootstrap(*simulated(rng, 0.0)) for _ in range(20)]))
    wrong = 0
    for _ in range(200):
        candidate, champion = simulated(rng, sign * 2 * se)
        facts = Facts(
            {"linear_top1": candidate.mean()},
            {"linear_top1": champion.mean()},
            {"linear_top1": paired_bootstrap(candidate, champion)},
        )
        wrong += rule.check(facts).holds is not (sign > 0)
    assert wrong <= 10


class Registry(NamedTuple):
    uri: str
    client: MlflowClient
    run_ids: list[str]


SIZE = 32


def png() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def four_versions(registered: Registry, tmp_path: Path) -> Registry:
    """Return a registry of one's own with four versions."""
    folder = Path(registered.uri.removeprefix("sqlite:///")).parent
    shutil.copy(folder / "mlflow.db", tmp_path)
    shutil.copytree(folder / "mlartifacts", tmp_path / "mlartifacts")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    return Registry(uri, MlflowClient(tracking_uri=uri), registered.run_ids)


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Register four encoders of one experiment, which MLflow has as an artifact."""
    tmp_path = tmp_path_factory.mktemp("registry")
    (tmp_path / "data").mkdir()
    data = write_splits(tmp_path / "data", 90)
    tree = {
        "name": "t", "batch_size": 8, "epochs": 1,
        "encoder": {"name": "resnet", "depth": 10, "width": 0.125, "stem": "strided"},
        "head": {"name": "mlp", "dim": 8},
        "augment": {"name": "simclr", "size": SIZE},
        "data": {"train": f"{data}/train.parquet", "test": f"{data}/test.parquet"},
        "evaluation": {"knn": {"k": 5}, "linear": {"epochs": 5}},
    }  # fmt: skip
    experiment = cfg.validate(Experiment, tree)
    tracker = Tracker.open(TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"), "unused")
    runs = []
    for number in range(4):
        torch.manual_seed(number + 1)
        network = build_encoder(experiment.encoder)
        encoder = Encoder(
            network, config=cfg.to_tree(experiment.encoder), size=SIZE,
            feature_dim=feature_dim(network),
        )  # fmt: skip
        write_encoder(tmp_path / f"e{number}", encoder)
        run = tracker.start_run(f"r{number}", params={}, tags={})
        run.log_text(cfg.dump_yaml(cfg.to_tree(experiment)), "experiment.yaml")
        registry.register_encoder(
            tmp_path / f"e{number}", run, name="m", alias=None, example=png(), tags={},
            scores={"knn_top1": 0.25 * number},
        )  # fmt: skip
        runs.append(run.run_id)
    return Registry(tracker.uri, MlflowClient(tracking_uri=tracker.uri), runs)


def alias(stored: Registry, name: str = "champion") -> int:
    return int(stored.client.get_registered_model("m").aliases.get(name, 0))


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch, four_versions: Registry) -> dict[int, float]:
    """Have versions reach what is set here, by the same images: version -> accuracy."""
    reached = {1: 0.5, 2: 0.7, 3: 0.6, 4: 0.69}

    def mark(network: nn.Module) -> float:
        return float(next(network.parameters()).sum())

    uri = four_versions.uri
    version_of = {mark(load_encoder(f"models:/m/{v}", tracking_uri=uri)): v for v in reached}

    def score_all(contenders: Sequence[Contender], *_: Any) -> list[EncoderScores]:
        return [
            scored(0.2, 2.0)
            if c.name == UNTRAINED
            else scored(reached[version_of[mark(c.network)]])
            for c in contenders
        ]

    def scored(accuracy: float, rank: float = 9.0) -> EncoderScores:
        hits = np.random.default_rng(0).random(1000) < accuracy
        metrics = {"linear_top1": float(hits.mean()), "knn_top1": 0.5, "effective_rank": rank}
        metrics |= {"feature_std": 0.1}
        return EncoderScores(metrics, {"linear_top1": (np.arange(1000), hits)})

    monkeypatch.setattr(promotion, "score_all", score_all)
    return reached


def test_an_alias_goes_up_stays_before_a_worse_one_and_comes_back(
    four_versions: Registry, scores: dict[int, float]
) -> None:
    uri = four_versions.uri
    first = promotion.promote("models:/m/1", "champion", require=RULE, tracking_uri=uri)
    assert (first.version, first.previous, alias(four_versions)) == (1, 0, 1)
    assert "there is no champion yet" in first.lines[0]
    second = promotion.promote("models:/m/2", "champion", require=RULE, tracking_uri=uri)
    assert (second.version, second.previous, alias(four_versions)) == (2, 1, 2)
    with pytest.raises(NotPromotedError, match="does not become champion, which stays version 2"):
        promotion.promote("models:/m/3", "champion", require=RULE, tracking_uri=uri)
    assert alias(four_versions) == 2
    refused = four_versions.client.get_model_version("m", "3").tags["refused.champion"]
    (line, _) = json.loads(refused)["tested"]
    assert line.startswith("linear_top1 >= champion - 0.2 * se: fails (linear_top1 0.58")
    back = promotion.rollback("m", "champion", tracking_uri=uri)
    assert (back.version, back.previous, alias(four_versions)) == (1, 2, 1)
    assert "rolled_back.champion" in four_versions.client.get_model_version("m", "2").tags
    with pytest.raises(ConfigError, match="pointed to no version before 1 that is on record"):
        promotion.rollback("m", "champion", tracking_uri=uri)
    again = promotion.promote("models:/m/1", "champion", require=RULE, tracking_uri=uri)
    assert (again.version, alias(four_versions)) == (1, 1)


def test_an_encoder_that_has_learned_nothing_is_refused_but_for_force(
    four_versions: Registry, scores: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = {"linear_top1": 0.9, "effective_rank": 1.5, "feature_std": 0.1}
    reached = [EncoderScores(metrics, {}), EncoderScores(metrics | {"effective_rank": 5.0}, {})]
    monkeypatch.setattr(promotion, "score_all", lambda given, *_: reached[: len(given)])
    uri = four_versions.uri
    with pytest.raises(CollapseError, match=r"effective rank is 1\.50.*champion stays"):
        promotion.promote("models:/m/1", "champion", tracking_uri=uri)
    assert alias(four_versions) == 0
    assert "refused.champion" in four_versions.client.get_model_version("m", "1").tags
    made = promotion.promote("models:/m/1", "champion", force=True, tracking_uri=uri)
    assert made.version == alias(four_versions) == 1


def test_two_at_once_leave_the_alias_on_one_of_them_and_a_way_back(
    four_versions: Registry, scores: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = four_versions.uri
    promotion.promote("models:/m/1", "champion", require=RULE, tracking_uri=uri)
    both, tested = threading.Barrier(2), promotion._Contest.verdict

    def together(*args: Any) -> Any:
        verdict = tested(*args)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(20)  # both have compared themselves with version 1
        return verdict

    monkeypatch.setattr(promotion._Contest, "verdict", together)
    said: dict[int, object] = {}

    def run(version: int) -> None:
        try:
            said[version] = promotion.promote(
                f"models:/m/{version}", "champion", require="linear_top1 > champion",
                tracking_uri=uri,
            )  # fmt: skip
        except (NotPromotedError, ConfigError) as error:
            said[version] = error

    threads = [threading.Thread(target=run, args=(version,)) for version in (2, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert alias(four_versions) in (2, 4)
    if isinstance(said[4], NotPromotedError):  # it has seen that 2 was faster, and is worse
        assert alias(four_versions) == 2
    previous = four_versions.client.get_model_version("m", str(alias(four_versions))).tags
    assert previous["previous.champion"] in ("1", "2", "4")
    back = promotion.rollback("m", "champion", tracking_uri=uri)
    assert alias(four_versions) == back.version != back.previous


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda uri: promotion.promote("models:/m/9", "a", tracking_uri=uri),
            "there is none; m has",
        ),
        (lambda uri: promotion.promote("m", "a", tracking_uri=uri), "the form is models:/name"),
        (lambda uri: promotion.promote("models:/m/1", "latest", tracking_uri=uri), "is reserved"),
        (
            lambda uri: promotion.promote("models:/m/1", "a", require="knn > 1", tracking_uri=uri),
            "--require: .*no metric 'knn'",
        ),
        (lambda uri: promotion.rollback("m", "a", tracking_uri=uri), "there is none; m has"),
        (lambda uri: promotion.rollback("x", "a", tracking_uri=uri), "no registered model 'x'"),
        (lambda uri: promotion.remove_version("models:/m/9", tracking_uri=uri), "there is none"),
    ],
)
def test_what_is_not_there_is_said_and_nothing_moves(
    four_versions: Registry, act: Callable[[str], Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        act(four_versions.uri)
    assert four_versions.client.get_registered_model("m").aliases == {}


@pytest.mark.slow
def test_real_encoders_are_scored_on_the_images_of_their_experiment(
    four_versions: Registry,
) -> None:
    uri = four_versions.uri
    made = promotion.promote(
        "models:/m/1", "champion", require="knn_top1 >= 0", force=True, tracking_uri=uri
    )
    assert made.lines[0].startswith("knn_top1 >= 0: holds (knn_top1 ")
    rule = "knn_top1 >= champion - 3 * se - 1 and effective_rank > 0"
    made = promotion.promote("models:/m/2", "champion", require=rule, force=True, tracking_uri=uri)
    assert (made.version, made.previous) == (2, 1)
    said = r"classifier_top1 > 0: classifier_top1 was not measured \(the version has no classifier"
    with pytest.raises(NotPromotedError, match=said):
        promotion.promote(
            "models:/m/3", "champion", require="classifier_top1 > 0", force=True, tracking_uri=uri
        )
    headings, *rows = promotion.compare("models:/m/2", "models:/m@champion", tracking_uri=uri)
    assert headings == [
        "metric",
        "models:/m/2",
        "models:/m@champion",
        "difference",
        "standard error",
    ]
    by_metric = {row[0]: row for row in rows}
    assert by_metric["knn_top1"][3:] == ["+0.0000", "0.0000"]
    assert by_metric["effective_rank"][4] == "-"


def test_a_version_goes_but_not_from_under_an_alias(
    four_versions: Registry, scores: dict[int, float]
) -> None:
    uri, client = four_versions.uri, four_versions.client
    promotion.promote("models:/m/1", "champion", require=RULE, tracking_uri=uri)
    with pytest.raises(ConfigError, match="champion points to version 1"):
        promotion.remove_version("models:/m/1", tracking_uri=uri)
    assert promotion.remove_version("models:/m/1", force=True, tracking_uri=uri) == 1
    assert promotion.remove_version("models:/m/2", tracking_uri=uri) == 2
    assert {int(v.version) for v in client.search_model_versions("name = 'm'")} == {3, 4}
    assert alias(four_versions) == 0


def test_run_version_and_logged_model_point_to_one_another_and_carry_the_scores(
    four_versions: Registry,
) -> None:
    client = four_versions.client
    version = client.get_model_version("m", "3")
    assert version.run_id == four_versions.run_ids[2]
    assert version.tags["knn_top1"] == "0.5"
    outputs = client.get_run(version.run_id).outputs
    assert outputs is not None
    (output,) = outputs.model_outputs
    assert f"/{output.model_id}/" in str(version.source)
    model = client.get_logged_model(output.model_id)
    assert model.source_run_id == version.run_id
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "m", "version": "3"}]
    assert version.description is not None
    assert f"/models/{model.model_id})" in version.description
    assert "| knn_top1 | 0.5000 |" in version.description
    assert {m.key: m.value for m in model.metrics or []} == {"knn_top1": 0.5}


def test_a_run_that_asks_for_a_rule_is_registered_and_the_alias_moves_or_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder.of(str(tmp_path), "r-12345678")
    uri = f"sqlite:///{tmp_path}/x.db"
    RunRecord("id", uri, "f", "d").write(folder)
    run = Run(folder.name, folder.uri, "step", "id", {})
    made = RegisteredEncoder("enc", 3, "models:/enc/3", "id")
    asked: list[Any] = []

    def register(*given: Any) -> RegisteredEncoder:
        asked.append(given)
        return made

    monkeypatch.setattr(pipeline, "register_run", register)
    monkeypatch.setattr(pipeline, "promote", lambda *given, **more: asked.append((given, more)))
    tree: dict[str, Any] = {
        "name": "r",
        "data": {"train": "x"},
        "registry": {"name": "enc", "alias": "best"},
    }
    plain = cfg.validate(Experiment, tree)
    assert pipeline._registered(run, plain) == made
    assert asked == [(folder.uri, "enc", "best")]
    asked.clear()
    ruled = cfg.validate(Experiment, tree | {"registry": tree["registry"] | {"require": RULE}})
    moved = made._replace(alias="best")
    assert pipeline._registered(run, ruled) == moved
    assert moved.address == "models:/enc@best"
    more = {"require": RULE, "force": True, "tracking_uri": uri}
    assert asked == [(folder.uri, "enc", None), (("models:/enc/3", "best"), more)]

    def refuse(*_: Any, **__: Any) -> None:
        raise NotPromotedError("models:/enc/3 does not become best: it is worse")

    monkeypatch.setattr(pipeline, "promote", refuse)
    stayed = pipeline._registered(run, ruled)
    assert stayed == made._replace(refusal="models:/enc/3 does not become best: it is worse")
    assert stayed.address == "models:/enc/3"
    assert "models:/enc/3 does not become best" in caplog.text


def test_the_registry_may_be_another_store(
    registered: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, other = f"sqlite:///{tmp_path}/runs.db", f"sqlite:///{tmp_path}/registry.db"
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", other)
    with pytest.raises(ConfigError, match=r"no MLflow store at .*registry\.db|runs\.db"):
        load_encoder("models:/m/1", tracking_uri=uri)
    assert not list(tmp_path.iterdir())  # a read makes no store
    tracker = Tracker.open(TrackingConfig(uri=uri), "unused")
    run = tracker.start_run("r", params={}, tags={})
    folder = Path(registered.uri.removeprefix("sqlite:///")).parent / "e0"
    registry.register_encoder(folder, run, name="far", alias="best", example=png(), tags={})
    assert load_encoder("models:/far@best", tracking_uri=uri).feature_dim > 0
    assert MlflowClient(uri, other).get_model_version_by_alias("far", "best").version in (1, "1")
    assert not MlflowClient(uri, uri).search_registered_models()
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "ftp://x")
    with pytest.raises(ConfigError, match="MLflow has no ftp:// store"):
        load_encoder("models:/far@best", tracking_uri=uri)
