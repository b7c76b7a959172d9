"""What `cluster check` finds: each refusal on a shipped launch file with one thing wrong."""

from __future__ import annotations

import contextlib
import copy
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # what Ray reads them with; has no stubs

from simclr_ray.cli.launch import runs_of
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.findings import Finding
from simclr_ray.distributed.launch.check import (
    check_launch,
    derived,
    read_launch_file,
    runs_at_a_time,
)
from simclr_ray.distributed.launch.file import command_in
from simclr_ray.distributed.launch.kuberay_quantities import quantity_gib
from simclr_ray.distributed.launch.slurm import read_slurm
from simclr_ray.distributed.launch.slurm_options import hours_of
from simclr_ray.errors import ConfigError
from simclr_ray.storage.provenance import versions_of

CLUSTER = Path(__file__).resolve().parents[3] / "cluster"
VERSIONS = versions_of(("ray", "simclr-ray"))
RAY = VERSIONS["ray"]


def text_of(name: str) -> str:
    """Return a shipped file as its user fills it in."""
    return (CLUSTER / name).read_text("utf-8").replace("REPLACE-ME", "mine")


def findings_of(name: str, text: str, folder: Path, *typed: str) -> list[Finding]:
    """Return what is found in a file of that name, with its own command or what was typed."""
    path = folder / name
    path.write_text(text)
    launch = read_launch_file(path, VERSIONS)
    runs = runs_of(launch.command, typed)
    return check_launch(launch, runs[0] if runs else None)


def failures(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.status == "fail"]


def replaced(old: str, new: str, count: int = -1) -> Callable[[str], str]:
    def edit(text: str) -> str:
        assert old in text, old
        return text.replace(old, new, count)

    return edit


def without(pattern: str) -> Callable[[str], str]:
    def edit(text: str) -> str:
        assert re.search(pattern, text, re.MULTILINE), pattern
        return re.sub(pattern, "", text, flags=re.MULTILINE)

    return edit


