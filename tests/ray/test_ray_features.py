"""Features by Ray Data's actors are those of one process, and so are the scores."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq
import pytest
import ray
import torch

from simclr_ray import config as cfg
from simclr_ray.augment.decode import ImageDecoder
from simclr_ray.augment.decode import Pixels as Decoded
from simclr_ray.config.experiment import EvaluationConfig, Experiment
from simclr_ray.data.source import Source
from simclr_ray.errors import ClusterError
from simclr_ray.evaluation import encoded_splits, ray_features
from simclr_ray.evaluation.encoded_splits import encode_split, encode_splits
from simclr_ray.evaluation.evaluate import evaluate
from simclr_ray.evaluation.feature_file import FeatureFile
from simclr_ray.evaluation.features import extract_features, load_split
from simclr_ray.evaluation.ray_features import extract
from simclr_ray.evaluation.scores import RawPixelEncoder
from simclr_ray.inference.comparison import Contender, score_all
from simclr_ray.nn.build import build_model
from simclr_ray.nn.resnet import ResNet
from simclr_ray.storage import checkpoint
from tests.ray import processes
from tests.ray.images import write_shapes

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TWO = EvaluationConfig(actors=2, cpus_per_actor=0.5, batch_size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two splits; one image of the first is broken, ids are in no order."""
    path = tmp_path_factory.mktemp("extract")
    for name, rows in (("bank", 110), ("test", 60)):
        write_shapes(path / f"{name}.parquet", rows, row_group_size=25)
    table = pq.read_table(path / "bank.parquet").take(list(range(109, -1, -1)))
    images = table["image"].to_pylist()
    images[40] = b"no image"
    table = table.set_column(1, "image", [images])
    pq.write_table(table, path / "bank.parquet", row_group_size=25)
    return path


