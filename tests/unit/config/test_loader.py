"""A config is checked whole: every issue one line, with the path, the value and what is right."""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest

from simclr_ray import config as cfg
from simclr_ray.config import preset_names
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import ConfigError, ConfigIssue

MINIMAL: dict[str, Any] = {"name": "t", "data": {"train": "somewhere"}}
UNION_TAGS = {"resnet", "torchvision", "none", "linear", "mlp", "lars", "sgd", "adamw"}


def tree(**changes: Any) -> dict[str, Any]:
    return {**MINIMAL, **changes}


def issues_of(given: Any) -> list[ConfigIssue]:
    with pytest.raises(ConfigError) as caught:
        cfg.validate(Experiment, given)
    return caught.value.issues


def only(given: Any) -> ConfigIssue:
    (issue,) = issues_of(given)
    return issue


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("1.", 1.0),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("012", 12),  # YAML 1.1 reads octal here
        ("0o14", 12),
        ("0x1F", 31),
        ("1:30", "1:30"),  # YAML 1.1 reads 90 here
        ("2024", 2024),
        ("'7'", "7"),
        ("[1, a]", [1, "a"]),
        ("", None),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    parsed = cfg.parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\tx: 1", "{a"])
def test_broken_yaml_is_one_line_that_names_the_source(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cfg.parse_yaml(text, "mine.yaml")
    assert str(caught.value).startswith("mine.yaml: is not YAML: ")
    assert "\n" not in str(caught.value)


def test_a_text_that_looks_like_a_tag_is_to_be_quoted() -> None:
    remedy = """begins with ! is quoted: key: "!value" in a file, key='"!value"' of a command"""
    for text, source in (("a: !c", "mine.yaml"), ("!c", "")):
        with pytest.raises(ConfigError, match=re.escape(remedy)):
            cfg.parse_yaml(text, source)
    with pytest.raises(ConfigError, match=re.escape(remedy)):
        cfg.parse_overrides(["a.b=!c"])
    assert cfg.parse_yaml('a: "!c"') == {"a": "!c"}
    assert cfg.parse_overrides(['a.b="!c"']) == ([("a.b", "!c")], [])
    with pytest.raises(ConfigError, match="could not determine a constructor") as refused:
        cfg.parse_yaml("a: !!python/object:os.system x", "mine.yaml")
    assert "is quoted" not in str(refused.value)


def test_a_repeated_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not YAML"):
        cfg.parse_yaml("seed: 1\nseed: 2\n", "mine.yaml")


@pytest.mark.parametrize(
    ("given", "path", "hint", "siblings"),
    [
        (tree(batchsize=8), "batchsize", "batch_size", ("epochs", "seed")),
        (
            tree(schedule={"learning_rat": 1.0}),
            "schedule.learning_rat",
            "learning_rate",
            ("scaling",),
        ),
        (
            tree(evaluation={"knn": {"tempratur": 0.1}}),
            "evaluation.knn.tempratur",
            "temperature",
            ("k",),
        ),
        (
            tree(encoder={"name": "resnet", "widht": 2.0}),
            "encoder.widht",
            "width",
            ("depth", "stem"),
        ),
        (
            tree(optimizer={"name": "adamw", "weight_deca": 0.5}),
            "optimizer.weight_deca",
            "weight_decay",
            ("beta1", "beta2"),
        ),
        (
            tree(data={"train": "x", "columns": {"image": "y", "imag": "z"}}),
            "data.columns.imag",
            "image",
            ("label",),
        ),
    ],
)
def test_an_unknown_key_is_told_with_its_nearest_and_all_that_are_allowed(
    given: dict[str, Any], path: str, hint: str, siblings: tuple[str, ...]
) -> None:
    issue = next(m for m in issues_of(given) if m.path == path)
    assert f"unknown key (did you mean {hint!r}?)" in issue.problem
    allowed = issue.problem.split("allowed here: ")[1].split(", ")
    assert {hint, *siblings} <= set(allowed)
    assert allowed == sorted(allowed)


def test_the_keys_allowed_in_a_union_are_those_of_the_named_variant() -> None:
    issue = only(tree(head={"name": "linear", "layers": 3}))
    assert issue.path == "head.layers"
    assert issue.problem.endswith("allowed here: batch_norm, dim, name")


def test_a_key_that_is_like_no_other_gets_no_hint() -> None:
    assert "did you mean" not in only(tree(zzzzzz=1)).problem


@pytest.mark.parametrize(
    ("given", "path", "parts"),
    [
        (tree(seed="one"), "seed", ("'one'", "integer")),
        (tree(seed=1.5), "seed", ("1.5", "integer")),
        (tree(seed=True), "seed", ("True", "integer")),
        (tree(schedule={"learning_rate": "big"}), "schedule.learning_rate", ("'big'", "number")),
        (tree(tracking={"system_metrics": "yes"}), "tracking.system_metrics", ("'yes'", "boolean")),
        (tree(data="folder"), "data", ("'folder'",)),
        (tree(data={"train": 7}), "data.train", ("7", "string")),
        (tree(seed=None), "seed", ("None", "integer")),
    ],
)
def test_a_value_of_the_wrong_type_is_shown_with_the_type_that_is_right(
    given: dict[str, Any], path: str, parts: tuple[str, ...]
) -> None:
    issue = only(given)
    assert issue.path == path
    assert all(part in issue.problem for part in parts)


@pytest.mark.parametrize(
    ("given", "path", "allowed", "hint"),
    [
        (tree(precision="float16"), "precision", "float64, float32, bf16", "float"),
        (
            tree(encoder={"name": "resnet", "stem": "cifr"}),
            "encoder.stem",
            "imagenet, imagenet_same, cifar, strided",
            "cifar",
        ),
        (tree(schedule={"scaling": "lin"}), "schedule.scaling", "linear, sqrt, none", "linear"),
        (
            tree(encoder={"name": "resnet", "depth": 51}),
            "encoder.depth",
            "10, 18, 34, 50, 101, 152, 200",
            "",
        ),
    ],
)
def test_a_wrong_choice_is_told_with_all_choices_and_the_nearest(
    given: dict[str, Any], path: str, allowed: str, hint: str
) -> None:
    issue = only(given)
    assert issue.path == path
    assert f"allowed: {allowed}" in issue.problem
    assert f"did you mean '{hint}" in issue.problem or not hint


@pytest.mark.parametrize(
    ("given", "path", "bound"),
    [
        (tree(batch_size=1), "batch_size", "2"),
        (tree(epochs=0), "epochs", "1"),
        (tree(seed=2**32), "seed", "4294967296"),
        (tree(loss={"temperature": 0.0}), "loss.temperature", "0.001"),
        (tree(augment={"min_area": 0.0}), "augment.min_area", "0"),
        (tree(augment={"blur": 1.5}), "augment.blur", "1"),
        (tree(optimizer={"name": "sgd", "momentum": 1.0}), "optimizer.momentum", "1"),
        (tree(schedule={"learning_rate": float("inf")}), "schedule.learning_rate", "finite"),
        (tree(schedule={"learning_rate": float("nan")}), "schedule.learning_rate", "finite"),
        (tree(name="a/b"), "name", "pattern"),
    ],
)
def test_a_value_out_of_bounds_is_told_with_the_bound(
    given: dict[str, Any], path: str, bound: str
) -> None:
    issue = only(given)
    assert issue.path == path
    assert bound in issue.problem.split(";")[1]


def test_a_variant_without_a_name_is_the_default_one() -> None:
    built = cfg.validate(Experiment, tree(optimizer={"momentum": 0.5}, loss={"temperature": 0.2}))
    assert (built.optimizer.name, built.loss.name) == ("lars", "ntxent")
    issue = only(tree(head={"width": 3}))
    assert issue.path == "head.width"
    assert issue.problem.endswith("batch_norm, dim, hidden, layers, name")
    overridden = cfg.apply_overrides(
        tree(loss={"temperature": 0.2}), ["loss.name=triplet"], Experiment
    )
    assert overridden["loss"] == {"name": "triplet"}


@pytest.mark.parametrize(
    ("node", "given", "shown", "allowed"),
    [
        (
            "encoder",
            {"name": "resnt"},
            "'resnt'",
            "resnet, torchvision, timm, import (did you mean 'resnet'?)",
        ),
        (
            "head",
            {"name": "nonlinear"},
            "'nonlinear'",
            "none, linear, mlp, classifier (did you mean 'linear'?)",
        ),
        ("optimizer", {"name": None}, "missing", "lars, sgd, adamw, import"),
    ],
)
def test_a_wrong_or_missing_variant_name_is_told_at_its_name(
    node: str, given: dict[str, Any], shown: str, allowed: str
) -> None:
    issue = only(tree(**{node: given}))
    assert issue.path == f"{node}.name"
    assert shown in issue.problem
    assert f"allowed: {allowed}" in issue.problem


def test_a_missing_key_without_default_is_named() -> None:
    assert [str(m) for m in issues_of({"name": "t"})] == [
        "data: missing key, and it has no default"
    ]
    assert only({"name": "t", "data": {}}).path == "data.train"


def test_all_issues_are_told_at_once_and_no_variant_name_is_part_of_a_path() -> None:
    wrong = tree(
        batchsize=3,
        seed="x",
        encoder={"name": "resnet", "depth": 19, "wide": 2},
        head={"name": "mlp", "layers": 1},
        optimizer={"name": "lars", "momentum": 2.0, "trust": 1},
        precision="half",
    )
    found = issues_of(wrong)
    assert {m.path for m in found} == {
        "batchsize",
        "seed",
        "encoder.depth",
        "encoder.wide",
        "head.layers",
        "optimizer.momentum",
        "optimizer.trust",
        "precision",
    }
    assert len(str(ConfigError(found)).splitlines()) == len(found) == 8
    assert not any(UNION_TAGS & set(m.path.split(".")) for m in found)


def test_values_that_do_not_go_together_are_told_without_a_path() -> None:
    issue = only(tree(batch_size=4, scaling={"num_workers": 8}))
    assert str(issue).startswith("batch_size is global: 4 images cannot be shared by 8 workers")


def test_a_config_error_survives_pickling_with_its_issues() -> None:
    one = ConfigError.of("a.b", "is wrong")
    assert (one.issues, str(one)) == ([ConfigIssue("a.b", "is wrong")], "a.b: is wrong")
    error = ConfigError([*one.issues, ConfigIssue("", "as a whole")])
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (again.issues, str(again)) == (error.issues, "a.b: is wrong\nas a whole")


@pytest.mark.parametrize(
    "text", ["epochs", "=3", ".epochs=3", "loss..temperature=1", "loss.=1", ""]
)
def test_an_override_of_the_wrong_form_is_refused_with_the_right_one(text: str) -> None:
    with pytest.raises(ConfigError, match=r"the form is key\.path=value"):
        cfg.apply_overrides(MINIMAL, [text])


def test_every_malformed_override_is_a_issue_of_its_own() -> None:
    with pytest.raises(ConfigError) as caught:
        cfg.apply_overrides(MINIMAL, ["epochs", "seed=1", "name.x=2", "foo"])
    assert {m.path for m in caught.value.issues} == {"epochs", "foo", "name.x"}


def test_an_override_that_is_not_yaml_is_refused_and_named() -> None:
    with pytest.raises(ConfigError, match=r"^data\.train=\[1: is not YAML"):
        cfg.apply_overrides(MINIMAL, ["data.train=[1"])


def test_an_override_through_a_value_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        cfg.apply_overrides(MINIMAL, ["data.train.x=1"])
    assert str(caught.value) == "data.train.x: data.train is a value and has no keys"


def test_overrides_make_nodes_set_values_and_leave_the_tree_they_were_given() -> None:
    given = tree(loss={"temperature": 0.5})
    out = cfg.apply_overrides(
        given, ["loss.temperature=0.1", "evaluation.knn.k=5", "data.train=a=b", "data.eval_train="]
    )
    assert out["loss"] == {"temperature": 0.1}
    assert out["evaluation"] == {"knn": {"k": 5}}
    assert out["data"] == {"train": "a=b", "eval_train": ""}
    assert given == tree(loss={"temperature": 0.5})


@pytest.mark.parametrize("reverse", [False, True])
def test_another_variant_drops_the_old_keys_and_keeps_those_given_with_it(
    reverse: bool,
) -> None:
    given = tree(optimizer={"name": "lars", "trust_coefficient": 0.1, "weight_decay": 0.5})
    overrides = ["optimizer.name=adamw", "optimizer.beta1=0.5"]
    out = cfg.apply_overrides(given, overrides[::-1] if reverse else overrides)
    assert out["optimizer"] == {"name": "adamw", "beta1": 0.5}


def test_naming_the_same_variant_keeps_its_keys() -> None:
    given = tree(optimizer={"name": "lars", "weight_decay": 0.5})
    out = cfg.apply_overrides(given, ["optimizer.name=lars"])
    assert out["optimizer"] == given["optimizer"]


def test_the_digest_does_not_see_the_order_of_keys_and_sees_every_value() -> None:
    a = {"x": 1, "y": {"p": [1, 2], "q": "s"}}
    b = {"y": {"q": "s", "p": [1, 2]}, "x": 1}
    assert cfg.digest_of(a) == cfg.digest_of(b)
    assert len(cfg.digest_of(a)) == 16
    others = [{**a, "x": 2}, {**a, "x": "1"}, {**a, "y": {"p": [2, 1], "q": "s"}}, {**a, "z": 0}]
    assert len({cfg.digest_of(t) for t in [a, *others]}) == 5


def test_differences_name_each_changed_added_and_removed_leaf() -> None:
    old = {"a": 1, "b": {"c": 2, "d": 3}, "e": [1]}
    new = {"a": 1, "b": {"c": 5, "f": 4}, "e": [2]}
    assert cfg.differences(old, new) == [
        "b.c: 2 -> 5",
        "b.d: 3 -> (absent)",
        "e: [1] -> [2]",
        "b.f: (absent) -> 4",
    ]
    assert cfg.differences(old, old) == []


def test_presets_are_there() -> None:
    assert {"cifar10_resnet18", "imagenet_resnet50"} <= set(preset_names())


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_valid_and_named_as_its_file(preset: str) -> None:
    assert Experiment.load(preset).name == preset


@pytest.mark.parametrize("preset", preset_names())
def test_a_dumped_config_reads_back_as_the_same_experiment(preset: str) -> None:
    experiment = Experiment.load(preset)
    dumped = cfg.dump_yaml(cfg.to_tree(experiment))
    assert cfg.validate(Experiment, cfg.parse_yaml(dumped)) == experiment
    assert dumped.index("name:") < dumped.index("data:") < dumped.index("batch_size:")


@pytest.mark.parametrize("text", ["yes", "1e-4", "012", "null", "true", "a: b", "", "~", "1:30"])
def test_dumped_text_stays_text(text: str) -> None:
    assert cfg.parse_yaml(cfg.dump_yaml({"x": text})) == {"x": text}


def test_leaves_are_the_dotted_paths_to_every_scalar() -> None:
    found = cfg.leaves(cfg.to_tree(cfg.validate(Experiment, MINIMAL)))
    assert found["evaluation.knn.k"] == 200
    assert found["optimizer.name"] == "lars"
    assert all(isinstance(value, str | int | float | bool) for value in found.values())


def test_an_unknown_preset_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'cifar10_cpu'\?\); presets: "):
        Experiment.load("cifar10_cpuu")


def test_a_yaml_file_that_is_missing_or_holds_no_keys_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        Experiment.load(str(tmp_path / "none.yaml"))
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="holds a list, not keys and values"):
        Experiment.load(str(tmp_path / "list.yaml"))
