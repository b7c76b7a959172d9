"""What an experiment derives, and what its identity does and does not depend on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment, NTXentConfig, SimCLRViewsConfig
from simclr_ray.errors import ConfigError

IMAGENET_ROWS, CIFAR_ROWS = 1_281_167, 50_000
PLACED = ("scaling", "health", "tracking", "checkpoint", "evaluation", "registry")
# Each other leaf with a value that it may have beside the default.
OTHER: dict[str, Any] = {
    "evaluation.actors": 2,
    "schedule.decay": "constant",
    "tracking.only_params": ["seed"],
    "data.columns.image": "img",
    "data.columns.label": "y",
    "data.columns.id": "key",
    "precision": "float64",
    "schedule.scaling": "sqrt",
    "encoder.stem": "cifar",
    "encoder.depth": 18,
    "encoder.model": "resnet18",
    "optimizer.momentum_form": "outside",
    "batch_norm.group_size": 128,
    "evaluation.size": 40,
    "data.decoder": "turbo",
    "augment.start_size": 16,
    "loss.negatives": "other",
    "scaling.color_augment_on": "worker",
}
VARIANTS = [
    {},
    {"encoder": {"name": "torchvision"}, "head": {"name": "linear"}, "optimizer": {"name": "sgd"}},
    {"head": {"name": "none"}, "optimizer": {"name": "adamw"}},
    {"loss": {"name": "cross_entropy"}, "head": {"name": "classifier"}},
    {"loss": {"name": "triplet"}},
    {"loss": {"name": "dcl"}},
    {"loss": {"name": "distillation", "teacher": "t"}, "head": {"name": "classifier"}},
    {"augment": {"name": "pipeline"}},
]


def experiment(**changes: Any) -> Experiment:
    return cfg.validate(Experiment, {"name": "t", "data": {"train": "here"}, **changes})


def leaf_paths(tree: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaf_paths(value, (*at, key))
        else:
            yield (*at, key)


# go together only; and what is the model's own (`test_options_and_statistics_...`)
TOGETHER = {
    *(("augment", "b"), ("augment", "symmetric")),
    *(("init", "mean"), ("init", "std"), ("init", "freeze"), ("encoder", "options")),
}


def another(path: str, value: Any) -> Any:
    """Return a valid value of the leaf that differs from `value`."""
    if path in OTHER:
        return OTHER[path]
    if path == "augment.a":
        return [*value, {"name": "blur"}]
    if path == "augment.shared":
        return [{"name": "crop"}]
    if path == "loss.views":
        return 2
    if path in ("health.on_collapse", "health.on_divergence"):
        return "rollback"
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 if value else 0.25
    return f"{value}x"


def changed(tree: dict[str, Any], path: tuple[str, ...]) -> Experiment:
    out = copy.deepcopy(tree)
    node = out
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = another(".".join(path), node[path[-1]])
    return cfg.validate(Experiment, out)


def is_placement(path: tuple[str, ...]) -> bool:
    return path[0] in (*PLACED, "name", "storage") or ".".join(path) in (
        "data.train",
        "data.cache_gib",
        "data.eval_train",
        "data.test",
        "data.decoder_sha256",
        "data.max_bad_fraction",  # whether a run goes on, not what it computes
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_digest_changes_with_every_leaf_that_changes_the_result_and_with_no_other(
    variant: dict[str, Any],
) -> None:
    base = experiment(**variant)
    tree = cfg.to_tree(base)
    seen = {base.digest()}
    for path in leaf_paths(tree):
        if path[-1] == "name" and len(path) > 1 and path[0] != "registry":
            continue  # variants have a test of their own
        if path[-1] == "full_size_epoch_fraction":
            assert changed(tree, path).digest() == base.digest()  # nothing grows
            continue
        if path in TOGETHER:
            continue
        if path == ("scaling", "color_augment_on") and base.augment.name != "simclr":
            continue  # refused there
        if path[-1] == "selective_kernel" and getattr(base.encoder, "depth", 0) < 50:
            continue  # refused there
        if path[-1] == "recompute_activations" and base.encoder.name != "resnet":
            continue  # refused there
        other = changed(tree, path)
        assert other != base, path
        if is_placement(path):
            assert other.digest() == base.digest(), path
        else:
            assert other.digest() not in seen, path
            seen.add(other.digest())


def test_views_grow_in_steps_from_the_start_size_to_the_full_one() -> None:
    views = experiment(augment={"size": 224, "start_size": 160}).augment
    assert [views.size_at(epoch, 100) for epoch in (0, 37, 38, 74, 75, 99)] == [
        160, 160, 192, 192, 224, 224,
    ]  # fmt: skip
    small = experiment(
        augment={"size": 32, "start_size": 20, "full_size_epoch_fraction": 1.0}
    ).augment
    assert [small.size_at(epoch, 6) for epoch in range(6)] == [20, 20, 24, 24, 28, 28]
    assert [SimCLRViewsConfig(size=32).size_at(epoch, 2) for epoch in (0, 1)] == [32, 32]
    for wrong in (4, 33):
        with pytest.raises(ConfigError, match="start_size"):
            experiment(augment={"size": 32, "start_size": wrong})


def test_naming_what_has_no_variants_keeps_what_stands_beside_the_name() -> None:
    loaded = Experiment.load("shapes_demo", "registry.name=mine", "registry.alias=good")
    assert (loaded.registry.name, loaded.registry.alias) == ("mine", "good")
    renamed = Experiment.load("shapes_demo", "registry.name=mine")
    assert renamed.registry.alias == Experiment.load("shapes_demo").registry.alias


def test_every_variant_has_a_digest_of_its_own() -> None:
    parts = {
        "encoder": ["resnet", "torchvision", "timm"],
        "head": ["none", "linear", "mlp"],
        "optimizer": ["lars", "sgd", "adamw"],
    }
    digests = {experiment(**{p: {"name": n}}).digest() for p, names in parts.items() for n in names}
    assert len(digests) == 3 + 3 + 3 - 2  # three of them are the default experiment


def test_options_and_statistics_are_of_the_digest_where_they_count() -> None:
    plain = experiment(encoder={"name": "timm"})
    assert experiment(encoder={"name": "timm", "options": {}}).digest() == plain.digest()
    other = experiment(encoder={"name": "timm", "options": {"drop_path_rate": 0.1}})
    assert other.digest() != plain.digest()
    statistics = {"mean": [0.5] * 3, "std": [0.5] * 3}
    assert experiment(init=statistics).digest() == experiment().digest()  # of no weights
    of = {"weights": "w.pth", "sha256": "x"}
    assert experiment(init=of | statistics).digest() != experiment(init=of).digest()
    with pytest.raises(ConfigError, match="one number a channel each"):
        experiment(init=of | {"mean": [0.5] * 3})


def test_defaults_written_out_are_the_same_experiment() -> None:
    assert experiment().digest() == experiment(seed=0, optimizer={"name": "lars"}).digest()


# From format 2 on a digest stays what it is: runs and studies are found again by it.
DIGESTS = {
    "bands_resnet18": "95ee9fd3e36e27f6",
    "cifar10_cpu": "5bffa9a5beda6767",
    "cifar10_laptop": "d10db822ccd33c85",
    "cifar10_lightly": "82f64146f8c32006",
    "cifar10_resnet18": "765b043ec6ea96c3",
    "cifar10_resnet50": "a5f6bea9f461d006",
    "cifar10_small_batch": "21428d711153ccd9",
    "cifar10_solo_learn": "77818e95ae54da95",
    "cifar10_study_cpu": "9677f728d8a54705",
    "gray16_resnet18": "899de377ee6daeb8",
    "imagenet_convnext_tiny": "7502f89f6d00f77f",
    "imagenet_resnet50": "4af99d521f163431",
    "imagenet_resnet50_1000": "a6208b014ea74c09",
    "imagenet_vit_small": "f302b0b31e2ba61a",
    "photos_cpu": "a69ef23d7991772a",
    "photos_gpu": "4efe0b8eeac4dafa",
    "shapes_demo": "c1c7066870ae5611",
}


@pytest.mark.parametrize("preset", cfg.preset_names())
def test_the_digests_of_all_presets_are_the_stored_ones(preset: str) -> None:
    assert Experiment.load(preset).digest() == DIGESTS[preset]


def test_a_newer_field_counts_once_it_changes_what_earlier_releases_did() -> None:
    class Old(cfg.Config):
        size: int = cfg.Field(32, ge=8)

    class New(Old):
        cutmix: float = cfg.Field(0.0, since=3)
        norm: str = cfg.Field("layer", since=4, neutral="batch")
        where: str = cfg.Field("here", placement=True)

    class Newest(New):
        inner: New = cfg.Field(New(norm="batch"), since=5)

    old = cfg.identity(Old())
    assert cfg.identity(New(norm="batch", where="there")) == old
    assert cfg.identity(New()) == {**old, "norm": "layer"}
    assert cfg.identity(New(norm="batch", cutmix=0.5)) == {**old, "cutmix": 0.5}
    assert cfg.identity(Newest(norm="batch")) == old
    changed = Newest(norm="batch", inner=New(norm="batch", cutmix=1.0))
    assert cfg.identity(changed) == {**old, "inner": {**old, "cutmix": 1.0}}


def test_imagenet_numbers_are_those_of_the_authors() -> None:
    e = experiment(batch_size=4096, epochs=100)
    assert e.warmup_steps(IMAGENET_ROWS) == 3127
    assert e.steps_per_epoch(IMAGENET_ROWS) == 312
    assert e.total_steps(IMAGENET_ROWS) == 31_200
    assert e.peak_learning_rate() == pytest.approx(4.8, rel=1e-12)


def test_cifar_numbers_are_those_of_the_authors() -> None:
    e = experiment(
        batch_size=512, epochs=1000, schedule={"learning_rate": 1.0, "scaling": "linear"}
    )
    assert e.warmup_steps(CIFAR_ROWS) == 976
    assert e.total_steps(CIFAR_ROWS) == 97_000
    assert e.peak_learning_rate() == 2.0


@pytest.mark.parametrize(
    ("scaling", "base", "batch_size", "peak"),
    [
        ("sqrt", 0.075, 4096, 4.8),
        ("sqrt", 0.075, 256, 1.2),
        ("sqrt", 0.075, 512, 1.697),
        ("linear", 0.3, 4096, 4.8),
        ("linear", 0.3, 256, 0.3),
        ("linear", 0.3, 512, 0.6),
        ("none", 0.3, 4096, 0.3),
    ],
)
def test_the_peak_rate_is_scaled_by_the_global_batch(
    scaling: str, base: float, batch_size: int, peak: float
) -> None:
    for workers in (1, 7):
        e = experiment(
            batch_size=batch_size,
            schedule={"learning_rate": base, "scaling": scaling},
            scaling={"num_workers": workers},
        )
        assert e.peak_learning_rate() == pytest.approx(peak, abs=5e-4)


def test_warm_up_in_steps_takes_the_place_of_warm_up_in_epochs() -> None:
    e = experiment(batch_size=10, schedule={"warmup_steps": 5, "warmup_epochs": 3.0})
    assert e.warmup_steps(1000) == 5
    assert experiment(batch_size=10, schedule={"warmup_epochs": 0.5}).warmup_steps(1000) == 50


@pytest.mark.parametrize("batch_size", [2, 3, 64, 97, 256, 1000, 4096])
def test_local_batches_sum_to_the_global_batch_and_differ_by_at_most_one(batch_size: int) -> None:
    for workers in [r for r in (1, 2, 3, 4, 5, 7, 8, 13, 64, 97, 256) if r <= batch_size]:
        e = experiment(batch_size=batch_size, scaling={"num_workers": workers})
        local = [e.local_batch_size(rank) for rank in range(workers)]
        assert sum(local) == batch_size
        assert max(local) - min(local) <= 1
        assert min(local) >= 1


def test_a_global_batch_smaller_than_the_workers_is_refused() -> None:
    with pytest.raises(ConfigError, match="8 images cannot be shared by 9 workers"):
        experiment(batch_size=8, scaling={"num_workers": 9})


@pytest.mark.parametrize(("images", "workers"), [(100, 1), (512, 1), (64, 65)])
def test_joint_statistics_over_what_does_not_divide_the_batch_are_refused(
    images: int, workers: int
) -> None:
    with pytest.raises(ConfigError, match=f"batch_norm.group_size={images} must divide"):
        experiment(
            batch_size=256, batch_norm={"group_size": images}, scaling={"num_workers": workers}
        )


def test_groups_follow_from_the_images_with_joint_statistics() -> None:
    whole = experiment(batch_size=256)
    assert whole.num_groups == 1
    assert experiment(batch_size=256, batch_norm={"group_size": 64}).num_groups == 4
    named = experiment(batch_size=256, batch_norm={"group_size": 256})
    assert (named.num_groups, named.digest()) == (1, whole.digest())


def test_a_size_of_evaluation_that_the_encoder_cannot_take_is_refused() -> None:
    assert experiment(evaluation={"size": 40}).evaluation_size == 40
    vit = {"name": "torchvision", "model": "vit_b_16"}
    for changes in (
        {"evaluation": {"size": 7}},
        {"evaluation": {"size": 40}, "encoder": vit},
        {"augment": {"start_size": 16}, "encoder": vit},
    ):
        with pytest.raises(ConfigError, match=r"evaluation\.size"):
            experiment(**changes)


def test_an_experiment_cannot_be_changed() -> None:
    with pytest.raises(Exception, match="frozen"):
        experiment().seed = 3  # type: ignore[misc] # the point of the test


def test_overrides_reach_the_experiment() -> None:
    e = Experiment.load("cifar10_cpu", "optimizer.name=adamw", "loss.temperature=1e-1")
    assert isinstance(e.loss, NTXentConfig)
    assert (e.optimizer.name, e.loss.temperature) == ("adamw", 0.1)


def test_a_run_takes_the_cpus_and_gpus_of_all_workers_decoding_included() -> None:
    scaling = {"num_workers": 4, "cpus_per_worker": 2.0, "gpus_per_worker": 0.5}
    decoding = {"data_actors_per_worker": 3, "cpus_per_data_actor": 0.25}
    whole = experiment(scaling=scaling | decoding).scaling
    assert (whole.data_cpus_per_worker, whole.num_cpus, whole.num_gpus) == (0.75, 11.0, 2.0)


def test_a_config_with_a_list_in_it_has_a_hash() -> None:
    data = {"train": "here", "channels": 4, "white": [1.0, 2.0, 3.0, 4.0]}
    one, other = experiment(data=data).data, experiment(data=data).data
    assert one is not other
    assert {one, other} == {one}
    assert len({one, experiment(data=data | {"white": [1.0, 2.0, 3.0, 5.0]}).data}) == 2


def test_a_frozen_encoder_is_another_result_and_goes_with_a_classifier_alone() -> None:
    classifier = {"head": {"name": "classifier"}, "loss": {"name": "cross_entropy"}}
    trained = experiment(init={"weights": "runs/x"}, **classifier)
    frozen = experiment(init={"weights": "runs/x", "freeze": True}, **classifier)
    assert trained.digest() != frozen.digest()
    for wrong in (
        {"init": {"freeze": True}, **classifier},
        {"init": {"weights": "runs/x", "freeze": True}},
        {
            "init": {"weights": "runs/x", "freeze": True},
            "head": {"name": "classifier", "layers": 1},
            "loss": {"name": "cross_entropy"},
        },
    ):
        with pytest.raises(ConfigError, match=r"init\.freeze needs init\.weights"):
            experiment(**wrong)