JOB, STAYS = "kuberay-rayjob.yaml", "kuberay-raycluster.yaml"
TOKEN_MOUNT = r"^  ~/\.(?:ray|simclr-ray)/auth_token:.*\n"
EXPORT = "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token;"
CASES = [
    # file, what is wrong in it, the check that fails, what it says
    ("aws.yaml", replaced("idle_timeout_minutes", "idle_timeout_minute"), "schema",
     "idle_timeout_minute: unknown key (did you mean 'idle_timeout_minutes'?)"),
    ("gcp.yaml", replaced("min_workers: 4", "min_worker: 4"), "schema",
     "available_node_types.gpu.min_worker: unknown key (did you mean 'min_workers'?)"),
    ("aws.yaml", replaced("type: aws", "type: awss"), "schema", "awss"),
    ("aws.yaml", replaced("head_node_type: head", "head_node_type: hed"), "schema",
     "`head_node_type` must be one of `available_node_types`"),
    ("aws.yaml", replaced("max_workers: 8", "max_workers: 2"), "schema", "smaller than the sum"),
    ("aws.yaml", without(TOKEN_MOUNT), "token",
     "the token file ~/.ray/auth_token is in no file_mounts"),
    ("onprem.yaml", without(TOKEN_MOUNT), "token",
     "the token file ~/.simclr-ray/auth_token is in no file_mounts"),
    ("aws.yaml", replaced(EXPORT, "", 1), "token", "anyone who reaches the cluster may run code"),
    ("aws.yaml", without(r"(?s)^worker_start_ray_commands:.*"), "token",
     "worker_start_ray_commands holds no `ray start`"),
    ("aws.yaml", without(r"^.*require-hashes.*\n"), "versions", "pin no Ray"),
    ("aws.yaml", replaced("initialization_commands: []", "docker: {image: 'rayproject/ray:2.40.0', "
     "container_name: ray}"), "versions", f"docker.image is Ray 2.40.0, here it is {RAY}"),
    ("aws.yaml", replaced("simclr_ray-0.1.0-", "simclr_ray-0.0.9-"), "versions", "0.0.9"),
    ("aws.yaml", replaced("tracking.uri=http://mine:5000", ""), "tracking", "is not set"),
    ("aws.yaml", replaced("http://mine:5000", "http://localhost:5000"), "tracking",
     "means each node itself"),
    ("onprem.yaml", replaced("http://mine:5000", "sqlite:////mnt/mine/mlflow.db"), "tracking",
     "a file is no store for several machines"),
    ("aws.yaml", replaced("http://mine:5000", "sqlite://me:hunter2@/mlflow.db"), "tracking",
     "tracking.uri=sqlite://me:***@/mlflow.db: a file is no store"),
    ("aws.yaml", replaced("http://mine:5000", "http://me:hunter2@REPLACE-ME:5000"), "filled in",
     "1 value still REPLACE-ME: tracking.uri=http://me:***@REPLACE-ME:5000"),
    ("aws.yaml", replaced("http://mine:5000", "http://me:REPLACE-ME@mine:5000"), "filled in",
     "1 value still REPLACE-ME: tracking.uri=http://me:***@mine:5000"),
    ("aws.yaml", replaced("storage=s3://mine/simclr-ray", "storage=runs"), "shared storage",
     "storage=runs is a folder of each node's own"),
    ("aws.yaml", replaced("storage=s3://mine", "storage=/mnt/mine"), "shared storage",
     "no volume that all nodes share is mounted there"),
    ("onprem.yaml", replaced("storage=/mnt/mine", "storage=/tmp/mine"), "shared storage",
     "storage=/tmp/mine/simclr-ray is a folder of each node's own"),
    ("gcp.yaml", without(r"storage=gs://\S+"), "shared storage", "storage=runs"),
    ("slurm.sh", replaced("data.train=/mine/", "data.train="), "shared storage", "data.train="),
    (JOB, replaced("data.test=s3:/", "data.test=/data"), "shared storage", "data.test="),
    ("aws.yaml", replaced("scaling.num_workers=4", "scaling.num_workers=5"), "workers",
     "hold 4 workers of 1 CPU, 1 GPU, scaling.num_workers asks for 5"),
    ("aws.yaml", replaced("16}\n    labels: {node-group: data}",
                          "3}\n    labels: {node-group: data}"), "data CPUs",
     "4 workers with 4 CPUs of decoding each: there is room for 3"),
    (STAYS, replaced("node-group: data", "node-group: views"), "workers",
     "no group has the labels of scaling.data_label_selector=node-group: data; there are: "),
    ("slurm.sh", replaced("--cpus-per-task=64", "--cpus-per-task=32"), "data CPUs",
     "16 workers with 8 CPUs of decoding each: there is room for 14"),
    (JOB, replaced("idleTimeoutSeconds", "idleTimeoutSecond"), "schema",
     "spec.rayClusterSpec.autoscalerOptions.idleTimeoutSecond: unknown key (did you mean "
     "'idleTimeoutSeconds'?); Kubernetes drops it"),
    (JOB, replaced("name: ray-worker\n", "name: ray-worker\n                volumeMount: []\n", 1),
     "schema", "workerGroupSpecs.0.template.spec.containers.0.volumeMount: unknown key"),
    (JOB, replaced("shutdownAfterJobFinishes", "shutdownAfterJobFinish"), "schema",
     "spec.shutdownAfterJobFinish: unknown key"),
    (STAYS, replaced("ray.io/v1\n", "ray.io/v1alpha1\n"), "schema",
     "apiVersion is ray.io/v1alpha1"),
    (STAYS, without(r"^.*minReplicas: 4\n"), "schema", "minReplicas"),
    (STAYS, replaced('"2.60.0"', '"2.40.0"'), "versions", f"rayVersion is Ray 2.40.0, here it is "
     f"{RAY}"),
    (STAYS, without(r"^ *rayVersion.*\n"), "versions", "rayVersion is not stated"),
    (STAYS, replaced("simclr-ray:0.1.0", "simclr-ray:latest"), "versions", "any day another one"),
    (STAYS, replaced("simclr-ray:0.1.0", "simclr-ray:0.1.1", 1), "versions", "images differ"),
    (STAYS, replaced("mode: token", "mode: disabled"), "token", "authOptions.mode is not token"),
    (JOB, replaced("restartPolicy: Never        #", "nodeSelector: {cloud.google.com/gke-spot: "
     "'true'}\n          restartPolicy: Never  #"), "spot", "the head is spot"),
    ("aws.yaml", replaced("Name: mine-head}\n", "Name: mine-head}\n      InstanceMarketOptions: "
     "{MarketType: spot}\n"), "spot", "the head is spot"),
    ("slurm.sh", replaced("--cpus-per-task=64", "--cpu-per-task=64"), "schema",
     "#SBATCH --cpu-per-task: unknown (did you mean '--cpus-per-task'?)"),
    ("slurm.sh", replaced("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"), "token", "as you"),
    (JOB, replaced("ephemeral-storage: 50Gi", "ephemeral-storage: 1.2.3Gi", 1), "schema",
     "headgroup: resources.requests.ephemeral-storage=1.2.3Gi is no quantity"),
    ("slurm.sh", replaced("--nodes=4", "--nodes=four"), "nodes",
     "#SBATCH --nodes=four is no number of nodes"),
    ("slurm.sh", replaced("--time=24:00:00", "--comment='a"), "schema",
     "#SBATCH --comment='a: No closing quotation"),
    ("slurm.sh", replaced("ray start", "ray symmetric-run"), "", ""),
    ("slurm.sh", replaced("#SBATCH --exclusive\n", "ray stop\n"), "end", "ends your other jobs'"),
    ("slurm.sh", replaced("ray start", "true"), "start", "the script starts no Ray"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "edit", "check", "shown"), CASES, ids=[f"{c[0]}-{c[2]}-{c[3][:40]}" for c in CASES]
)
def test_one_thing_wrong_is_refused_with_what_to_do(
    name: str, edit: Callable[[str], str], check: str, shown: str, tmp_path: Path
) -> None:
    failed = failures(findings_of(name, edit(text_of(name)), tmp_path))
    if not check:
        assert failed == []
        return
    matching = [f for f in failed if f.check == check and shown in f.detail]
    assert matching, failed
    assert all(finding.advice for finding in failed)
    # a misspelt number of nodes is one of none
    assert {f.check for f in failed} <= {check, "schema", "workers"}, "nothing else is wrong"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [", "is not YAML: line 1"),
        ("a: 3\n", "is no launch file"),
        ("- 1\n- 2\n", "is no launch file"),
        ("", "is no launch file"),
        ("kind: Deployment\napiVersion: apps/v1\n", "is of kind Deployment, which is no launch"),
        ("kind: RayJob\nspec: {clusterSelector: {a: b}}\n", "check the file of that"),
        ("#!/bin/bash\necho no directive\n", "is no launch file"),
        ("\xff\xfe", "is no text"),
    ],
)
def test_what_is_no_launch_file_is_named_so(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=re.escape(problem)) as refused:
        read_launch_file(path, VERSIONS)
    assert refused.value.exit_code == 2
    assert str(path) in str(refused.value)


