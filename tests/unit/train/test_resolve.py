"""What a config leaves to the data: classes, and the labels that a loss needs."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simclr_ray import config as cfg
from simclr_ray.config.experiment import ClassifierHeadConfig, Experiment
from simclr_ray.errors import CheckpointError, ConfigError, DataError, SimclrRayError
from simclr_ray.train.outcome import evaluation_digest
from simclr_ray.train.resolve import resolve
from tests.ray.images import noise_png, write_shapes
from tests.unit.inference.test_classifier import NAMES, checkpointed

CLASSIFIER = {"loss": {"name": "cross_entropy"}, "head": {"name": "classifier"}}


def experiment(**changes: Any) -> Experiment:
    tree = {"name": "t", "data": {"train": "x"}, "batch_size": 2}
    return cfg.validate(Experiment, {**tree, **changes})


def trained_on(experiment: Experiment, train: str) -> Experiment:
    data = experiment.data.model_copy(update={"train": train})
    return experiment.model_copy(update={"data": data})


def as_asked(resolved: Experiment) -> Experiment:
    """Return the experiment without what is always filled in."""
    assert resolved.data.decoder_sha256
    data = resolved.data.model_copy(update={"decoder_sha256": ""})
    return resolved.model_copy(update={"data": data})


def resolved(experiment: Experiment, train: str) -> Experiment:
    return resolve(trained_on(experiment, train)).config


def source(folder: Path, labels: list[int | None] | None) -> str:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    columns: dict[str, Any] = {"image": pa.array([out.getvalue()] * 6, pa.binary())}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
    pq.write_table(pa.table(columns), folder / "set.parquet")
    return str(folder / "set.parquet")


def test_classes_are_counted_and_no_other_loss_asks_for_labels(tmp_path: Path) -> None:
    labelled = source(tmp_path, [0, 1, 4, 1, 0, 2])
    head = resolved(experiment(**CLASSIFIER), labelled).head
    assert isinstance(head, ClassifierHeadConfig)
    assert head.num_classes == 4  # those that occur
    plain = experiment()
    train = source(tmp_path, None)
    assert as_asked(resolved(plain, train)) == trained_on(plain, train)


@pytest.mark.parametrize(
    ("labels", "num_classes", "told"),
    [
        (None, 0, "cross_entropy needs labels"),
        ([0, 1, None, 1, 0, 2], 0, "1 of 6 rows .* have no label"),
        ([3] * 6, 0, "one class"),
        ([0, 1, 4, 1, 0, 2], 3, "has 4 classes, more than head.num_classes=3"),
    ],
)
def test_labels_that_cannot_serve_are_named(
    tmp_path: Path, labels: list[int | None] | None, num_classes: int, told: str
) -> None:
    asked = experiment(**CLASSIFIER | {"head": {"name": "classifier", "num_classes": num_classes}})
    with pytest.raises(DataError, match=told):
        resolved(asked, source(tmp_path, labels))


def test_supcon_needs_a_column_and_no_more(tmp_path: Path) -> None:
    asked = experiment(loss={"name": "supcon"})
    with pytest.raises(DataError, match="supcon needs labels"):
        resolved(asked, source(tmp_path, None))
    train = source(tmp_path, [0, None, None, 1, 0, 0])
    assert as_asked(resolved(asked, train)) == trained_on(asked, train)


def test_the_same_on_other_workers_and_storage_is_the_same_run(tmp_path: Path) -> None:
    train = source(tmp_path, None)
    asked = experiment(data={"train": train})
    run = resolve(asked)
    assert run.run_name.startswith("t-")
    placed = experiment(
        data={"train": train},
        scaling={"num_workers": 2},
        storage=str(tmp_path / "elsewhere"),
    )
    assert resolve(placed).run_name == run.run_name
    assert resolve(asked.model_copy(update={"seed": 9})).run_name != run.run_name
    table = pq.read_table(tmp_path / "set.parquet")
    pq.write_table(pa.concat_tables([table, table[:1]]), tmp_path / "set.parquet")
    assert resolve(asked).run_name != run.run_name


def test_local_paths_are_absolute_from_the_start_and_uris_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"train": "images", "test": "s3://bucket/test", "eval_train": "~/bank"}
    made = experiment(data=data, storage="runs", init={"weights": "run/step"})
    assert made.data.train == str(tmp_path.resolve() / "images")
    assert made.data.test == "s3://bucket/test"
    assert made.data.eval_train == str(Path("~/bank").expanduser().resolve())
    assert made.storage == str(tmp_path.resolve() / "runs")
    assert made.init.weights == str(tmp_path.resolve() / "run" / "step")
    assert cfg.validate(Experiment, cfg.to_tree(made)) == made


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"loss": {"name": "cross_entropy"}}, "belong together"),
        ({"head": {"name": "classifier"}}, "belong together"),
        ({"loss": {"name": "ntxnet"}}, r"loss.name: got 'ntxnet'; .*did you mean 'ntxent'"),
        ({"head": {"name": "mpl"}}, r"head.name: got 'mpl'.*mlp"),
        ({"loss": {"name": "triplet", "margin": -1}}, r"loss.margin: got -1"),
        ({"loss": {"learn_temperature": True, "normalize": False}}, "needs normalize"),
        ({"loss": {"name": "triplet", "semi_hard": True, "margin": 0.0}}, "margin above 0"),
        ({"encoder": {"name": "resnet", "depth": 18, "selective_kernel": 0.0625}}, "depth >= 50"),
    ],
)
def test_losses_heads_and_encoders_that_cannot_be_are_named(
    changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        experiment(**changes)


PIPELINE = {"name": "pipeline", "size": 32}


@pytest.mark.parametrize(
    ("augment", "told"),
    [
        ({"a": [{"name": "crop"}, {"name": "blurs"}]}, r"augment.a.1.*blurs.*did you mean 'blur'"),
        ({"a": [{"name": "crop"}, {"name": "flip", "p": 1.5}]}, r"augment.a.1.p: got 1.5"),
        ({"a": [{"name": "crop"}, {"name": "jitter", "hue": 0.6}]}, "above 0.5"),
        (
            {"a": [{"name": "crop"}, {"name": "blur", "kernel": 1.5}]},
            r"augment.a.1.kernel: got 1.5",
        ),
        ({"a": [{"name": "color"}]}, "must begin with crop"),
        ({"symmetric": False}, "must begin with crop"),
        ({"b": [{"name": "crop"}]}, "symmetric must be false"),
        ({"a": [{"name": "crop", "min_area": 0.5, "max_area": 0.1}]}, "above max_area"),
    ],
)
def test_pipelines_that_cannot_be_are_named(augment: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        experiment(augment=PIPELINE | augment)


def test_labels_of_the_test_split_that_no_class_has_are_told_before_the_training(
    tmp_path: Path,
) -> None:
    train = source(tmp_path, [0, 1, 1, 0, 1, 0])
    labels = pa.table({"image": pa.array([b"x"], pa.binary()), "label": pa.array([2], pa.int64())})
    pq.write_table(labels, tmp_path / "test.parquet")
    asked = experiment(**CLASSIFIER, data={"train": train, "test": str(tmp_path / "test.parquet")})
    with pytest.raises(DataError, match="has 1 class that the classifier does not know: 2"):
        resolve(asked)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"registry": {"name": "m", "alias": "v3"}}, "v3"),
        ({"storage": "s3://bucket/runs"}, "tracking"),
        ({"data": {"train": "TRAIN", "eval_train": "not/there"}}, "not/there"),
    ],
)
def test_what_would_fail_after_hours_is_told_by_a_dry_run_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], told: str
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    train = source(tmp_path, None)
    changes = {key: dict(v) if isinstance(v, dict) else v for key, v in changes.items()}
    changes["data"] = {**changes.get("data", {}), "train": train}
    with pytest.raises(SimclrRayError, match=told):
        resolve(experiment(**changes))


def test_classes_that_have_nothing_in_common_are_refused_before_anything_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another set of names, numbers as text, and no labels at all."""
    labels = {"train": ["cat", "dog"], "other": ["car", "bus"], "digits": ["0", "1"]}
    numbered: dict[str, list[Any]] = {"ints": [0, 1], "unlabelled": [None, None]}
    for name, two in {**labels, **numbered}.items():
        kind = pa.string() if name in labels else pa.int64()
        png = noise_png(1, 8)
        table = {"image": pa.array([png] * 20, pa.binary()), "label": pa.array(two * 10, kind)}
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")

    def resolved_with(test: str) -> object:
        data = {"train": str(tmp_path / "train.parquet"), "test": str(tmp_path / f"{test}.parquet")}
        tree = {"name": "t", "data": data, "batch_size": 4, "storage": str(tmp_path / "runs")}
        return resolve(cfg.validate(Experiment, tree))

    for test in ("other", "digits"):
        with pytest.raises(DataError, match=r"has no class of .*train\.parquet.*cat, dog here"):
            resolved_with(test)
    with pytest.raises(DataError, match="numbers without names"):
        resolved_with("ints")
    resolved_with("unlabelled")
    assert "no kNN and no linear scores" in caplog.text


