"""What `cluster check` refuses of values: of KubeRay, Slurm, `ray up`, and of YAML itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]  # what Ray reads them with; has no stubs

from simclr_ray.distributed.launch.check import read_launch_file
from simclr_ray.distributed.launch.documents import documents_of
from simclr_ray.distributed.launch.slurm import read_slurm
from simclr_ray.errors import ConfigError
from tests.unit.distributed.test_launch import (
    CLUSTER,
    JOB,
    STAYS,
    VERSIONS,
    failures,
    findings_of,
    replaced,
    text_of,
    without,
)

Edit = Callable[[str], str]


def changed(pattern: str, new: str) -> Edit:
    def edit(text: str) -> str:
        assert re.search(pattern, text, re.DOTALL), pattern
        return re.sub(pattern, new, text, count=1, flags=re.DOTALL)

    return edit


KUBERAY = [
    # what is wrong, what is said, what to do
    (replaced('num-cpus: "0" ', "num-cpus: 0 "), "headgroup: rayStartParams.num-cpus=0: text is",
     'in quotes, num-cpus: "0"'),
    (replaced('num-cpus: "0" ', 'num-cpus: "two" '), 'headgroup: rayStartParams.num-cpus="two"',
     "a whole number in quotes"),
    (replaced("replicas: 4", 'replicas: "4"', 1), 'gpu: replicas="4": a whole number',
     "without quotes, replicas: 4"),
    (replaced("minReplicas: 4", 'minReplicas: "4"'), 'gpu: minReplicas="4"', "minReplicas: 4"),
    (replaced("maxReplicas: 4", "maxReplicas: 4.5", 1), "gpu: maxReplicas=4.5", "a whole number"),
    (replaced("minReplicas: 4", "minReplicas: -1"), "gpu: minReplicas=-1", "0 or more"),
    (replaced("maxReplicas: 4", "maxReplicas: 40000000", 1), "gpu: maxReplicas=40000000",
     "10,000 or less"),
    (replaced("minReplicas: 4", "minReplicas: 5"), "gpu: minReplicas=5 is more than maxReplicas=4",
     "raise maxReplicas"),
    (replaced('gpu: "1"', 'gpu: "0.5"'), "gpu: resources.limits.nvidia.com/gpu=0.5", "whole"),
    (replaced('gpu: "1"', "gpu: 500m"), "gpu: resources.requests.nvidia.com/gpu=500m", "whole"),
    (replaced('gpu: "1"', "gpu: 1e99"), "gpu: resources.limits.nvidia.com/gpu=1e99", "whole"),
    (replaced('gpu: "1"', "gpu: one"), "gpu: resources.limits.nvidia.com/gpu=one", "a number"),
    (changed(r'limits: .cpu: "14", memory: 56Gi', 'limits: {cpu: "14", memory: 50Gi'),
     "gpu: resources.limits.memory=50Gi is below the request, 56Gi", "raise the limit"),
    (changed(r'(limits: .cpu: "14".*?100Gi), nvidia.com/gpu: "1"', r"\1"),
     "gpu: resources.limits.nvidia.com/gpu=not stated", "in both"),
    (without(r"^metadata:\n  name.*\n"), "metadata.name is missing", "metadata: {name:"),
    (replaced("  name: simclr-ray\n", "  name: Simclr_Ray\n"), "metadata.name=Simclr_Ray", "a-z"),
    (replaced("  name: simclr-ray\n", f"  name: {'a' * 48}\n"), "metadata.name=aaa", "47 at most"),
    (replaced("  name: simclr-ray\n", "  name: 5\n"), "metadata.name=5", 'name: "5"'),
    (replaced("groupName: gpu", "groupName: GPU_1"), "groupName=GPU_1", "a-z"),
    (replaced("groupName: data", "groupName: gpu"), "gpu: groupName stands twice", "of its own"),
    (replaced("memory: 56Gi", "memory: 1e999"), "gpu: resources.limits.memory=1e999", "50Gi"),
    (replaced("memory: 56Gi", "memory: 1.0e+999"), "gpu: resources.limits.memory=inf", "50Gi"),
    (replaced("memory: 56Gi", "memory: 1e30"), "gpu: resources.limits.memory=1e30: too much",
     "64Ti"),
    (replaced("memory: 56Gi", f"memory: {'9' * 400}"), "memory=999", "64Ti"),
    (replaced("memory: 56Gi", "memory: 512Ki"), "gpu: resources.requests.memory=512Ki: too little",
     "1Gi"),
    (replaced("memory: 56Gi", "memory: 56GB"), "gpu: resources.requests.memory=56GB is no", "50Gi"),
    (replaced("memory: 56Gi", "memory:"), "gpu: template.spec.containers.0.resources.requests."
     "memory=empty", "a number"),
    (replaced('cpu: "14"', "cpu: fourteen"), "gpu: resources.limits.cpu=fourteen is no", "500m"),
    (replaced('cpu: "14"', "cpu: 1e9"), "gpu: resources.limits.cpu=1e9: too much", "4096"),
    (replaced("storage: 100Gi", "storage: 512Ki"),
     "data: resources.limits.ephemeral-storage=512Ki: too little", "1Gi"),
    (changed(r"headGroupSpec:\n.*?    workerGroupSpecs:", "headGroupSpec:\n    workerGroupSpecs:"),
     "spec.rayClusterSpec.headGroupSpec is missing", "write headGroupSpec"),
    (changed(r"      - groupName: gpu.*", "      -\n"), "workerGroupSpecs.0=empty", "a mapping"),
    (changed(r"workerGroupSpecs:.*", "workerGroupSpecs:\n"), "workerGroupSpecs is missing",
     "correct it"),
    (changed(r"template:\n          spec:\n            restart.*?      - groupName: data",
             "template:\n      - groupName: data"), "gpu: template is missing", "template"),
    (changed(r"(gpu\n.*?containers:)\n +- name: ray-worker\n.*?( +tolerations)", r"\1 []\n\2"),
     "gpu: template.spec.containers=[]", "at least one"),
    (replaced('"2.60.0"', "2.6"), "rayVersion=2.6: text is wanted", 'rayVersion: "2.6"'),
    (replaced("name: ray-worker\n", f"name: ray-worker\n{' ' * 16}env: [{{name: A, value: 1}}]\n"),
     "gpu: template.spec.containers.0.env.0.value=1", 'value: "1"'),
    (replaced("restartPolicy: Never        #", "nodeSelector: {spot: true}\n          #"),
     "headgroup: template.spec.nodeSelector.spot=true", 'spot: "true"'),
    (replaced("restartPolicy: Never        #", "restartPolicy: Always #"),
     "headgroup: restartPolicy=Always with autoscaler v2", "Never"),
    (replaced("labels: {node-group: gpu}", "labels: {node-group: 1}"), "gpu: labels.node-group=1",
     'node-group: "1"'),
    (replaced("labels: {node-group: gpu}", "resources: {CPU: many}"),
     "gpu: resources.CPU=many is no quantity", "500m"),
    (replaced("rayStartParams: {}", "rayStartParams: {labels: a=b}"),
     "gpu: rayStartParams.labels is refused", "labels: {...}"),
    (replaced("ttlSecondsAfterFinished: 600", "ttlSecondsAfterFinished: 10m"),
     'spec.ttlSecondsAfterFinished="10m"', "a whole number"),
    (replaced("K8sJobMode", "K8SJobMode"), 'spec.submissionMode="K8SJobMode"', "K8sJobMode"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "shown", "advice"), KUBERAY, ids=[c[1] for c in KUBERAY])
def test_kubernetes_refuses_it_later_so_the_group_and_key_are_named(
    edit: Edit, shown: str, advice: str, tmp_path: Path
) -> None:
    findings = findings_of(JOB, edit(text_of(JOB)), tmp_path)
    failed = [f for f in failures(findings) if shown in f.detail]
    assert failed, failures(findings)
    assert {finding.check for finding in failed} == {"schema"}
    assert any(advice in finding.advice for finding in failed), failed
    assert all(len(finding.detail) < 300 for finding in failed)
    assert not [f for f in findings if (f.check, f.status) == ("schema", "ok")]


@pytest.mark.parametrize(
    "edit",
    [
        replaced("rayStartParams: {}", "rayStartParams:"),
        replaced('gpu: "1"', 'gpu: "1000m"'),
        replaced('gpu: "1"', "gpu: 1"),
        replaced('cpu: "14"', "cpu: 14"),
        replaced("  name: simclr-ray\n", "  generateName: simclr-ray-\n"),
    ],
)
def test_what_kubernetes_takes_passes(edit: Edit, tmp_path: Path) -> None:
    assert failures(findings_of(JOB, edit(text_of(JOB)), tmp_path)) == []


def test_of_two_jobs_in_a_file_the_first_is_said_to_be_read(tmp_path: Path) -> None:
    other = text_of(STAYS).replace("  name: simclr-ray\n", "  name: other\n")
    findings = findings_of(JOB, f"{text_of(JOB)}\n---\n{other}", tmp_path)
    (found,) = [f for f in findings if "only the first" in f.detail]
    assert found.detail.startswith("the file has RayJob simclr-ray and RayCluster other")
    assert (found.status, failures(findings)) == ("warn", [])


SLURM = [
    (replaced("set -euo", "#SBATCH --array=1-3\nset -euo"), ""),
    (replaced("set -euo pipefail\n", "set -euo pipefail\n#SBATCH --nodes=1\n"),
     "ignores #SBATCH in line 32: after line 31, `set -euo pipefail`"),
    (replaced("\n", "\r\n"), "DOS line ends (CRLF), from line 1"),
    (replaced("--requeue\n", "--requeue\r\n"), "DOS line ends (CRLF), from line 28"),
    (replaced("#!/bin/bash\n", ""), "the script's first line is no #!"),
    (replaced("#!/bin/bash\n", "\n#!/bin/bash\n"), "the script's first line is no #!"),
    (replaced("#!/bin/bash\n", "\ufeff#!/bin/bash\n"), "a byte order mark"),
    (replaced("--time=24:00:00", "--time=24hours"), "#SBATCH --time=24hours"),
    (replaced("--time=24:00:00", "--time=1-2-3"), "#SBATCH --time=1-2-3"),
    (replaced("--time=24:00:00", "--time="), "#SBATCH --time="),
    (replaced("--time=24:00:00", "--time=UNLIMITED"), ""),
    (replaced("--mem=0", "--mem=lots"), "#SBATCH --mem=lots"),
    (replaced("--mem=0", "--mem=1.5G"), "#SBATCH --mem=1.5G"),
    (replaced("--mem=0", "--mem=64GB"), ""),
    (replaced("--cpus-per-task=64", "-c64"), ""),
    (replaced("--cpus-per-task=64", "-c 6x"), "#SBATCH --cpus-per-task=6x"),
    (replaced("--gpus-per-node=4", "-G16"), ""),
    (replaced("--gpus-per-node=4", "--gpus-per-node=-1"), "#SBATCH --gpus-per-node=-1"),
    (replaced("--nodes=4", "--nodes=4-5"), ""),
    (replaced("--nodes=4", "--nodes=4-2"), "#SBATCH --nodes=4-2 is no number of nodes"),
    (replaced("--nodes=4", "--nodes=0"), "#SBATCH --nodes=0 is no number of nodes"),
    (replaced("--nodes=4", "--nodes=four"), "#SBATCH --nodes=four is no number of nodes"),
    (replaced("--nodes=4", f"--nodes={'9' * 5000}"), "#SBATCH --nodes=999"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "shown"), SLURM, ids=[c[1] or f"ok-{i}" for i, c in enumerate(SLURM)]
)
def test_sbatch_refuses_it_so_no_option_is_said_to_be_well(
    edit: Edit, shown: str, tmp_path: Path
) -> None:
    path = tmp_path / "slurm.sh"
    path.write_bytes(edit(text_of("slurm.sh")).encode())
    findings = read_launch_file(path, VERSIONS).findings
    well = [f for f in findings if f.detail.startswith("known #SBATCH options")]
    if not shown:
        assert (failures(list(findings)), len(well)) == ([], 1)
        return
    (failed,) = failures(list(findings))
    assert failed.detail.startswith(shown) or shown in failed.detail
    assert failed.advice
    assert not well


def test_options_after_the_first_command_are_not_read() -> None:
    text = (
        "#!/bin/bash\n#SBATCH -N2\n\n# words\n#SBATCH -c8\ntrue\n#SBATCH -N9 --gpus=72\nray start\n"
    )
    launch = read_slurm(text)
    assert sum(group.most for group in launch.groups) == 2
    assert {(group.cpus, group.gpus) for group in launch.groups} == {(8, 0)}
    for odd in (" #SBATCH -N9", "#sbatch -N9"):
        launch = read_slurm(text.replace("# words", odd))
        assert any("a comment to `sbatch`" in f.detail for f in launch.findings)
        assert sum(group.most for group in launch.groups) == 2


@pytest.mark.parametrize(
    ("option", "status"),
    [("--mem=1G", "warn"), ("--mem=2048", "warn"), ("--mem-per-cpu=10M", "warn"), ("--mem=4G", ""),
     ("--mem-per-cpu=1G", ""), ("--mem=0", "")],
)  # fmt: skip
def test_memory_that_ray_does_not_start_in_is_a_warning(option: str, status: str) -> None:
    launch = read_slurm(text_of("slurm.sh").replace("--mem=0", option))
    assert [f.status for f in launch.findings if f.check == "memory"] == [status] * bool(status)


def test_a_type_without_a_number_is_one_gpu() -> None:
    launch = read_slurm(text_of("slurm.sh").replace("--gpus-per-node=4", "--gpus-per-node=four"))
    assert any("names a type: one GPU of it" in f.detail for f in launch.findings)


RAY_UP = [
    ("aws.yaml", without(r"^  type: aws\n"), "provider.type is missing"),
    ("aws.yaml", without(r"^  region:.*\n"), "provider.region is missing"),
    ("gcp.yaml", without(r"^  project_id:.*\n"), "provider.project_id is missing"),
    ("aws.yaml", without(r"^cluster_name:.*\n"), "cluster_name is missing"),
    ("onprem.yaml", without(r"^  worker_ips:.*\n"), "provider.worker_ips is missing"),
    ("aws.yaml", replaced("min_workers: 4", "min_workers: -4"),
     "available_node_types.gpu.min_workers=-4"),
    ("aws.yaml", replaced("min_workers: 4", "min_workers: 1000000000"), "min_workers=1000000000"),
    ("aws.yaml", replaced("min_workers: 4", "min_workers: 5"),
     "min_workers=5 is more than available_node_types.gpu.max_workers=4"),
    ("aws.yaml", replaced("GPU: 1", f"GPU: {'9' * 400}"), "resources.GPU=999"),
    ("aws.yaml", replaced("GPU: 1", "GPU: -1"), "resources.GPU=-1"),
    ("aws.yaml", lambda text: f"{text}\n---\na: 1\n", "the file has 2 documents"),
    ("onprem.yaml", replaced("worker_ips: [mine-1", "worker_ips: [mine-head"),
     "provider.worker_ips holds head_ip=mine-head"),
    ("onprem.yaml", replaced("mine-2", "mine-1"), "provider.worker_ips holds twice: mine-1"),
    ("onprem.yaml", replaced("_workers: 6", "_workers: 8"), "min_workers=8 with 6 hosts"),
    ("onprem.yaml", replaced("min_workers: 6", "min_workers: -1"), "min_workers=-1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "edit", "shown"), RAY_UP, ids=[c[2] for c in RAY_UP])
def test_ray_up_is_given_what_it_needs_and_no_odd_number(
    name: str, edit: Edit, shown: str, tmp_path: Path
) -> None:
    findings = findings_of(name, edit(text_of(name)), tmp_path)
    failed = [f for f in failures(findings) if shown in f.detail]
    assert failed, findings
    assert all(finding.advice and len(finding.detail) < 300 for finding in failed)
    well = [f for f in findings if f.detail.startswith("Ray takes the file")]
    assert not well or "documents" in shown


@pytest.mark.parametrize("source", ["9" * 400, "~no-such-user/x", "a\0b"])
def test_a_source_that_no_path_can_be_is_not_here(source: str, tmp_path: Path) -> None:
    text = yaml.safe_load(text_of("aws.yaml"))
    text["file_mounts"]["~/x"] = source
    findings = findings_of("aws.yaml", yaml.safe_dump(text), tmp_path)
    (found,) = [f for f in findings if f.check == "file mounts"]
    assert found.status == "warn"


def test_what_a_file_says_of_its_machines_is_said_to_be_believed(tmp_path: Path) -> None:
    text = text_of("aws.yaml").replace("CPU: 16, GPU: 1", "CPU: 64, GPU: 8")
    (found,) = [f for f in findings_of("aws.yaml", text, tmp_path) if f.check == "resources"]
    assert found.status == "ok"
    assert "the file's own numbers are believed" in found.detail
    assert "gpu 64 CPU, 8 GPU on g5.4xlarge" in found.detail


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key a stands in line 1 already"),
        ("x:\n  - {a: 1, a: 2}\n", "line 2: the key a stands in line 2 already"),
        ("a: &a [*a]\n", "line 1: an alias holds itself"),
        ("a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n"
            for old, new in zip("abcdef", "bcdefg", strict=True)), "100,000 values"),
        ("[" * 5000, "nested too deep"),
        ("a: 2024-99-99\n", "month must be in 1..12"),
        ("{a: 1}: 2\n", "unhashable key"),
        ("a\0b", "special characters are not allowed"),
    ],
)  # fmt: skip
def test_yaml_that_would_be_misread_is_refused_with_its_line(
    text: str, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(problem)) as refused:
        read_launch_file(path, VERSIONS)
    assert str(path) in str(refused.value)


def test_a_merged_key_may_be_written_again() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: *a\nd: *a\n"
    assert documents_of(text, "f")[0]["b"] == {"x": 3, "y": 2}


def test_each_value_that_is_left_to_fill_in_is_named_by_its_key(tmp_path: Path) -> None:
    text = (CLUSTER / JOB).read_text("utf-8")
    (found,) = [f for f in findings_of(JOB, text, tmp_path) if f.check == "filled in"]
    assert found.detail.startswith("7 values still REPLACE-ME: data.train=s3://REPLACE-ME/")
    pod = "spec.rayClusterSpec.headGroupSpec.template.spec"
    assert f"{pod}.serviceAccountName=REPLACE-ME (and 2 more keys)" in found.detail
    assert f"{pod}.containers.0.image=REPLACE-ME/simclr-ray:0.1.0 (and 2 more" in found.detail
    many = text_of("aws.yaml").replace(
        "initialization_commands: []",
        f"initialization_commands: [{', '.join(f'REPLACE-ME-{i}' for i in range(20))}]",
    )
    (found,) = [f for f in findings_of("aws.yaml", many, tmp_path) if f.check == "filled in"]
    assert found.detail.startswith("20 values still REPLACE-ME: initialization_commands.0=REPLACE")
    assert found.detail.endswith("initialization_commands.11=REPLACE-ME-11; and 8 more")
    shell = text_of("slurm.sh").replace(". /mine/", ". /REPLACE-ME/")
    (found,) = [f for f in findings_of("slurm.sh", shell, tmp_path) if f.check == "filled in"]
    assert "line 34=/REPLACE-ME/simclr-ray/env/bin/activate" in found.detail


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("htp://mlflow:5000", "MLflow has no htp:// store"),
        ("ftp://me:hunter2@mlflow", "got ftp://me:***@mlflow; MLflow has no ftp:// store"),
        ("mlflow:5000", "a server is http://mlflow:5000"),
        ("http://[::1", "got http://[::1; "),
    ],
)
def test_a_store_that_mlflow_has_not_is_refused(uri: str, shown: str, tmp_path: Path) -> None:
    text = text_of("aws.yaml").replace("http://mine:5000", uri)
    (found,) = [f for f in findings_of("aws.yaml", text, tmp_path) if f.check == "tracking"]
    assert (found.status, found.detail[:17]) == ("fail", "tracking.uri: got")
    assert shown in found.detail
    text = text_of("slurm.sh").replace("tracking.uri=http://mine:5000", "")
    text = text.replace("export RAY_AUTH", f"export MLFLOW_TRACKING_URI={uri} RAY_AUTH", 1)
    (found,) = [f for f in findings_of("slurm.sh", text, tmp_path) if f.check == "tracking"]
    assert found.detail.startswith("MLFLOW_TRACKING_URI: got"), found