def test_a_missing_file_is_named_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        read_launch_file(tmp_path / "none.yaml", VERSIONS)


@pytest.mark.parametrize("name", ["aws.yaml", JOB, STAYS])
@pytest.mark.parametrize("broken", ["3", "[1, 2]", "text", "null"])
def test_what_is_no_mapping_is_refused_and_breaks_nothing(
    name: str, broken: str, tmp_path: Path
) -> None:
    start = "provider:" if name == "aws.yaml" else "spec:"
    head = text_of(name).partition(f"\n{start}")[0]
    assert failures(findings_of(name, f"{head}\n{start} {broken}\n", tmp_path))


def test_a_run_that_is_typed_stands_in_for_the_files_own(tmp_path: Path) -> None:
    path = tmp_path / "aws.yaml"
    path.write_text(text_of("aws.yaml"))
    command = read_launch_file(path, VERSIONS).command
    (own,) = runs_of(command, [])
    (more,) = runs_of(command, ["scaling.num_workers=8"])
    (other,) = runs_of(command, ["imagenet_resnet50", "storage=s3://b/runs"])
    assert (own.name, own.scaling.num_workers, more.scaling.num_workers) == (own.name, 4, 8)
    assert (other.name, other.storage) == ("imagenet_resnet50", "s3://b/runs")
    assert runs_of("", []) == []
    with pytest.raises(ConfigError, match="num_workers"):
        runs_of(command, ["scaling.num_worker=8"])