def test_a_storage_that_cannot_be_made_is_named_before_anything_starts(tmp_path: Path) -> None:
    write_shapes(tmp_path / "train.parquet", 40)
    data = {"train": str(tmp_path / "train.parquet")}
    tree = {"name": "t", "data": data, "batch_size": 4, "storage": "/proc/x"}
    with pytest.raises(ConfigError, match="storage: "):
        resolve(cfg.validate(Experiment, tree))


def test_an_unknown_way_to_make_views_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIMCLR_RAY_NATIVE", "perhaps")
    with pytest.raises(ConfigError, match="perhaps"):
        resolve(experiment(data={"train": source(tmp_path, None)}))


def test_an_evaluation_on_swapped_splits_is_another(tmp_path: Path) -> None:
    for name, rows in (("a", 12), ("b", 9)):
        write_shapes(tmp_path / f"{name}.parquet", rows)
    a, b = (str(tmp_path / f"{name}.parquet") for name in "ab")
    one = experiment(data={"train": a, "eval_train": a, "test": b})
    assert evaluation_digest(one) == evaluation_digest(experiment(data={"train": a, "test": b}))
    swapped = experiment(data={"train": a, "eval_train": b, "test": a})
    assert evaluation_digest(one) != evaluation_digest(swapped)


def test_a_student_is_given_the_classes_of_its_teacher_whatever_its_images_are_called(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = checkpointed(tmp_path / "teacher-0123", NAMES)
    months = [f"months/{month}" for month in ("jan", "feb", "mar", "apr")]
    for seed, place in enumerate(["flat", *months, "test/dog"]):
        (tmp_path / place).mkdir(parents=True)
        for number in range(2):
            (tmp_path / place / f"{number}.png").write_bytes(noise_png(2 * seed + number, 40))
    source_names = {"flat": (), "months": ("apr", "feb", "jan", "mar")}
    for train, own in source_names.items():
        tree = {
            "name": "student",
            "data": {"train": str(tmp_path / train), "test": str(tmp_path / "test")},
            "batch_size": 2,
            "head": {"name": "classifier"},
            "loss": {"name": "distillation", "teacher": str(teacher)},
            "storage": str(tmp_path / "runs"),
        }
        student = resolve(cfg.validate(Experiment, tree))
        assert student.class_names == tuple(NAMES)
        assert student.config.classifier is not None
        assert student.config.classifier.num_classes == 3
        assert pickle.loads(pickle.dumps(student)).class_names == tuple(NAMES)  # noqa: S301 - ours
        assert student.source.class_names == own
    assert "has no image of cat, big bird" in caplog.text


def test_a_teacher_that_names_more_classes_than_it_has_is_refused(tmp_path: Path) -> None:
    teacher = checkpointed(tmp_path / "teacher-0123", [*NAMES, "jan"])
    train = source(tmp_path, None)
    asked = experiment(
        head={"name": "classifier"}, loss={"name": "distillation", "teacher": str(teacher)}
    )
    with pytest.raises(CheckpointError, match="names 4 classes and its classifier has 3"):
        resolved(asked, train)


def test_a_test_split_of_other_named_classes_is_refused_and_one_of_fewer_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Names beside numbers: the numbers of other names say nothing."""
    names = {"train": "cat,dog", "other": "car,bus", "fewer": "dog,cat"}
    for split, classes in names.items():
        columns = {
            "image": pa.array([noise_png(seed, 8) for seed in range(4)], pa.binary()),
            "label": pa.array([0, 0, 0, 0] if split == "fewer" else [0, 1, 0, 1], pa.int64()),
        }
        table = pa.table(columns).replace_schema_metadata({"class_names": classes})
        pq.write_table(table, tmp_path / f"{split}.parquet")

    def resolved_with(test: str) -> None:
        data = {"train": str(tmp_path / "train.parquet"), "test": str(tmp_path / f"{test}.parquet")}
        resolve(experiment(**CLASSIFIER, data=data, storage=str(tmp_path / "runs")))

    with pytest.raises(DataError, match="has none of the classes that the classifier knows"):
        resolved_with("other")
    resolved_with("fewer")
    assert "fewer.parquet has no image of cat" in caplog.text
