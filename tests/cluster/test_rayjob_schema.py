"""The KubeRay files of `cluster/` against KubeRay's own schema, strictly, and Ray's autoscaler.

Kubernetes drops a field that it does not know without a word, and so does the schema as it comes; a
misspelt `idleTimeoutSeconds` would cost money silently. Here unknown fields are refused.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml  # type: ignore[import-untyped]  # what Ray reads them with; has no stubs
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)

from simclr_ray.distributed.launch import kuberay_keys as keys
from simclr_ray.distributed.launch.kuberay_schema import SPECS

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS_VARIABLE = "SIMCLR_RAY_SCHEMAS"
# libyaml reads the 1.4 MB file some ten times faster than the Python loader.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Tree = dict[str, Any]


def strict(schema: Any) -> Any:
    """Return the schema with unknown keys refused wherever Kubernetes would drop them."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: strict(value) for key, value in schema.items()}
    free = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get(
        "x-kubernetes-int-or-string"
    )
    if isinstance(schema.get("properties"), dict) and not free:
        out.setdefault("additionalProperties", False)
    return out


def definition(kind: str) -> Any:
    """Return KubeRay's definition of a kind, ray.io/v1; skip, saying so, where no folder has it."""
    value = os.environ.get(SCHEMAS_VARIABLE)
    if not value:
        # 1 MB of another project's files: not ours to store, and no package index has them
        pytest.skip(f"{SCHEMAS_VARIABLE} is unset: this test needs KubeRay's CRD files")
    file = Path(value) / f"ray.io_{kind.lower()}s.yaml"
    assert file.is_file(), f"{SCHEMAS_VARIABLE}={value} lacks {file.name}"
    crd = yaml.load(file.read_text("utf-8"), Loader=LOADER)
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    return version["schema"]["openAPIV3Schema"]


@pytest.fixture(scope="module")
def rayjob_definition() -> Any:
    return definition("RayJob")


@pytest.fixture(scope="module")
def rayjob_schema(rayjob_definition: Any) -> jsonschema.Draft202012Validator:
    """Return the strict validator of a RayJob."""
    return jsonschema.Draft202012Validator(strict(rayjob_definition))


@pytest.fixture(params=["kuberay-rayjob.yaml", "kuberay-study.yaml"])
def job(request: pytest.FixtureRequest) -> Tree:
    tree: Tree = yaml.safe_load((ROOT / "cluster" / request.param).read_text("utf-8"))
    return tree


def containers(job: Tree) -> Iterator[tuple[str, Tree]]:
    cluster = job["spec"]["rayClusterSpec"]
    yield "head", cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]["containers"][0]


def node_types(job: Tree) -> dict[str, Tree]:
    """Return the node types that Ray's autoscaler derives from the file, which it also checks."""
    cluster = {
        "metadata": {"name": "simclr-ray", "namespace": "default"},
        "spec": job["spec"]["rayClusterSpec"],
    }
    derived: dict[str, Tree] = _derive_autoscaling_config_from_ray_cr(cluster)[
        "available_node_types"
    ]
    return derived


def test_the_file_is_a_rayjob_without_unknown_fields(
    job: Tree, rayjob_schema: jsonschema.Draft202012Validator
) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    rayjob_schema.validate(job)


def test_the_cluster_that_stays_is_a_raycluster_without_unknown_fields(job: Tree) -> None:
    text = (ROOT / "cluster" / "kuberay-raycluster.yaml").read_text("utf-8")
    tree = yaml.safe_load(text)
    assert (tree["apiVersion"], tree["kind"]) == ("ray.io/v1", "RayCluster")
    jsonschema.Draft202012Validator(strict(definition("RayCluster"))).validate(tree)
    assert tree["spec"] == job["spec"]["rayClusterSpec"], "the nodes of all three files are alike"


def test_the_keys_that_cluster_check_allows_are_those_of_the_definition(
    rayjob_definition: Any,
) -> None:
    job = rayjob_definition["properties"]["spec"]["properties"]
    cluster = job["rayClusterSpec"]["properties"]
    assert set(cluster) == set(definition("RayCluster")["properties"]["spec"]["properties"])
    head = cluster["headGroupSpec"]["properties"]
    template = head["template"]["properties"]
    pod = template["spec"]["properties"]
    container = pod["containers"]["items"]["properties"]
    for allowed, given in (
        (keys.RAY_JOB, job),
        (keys.RAY_CLUSTER, cluster),
        (keys.AUTH, cluster["authOptions"]["properties"]),
        (keys.AUTOSCALER, cluster["autoscalerOptions"]["properties"]),
        (keys.HEAD_GROUP, head),
        (keys.WORKER_GROUP, cluster["workerGroupSpecs"]["items"]["properties"]),
        (keys.POD, pod),
        (keys.CONTAINER, container),
        (keys.RESOURCES, container["resources"]["properties"]),
    ):
        assert set(allowed) == set(given)
    assert set(keys.TEMPLATE) == set(template)