def test_a_file_that_starts_no_run_says_what_is_left_unchecked(tmp_path: Path) -> None:
    text = without(r"(?m)^#.*\n")(text_of("aws.yaml"))
    (found,) = [f for f in findings_of("aws.yaml", text, tmp_path) if f.check == "run"]
    assert (found.status, "name it" in found.advice) == ("warn", True)


def test_a_shared_volume_of_all_pods_is_a_place_for_storage(tmp_path: Path) -> None:
    text = text_of(JOB).replace("s3://mine", "/mnt/all")
    claim = "volumes: [{name: all, persistentVolumeClaim: {claimName: all}}]"
    mount = "volumeMounts: [{name: all, mountPath: /mnt/all}]"
    for container in ("ray-worker", "ray-head"):
        assert failures(findings_of(JOB, text, tmp_path)), "some pods have it not yet"
        old = rf"( +)containers:\n( +)- name: {container}\n"
        assert re.search(old, text)
        text = re.sub(old, rf"\1{claim}\n\1containers:\n\2- name: {container}\n\2  {mount}\n", text)
    assert failures(findings_of(JOB, text, tmp_path)) == []


@pytest.mark.parametrize(
    ("edit", "check", "shown"),
    [
        (without(r", ephemeral-storage: \d+Gi"), "disk", "gpu not stated"),
        (replaced("ephemeral-storage: 100Gi", "ephemeral-storage: 20Gi"), "disk", "gpu 20 GiB"),
        (replaced('num-cpus: "0" ', 'num-cpus: "2" '), "head", "offers 2 CPUs"),
        (without(r"^ *shutdownAfterJobFinishes.*\n"), "end", "is paid for"),
    ],
)
def test_what_may_go_wrong_later_is_a_warning(
    edit: Callable[[str], str], check: str, shown: str, tmp_path: Path
) -> None:
    findings = findings_of(JOB, edit(text_of(JOB)), tmp_path)
    (found,) = [f for f in findings if f.status == "warn"]
    assert (found.check, failures(findings)) == (check, [])
    assert shown in found.detail
    assert found.advice


def test_a_head_without_cpus_and_without_workers_can_run_nothing(tmp_path: Path) -> None:
    text = text_of(STAYS).partition("  workerGroupSpecs:")[0] + "  workerGroupSpecs: []\n"
    (found,) = [f for f in failures(findings_of(STAYS, text, tmp_path)) if f.check == "head"]
    assert "nothing can run" in found.detail


def test_the_command_of_a_comment_ends_where_its_words_do() -> None:
    text = "# ray job submit -- \\\n#   simclr-ray pretrain p \\\n#   a=1 b.c=[2,4]\n# Then.\n"
    assert command_in(text) == "pretrain p a=1 b.c=[2,4]"
    text = "# 'simclr-ray study run s --scale cpu data.train=x' and more=prose\n"
    assert command_in(text) == "study run s --scale cpu data.train=x"
    assert command_in("# nothing\nray up\n") == ""