@pytest.mark.parametrize("limit", [0, 30])
def test_features_are_those_of_one_process(
    folder: Path, ray_cluster: str, limit: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "simclr_ray")
    ray_features._explain_line_of_ray.cache_clear()
    torch.manual_seed(0)
    encoder = ResNet(10, 0.125, "strided")
    source = Source.open(str(folder / "bank.parquet"))
    split = load_split(source, 32, limit)
    found = extract(source, [encoder, RawPixelEncoder()], 32, TWO, limit=limit)
    extract(source, [encoder], 32, TWO, limit=10)
    assert caplog.text.count("of Ray comes a line with an E") == 1
    assert torch.equal(found.ids, split.ids)
    assert torch.equal(found.labels, split.labels)
    assert found.bad == split.bad
    expected = extract_features(encoder, split.images)
    torch.testing.assert_close(found.features[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.features[1], extract_features(RawPixelEncoder(), split.images))


def test_many_images_are_encoded_by_actors_unasked_and_their_features_lie_in_a_file(
    folder: Path, ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"train": str(folder / "bank.parquet"), "test": str(folder / "test.parquet")}
    experiment = cfg.validate(Experiment, {"name": "t", "data": data, "augment": {"size": 32}})
    ((bank, test),) = encode_splits(experiment, [RawPixelEncoder()])
    monkeypatch.setattr(encoded_splits, "VIEWS_BYTES", 0)
    monkeypatch.setattr(ray_features, "IN_MEMORY_BYTES", 0)
    ((of_bank, of_test),) = encode_splits(experiment, [RawPixelEncoder()])
    for there, here in ((of_bank, bank), (of_test, test)):
        assert here is not None
        assert there is not None
        assert isinstance(there.rows, FeatureFile)
        assert torch.equal(there.labels, here.labels)
        torch.testing.assert_close(there.rows[:], here.rows[:])
    features, bad = encode_split(Source.open(data["train"]), RawPixelEncoder(), experiment)
    torch.testing.assert_close(features.rows[:], bank.rows[:])
    assert len(bad) > 0


def test_the_table_is_that_of_one_process(folder: Path, ray_cluster: str) -> None:
    tree = {
        "name": "t",
        "data": {"train": str(folder / "bank.parquet"), "test": str(folder / "test.parquet")},
        "encoder": {"name": "resnet", "depth": 10, "width": 0.125, "stem": "strided"},
        "head": {"name": "mlp", "dim": 16},
        "evaluation": {"knn": {"k": 5}},
    }
    exp = cfg.validate(Experiment, tree)
    model = build_model(exp)
    record = {"experiment": cfg.to_tree(exp), "digest": "d", "fingerprint": "f", "class_names": []}
    kept = folder / checkpoint.new_name(1)
    checkpoint.write(kept, 1, checkpoint.pack(model, torch.optim.SGD(model.parameters())), record)
    alone = evaluate(kept)
    shared = evaluate(
        kept, ("knn", "linear"), "evaluation.actors=2", "evaluation.cpus_per_actor=0.5"
    )
    for a, b in zip(alone, shared, strict=True):
        assert a.name == b.name
        assert b.knn_top1 == pytest.approx(a.knn_top1, abs=0.02)  # one image of sixty
        assert b.linear_top1 == pytest.approx(a.linear_top1, abs=0.04)
        assert b.uniformity == pytest.approx(a.uniformity, rel=1e-3)


class Counting(ImageDecoder):
    """Counts what this process decodes; its copies in actors count for themselves."""

    decoded: ClassVar[list[int]] = []

    def decode(self, encoded: bytes, least: tuple[int, int] = (0, 0)) -> Decoded:
        self.decoded.append(len(encoded))
        return super().decode(encoded, least)


def test_networks_are_compared_by_actors_where_the_config_has_them(
    folder: Path, ray_cluster: str
) -> None:
    tree: dict[str, Any] = {
        "name": "t",
        "data": {"train": str(folder / "bank.parquet"), "test": str(folder / "test.parquet")},
        "augment": {"size": 32},
        "evaluation": {"knn": {"k": 5}, "linear": {"epochs": 5}},
    }
    torch.manual_seed(0)
    networks = {"encoder": ResNet(10, 0.125, "strided"), "pixels": RawPixelEncoder()}
    contenders = [Contender(name, n, 32, Counting()) for name, n in networks.items()]
    alone = score_all(contenders, cfg.validate(Experiment, tree))
    assert len(Counting.decoded) == 110 + 60
    tree["evaluation"] |= {"actors": 2, "cpus_per_actor": 0.5}
    shared = score_all(contenders, cfg.validate(Experiment, tree))
    assert len(Counting.decoded) == 110 + 60
    for one, other in zip(alone, shared, strict=True):
        (ids, hits), (other_ids, other_hits) = one.hits["knn_top1"], other.hits["knn_top1"]
        assert ids.tolist() == other_ids.tolist()
        assert (hits != other_hits).sum() <= 1  # sums in another order
        assert other.metrics["effective_rank"] == pytest.approx(
            one.metrics["effective_rank"], rel=1e-3
        )


def test_more_actors_than_the_cluster_has_cpus_are_refused(folder: Path, ray_cluster: str) -> None:
    source = Source.open(str(folder / "bank.parquet"))
    with pytest.raises(
        ClusterError, match=r"evaluation.actors=99, each of 1 CPU.* room for 4 on 1"
    ):
        extract(source, [RawPixelEncoder()], 32, EvaluationConfig(actors=99))


def test_actors_end_without_a_destructor_that_may_wait_for_ever(
    folder: Path, ray_cluster: str
) -> None:
    context = ray.get_runtime_context()
    logs = Path(context.get_temp_dir()) / context.get_session_name() / "logs"

    def ended() -> dict[str, str]:
        """Return the log of each of Ray's workers that has shut down, by its name."""
        texts = {path.name: path.read_text() for path in logs.glob("python-core-worker-*.log")}
        return {name: text for name, text in texts.items() if "Core worker is destructed" in text}

    def wait() -> None:
        until = time.monotonic() + 30
        while processes.named("_Extractor") and time.monotonic() < until:
            time.sleep(0.1)
        assert not processes.named("_Extractor")

    wait()  # those of the tests before
    before = set(ended())
    extract(Source.open(str(folder / "bank.parquet")), [RawPixelEncoder()], 32, TWO)
    wait()
    new = [text for name, text in ended().items() if name not in before]
    assert len(new) == 2
    assert not [text for text in new if "Destructing CoreWorkerProcessImpl" in text]