def assert_same_types(ours: Any, theirs: Any, at: str) -> int:
    """Assert that each type of ours is one of the definition; return how many were compared."""
    if "enum" in ours:
        assert theirs["type"] == "string", at
        assert set(theirs.get("enum", ours["enum"])) == set(ours["enum"]), at
    elif ours["type"] == ["string", "number"]:
        assert theirs["x-kubernetes-int-or-string"], at
    else:
        assert theirs["type"] == ours["type"], at
    inner = ours.get("properties", {}) if "properties" in theirs else {}
    assert set(inner) <= set(theirs.get("properties", inner)), at
    pairs = [(inner[key], theirs["properties"][key], f"{at}.{key}") for key in inner]
    of_many = [key for key in ("items", "additionalProperties") if key in ours]
    pairs += [(ours[key], theirs[key], f"{at}.{key}") for key in of_many]
    return 1 + sum(assert_same_types(*pair) for pair in pairs)


@pytest.mark.parametrize("kind", ["RayJob", "RayCluster"])
def test_the_types_that_cluster_check_asks_for_are_those_of_the_definition(kind: str) -> None:
    theirs = definition(kind)["properties"]["spec"]
    assert assert_same_types(SPECS[kind], theirs, kind) > 150
    assert set(theirs.get("required", [])) <= set(SPECS[kind]["required"])
    cluster = theirs["properties"].get("rayClusterSpec", theirs)["properties"]
    worker = cluster["workerGroupSpecs"]["items"]
    ours = SPECS["RayCluster"]["properties"]["workerGroupSpecs"]["items"]
    assert set(worker["required"]) == set(ours["required"])


@pytest.mark.parametrize(
    ("path", "right", "wrong"),
    [
        (("spec",), "shutdownAfterJobFinishes", "shutdownAfterJobFinish"),
        (
            ("spec", "rayClusterSpec", "autoscalerOptions"),
            "idleTimeoutSeconds",
            "idleTimeoutSecond",
        ),
        (("spec", "rayClusterSpec", "authOptions"), "secretName", "secretname"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 1), "maxReplicas", "maxReplica"),
        (
            ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec"),
            "serviceAccountName",
            "serviceAcountName",
        ),
        (
            ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0),
            "image",
            "images",
        ),
    ],
)
def test_a_misspelt_field_is_refused_at_any_depth(
    job: Tree,
    rayjob_schema: jsonschema.Draft202012Validator,
    path: tuple[str | int, ...],
    right: str,
    wrong: str,
) -> None:
    broken: Any = copy.deepcopy(job)
    node = broken
    for key in path:
        node = node[key]
    node[wrong] = node.pop(right)
    with pytest.raises(jsonschema.ValidationError) as refused:
        rayjob_schema.validate(broken)
    assert wrong in str(refused.value.message) or right in str(refused.value.message)


@pytest.mark.parametrize(
    ("key", "value"), [("mode", "tokens"), ("mode", True), ("enableK8sTokenAuth", "yes")]
)
def test_a_wrong_value_is_refused(
    job: Tree, rayjob_schema: jsonschema.Draft202012Validator, key: str, value: object
) -> None:
    job["spec"]["rayClusterSpec"]["authOptions"][key] = value
    with pytest.raises(jsonschema.ValidationError):
        rayjob_schema.validate(job)


def test_ray_derives_a_gpu_group_and_a_data_group_without_gpu(job: Tree) -> None:
    types = node_types(job)
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["gpu"]["resources"]["GPU"] == 1
    assert types["data"]["labels"] == {"node-group": "data"} != types["gpu"]["labels"]
    assert "GPU" not in types["data"]["resources"]
    assert (types["gpu"]["min_workers"], types["gpu"]["max_workers"]) == (4, 4)
    assert (types["data"]["min_workers"], types["data"]["max_workers"]) == (
        2,
        4,
    )  # one pod has CPUs for 14 of the 16 decode actors


def test_the_token_comes_from_a_secret(job: Tree) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "simclr-ray-auth"}
    for name, container in containers(job):
        assert "env" not in container, f"{name}: KubeRay sets the mode and the token"


def test_all_nodes_run_one_image_and_reserve_what_they_may_use(job: Tree) -> None:
    assert len({container["image"] for _, container in containers(job)}) == 1
    for name, container in containers(job):
        resources = container["resources"]
        assert resources["requests"] == resources["limits"], name


def test_the_cluster_ends_with_the_job(job: Tree) -> None:
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["rayClusterSpec"]["autoscalerOptions"]["idleTimeoutSeconds"] <= 900