def test_an_elastic_run_shows_the_local_batch_at_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "slurm.sh"
    path.write_text(text_of("slurm.sh"))
    given = ["data.train=s3://b/t", "scaling.num_workers=[3,16]", "batch_size=4096"]
    run = Experiment.load("imagenet_resnet50", *given)
    rows = derived(read_launch_file(path, VERSIONS), [run])
    assert rows["workers"].startswith("3 to 16 of ")
    assert rows["local batch"] == "1366 or 1365 images; 256 images on 16"


def test_trials_run_side_by_side_as_far_as_gpus_and_decoding_go(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text_of("kuberay-study.yaml"))
    launch = read_launch_file(path, VERSIONS)
    trials = runs_of(launch.command, [])
    assert len(trials) > 10
    assert {trial.storage for trial in trials} == {"s3://mine/simclr-ray"}
    scaling = trials[0].scaling
    assert runs_at_a_time(launch, scaling, len(trials)) == 4, "one a GPU"
    costly = scaling.model_copy(update={"data_actors_per_worker": 10, "cpus_per_data_actor": 1.0})
    assert runs_at_a_time(launch, costly, len(trials)) == 2, "28 CPUs decode for 10 each"
    rows = derived(launch, trials, images_per_s=1000.0, images=50_000)
    hours = sum(trial.epochs for trial in trials) * 50_000 / 4000 / 3600
    assert f"{hours:,.1f} of training" in rows["hours"]


def test_the_arithmetic_of_a_run_is_shown_with_its_assumption(tmp_path: Path) -> None:
    path = tmp_path / "slurm.sh"
    path.write_text(text_of("slurm.sh"))
    launch = read_launch_file(path, VERSIONS)
    run = Experiment.load(
        "imagenet_resnet50", "data.train=s3://b/t", "scaling.num_workers=16", "epochs=800"
    )
    rows = derived(launch, [run], images_per_s=400.0, images=1_281_167)
    assert rows["nodes"] == "1 head, 3 workers"
    assert rows["local batch"] == "256 images"
    assert rows["images/s"].startswith("6,400 must be decoded, assumed 400 for each worker: 50 for")
    assert rows["hours"].startswith(f"{800 * 1_281_167 / 6400 / 3600:,.1f} of training")
    assert rows["hours"].endswith("the script's time is 24: 2 pieces, by requeue")
    assert "--images-per-second-per-worker" in derived(launch, [run])["images/s"]
    assert "--images" in derived(launch, [run], images_per_s=1.0)["hours"]


def test_quantities_of_kubernetes_and_times_of_slurm() -> None:
    assert quantity_gib("50Gi") == 50
    assert quantity_gib("512Mi") == 0.5
    assert quantity_gib(2**31) == 2
    assert quantity_gib("1G") == pytest.approx(0.931, abs=1e-3)
    assert quantity_gib("1.5Ki") == 1.5 / 2**20
    assert quantity_gib("2Ei") == 2 * 2**30
    assert quantity_gib("1E") == quantity_gib("1e18") == quantity_gib("1000P")
    assert quantity_gib("500m") == quantity_gib(0.5)
    assert quantity_gib(".5e+9") == pytest.approx(5e8 / 2**30)
    for wrong in ("much", None, "1.2.3Gi", "5Kii", "5K", "-1Gi", "1e999", "", "Gi"):
        assert quantity_gib(wrong) is None
    assert hours_of("90") == 1.5
    assert hours_of("24:00:00") == 24
    assert hours_of("2-12") == 60
    assert hours_of("2-12:30:00") == 60.5
    assert hours_of("30:00") == 0.5
    assert hours_of("soon") is None


@pytest.mark.parametrize("uri", ["databricks", "databricks://us", "databricks-uc"])
def test_a_store_of_databricks_is_one_for_several_machines(uri: str, tmp_path: Path) -> None:
    text = text_of("aws.yaml").replace("http://mine:5000", uri)
    (found,) = [f for f in findings_of("aws.yaml", text, tmp_path) if f.check == "tracking"]
    assert (found.status, found.detail) == ("ok", uri)


def test_a_file_that_may_grow_to_several_nodes_is_checked_as_they_are(tmp_path: Path) -> None:
    text = text_of("aws.yaml").replace("min_workers: 4", "min_workers: 0")
    text = text.replace("min_workers: 1", "min_workers: 0").replace("http://mine:5000", "a.db")
    failed = failures(findings_of("aws.yaml", text, tmp_path, "storage=runs"))
    assert {"tracking", "shared storage"} <= {finding.check for finding in failed}
    assert any(finding.detail.startswith("9 nodes: storage=runs") for finding in failed)


SLURM = "#!/bin/bash\n{}\nexport RAY_AUTH_MODE=token\nray start\n"


@pytest.mark.parametrize(
    ("options", "nodes", "cpus", "gpus"),
    [
        ("-N4 -c8", (4, 4), 8, 0),
        ("-N 4 --gpus=16", (4, 4), None, 4),
        ("--nodes 4 -G 16 # -N9", (4, 4), None, 4),
        ("--nodes=4-8 --gres=gpu:a100:2,nvme:1", (4, 8), None, 2),
        ("--nodes=2 --gpus-per-node=h100:8 --requeue", (2, 2), None, 8),
        ("-n 8 --ntasks-per-node=4 --gpus-per-task=1", (2, 2), None, 4),
        ("-N 2 -n 4 --gpus-per-task=2", (2, 2), None, 4),
        ("--exclusive --cpus-per-task 16", (1, 1), 16, 0),
        ("--gres=gpu", (1, 1), None, 1),
    ],
)
def test_options_of_slurm_are_read_as_sbatch_reads_them(
    options: str, nodes: tuple[int, int], cpus: float | None, gpus: float
) -> None:
    launch = read_slurm(SLURM.format(f"#SBATCH {options}"))
    least, most = (sum(getattr(g, key) for g in launch.groups) for key in ("least", "most"))
    assert (least, most) == nodes
    assert {(group.cpus, group.gpus) for group in launch.groups} == {(cpus, gpus)}
    assert failures(list(launch.findings)) == []


def test_nodes_that_slurm_chooses_are_not_taken_for_one() -> None:
    launch = read_slurm(SLURM.format("#SBATCH --ntasks=8"))
    (found,) = [finding for finding in launch.findings if finding.check == "nodes"]
    assert (found.status, launch.groups) == ("warn", ())
    assert "--nodes" in found.advice


def test_all_exports_of_a_line_are_read() -> None:
    text = (
        "export A=1 B='x y' \\\n C=http://h/#a; D=4; export E=5 && F=6 # export G=7\n# export H=8"
    )
    assert read_slurm(SLURM.format(f"#SBATCH -N1\n{text}")).environment == {
        "A": "1", "B": "x y", "C": "http://h/#a", "E": "5", "RAY_AUTH_MODE": "token",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("before", "option", "status"),
    [
        ("", "", ["warn"]),
        ("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK", "", []),
        ("", "-c 8", []),
        ("", '--cpus-per-task="$SLURM_CPUS_PER_TASK"', []),
        ("", "--cpu-bind=none", []),
    ],
)
def test_an_srun_that_binds_ray_to_one_core_is_named(
    before: str, option: str, status: list[str]
) -> None:
    text = f"#SBATCH -N1 -c8\n{before}\nsrun --overlap \\\n  {option} \\\n  ray start --head\n"
    findings = read_slurm(SLURM.format(text)).findings
    assert [finding.status for finding in findings if finding.check == "start"] == status
    text = text.replace("-c8", "")
    assert not [f for f in read_slurm(SLURM.format(text)).findings if f.check == "start"]


def test_spot_nodes_want_restarts(tmp_path: Path) -> None:
    path = tmp_path / "gcp.yaml"
    path.write_text(text_of("gcp.yaml"))
    launch = read_launch_file(path, VERSIONS)
    assert [group.name for group in launch.groups if group.is_spot] == ["gpu", "data"]
    for restarts, status in ((3, "ok"), (0, "warn")):
        (run,) = runs_of(launch.command, [f"scaling.max_failures={restarts}"])
        (found,) = [f for f in check_launch(launch, run) if f.check == "spot"]
        assert (found.status, found.detail[:10]) == (status, "gpu, data:")


@pytest.mark.parametrize(
    ("name", "least"),
    [("aws.yaml", "min_workers"), ("kuberay-raycluster.yaml", "minReplicas")],
)
def test_nodes_that_an_autoscaler_brings_count_for_a_run_that_waits(
    name: str, least: str, tmp_path: Path
) -> None:
    text = re.sub(rf"{least}: \d", f"{least}: 0", text_of(name))
    assert failures(findings_of(name, text, tmp_path)) == []
    at_once = text.replace("scaling.wait_for_nodes_s=900", "scaling.wait_for_nodes_s=0")
    (found,) = failures(findings_of(name, at_once, tmp_path))
    assert found.detail.startswith("the nodes that are kept hold 0 workers")
    assert "scaling.wait_for_nodes_s=900" in found.advice
    more = text.replace("scaling.num_workers=4", "scaling.num_workers=5")
    (found,) = failures(findings_of(name, more, tmp_path))
    assert found.detail.startswith("the nodes that there may be hold 4 workers")


def test_actors_of_the_scores_that_do_not_fit_are_a_failure(tmp_path: Path) -> None:
    asked = "scaling.num_workers=4 evaluation.actors=65"
    text = text_of("aws.yaml").replace("scaling.num_workers=4", asked)
    (found,) = failures(findings_of("aws.yaml", text, tmp_path))
    assert found.detail == "evaluation.actors=65: the nodes that there may be have room for 64"


def test_an_elastic_run_needs_room_for_the_fewest_workers(tmp_path: Path) -> None:
    text = text_of("aws.yaml")
    for workers, failed in (("[4,16]", []), ("[5,16]", ["workers"])):
        edited = text.replace("scaling.num_workers=4", f"scaling.num_workers={workers}")
        findings = findings_of("aws.yaml", edited, tmp_path)
        assert [finding.check for finding in failures(findings)] == failed


def nodes_of(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values of a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    paths = [(*at, key) for key, _ in items]
    children = tree.values() if isinstance(tree, dict) else tree
    inner = [
        deeper
        for path, child in zip(paths, children, strict=True)
        if isinstance(child, dict | list)
        for deeper in nodes_of(child, path)
    ]
    return [*paths, *inner]


@pytest.mark.parametrize("name", ["aws.yaml", "onprem.yaml", JOB, STAYS])
def test_a_value_of_a_wrong_type_anywhere_ends_in_findings_or_a_message(
    name: str, tmp_path: Path
) -> None:
    whole, rng = yaml.safe_load(text_of(name)), random.Random(11)
    (run,) = runs_of("pretrain cifar10_cpu data.train=s3://b/x storage=s3://b/runs", [])
    for path in rng.sample(nodes_of(whole), 25):
        tree = copy.deepcopy(whole)
        node = tree
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = rng.choice([3, -1, "x", "", [1], [], {}, None, {"name": [1]}])
        file = tmp_path / name
        file.write_text(yaml.safe_dump(tree))
        with contextlib.suppress(ConfigError):  # it is no launch file any more
            launch = read_launch_file(file, VERSIONS)
            assert check_launch(launch, run)
            derived(launch, [run], images_per_s=1.0, images=5)
