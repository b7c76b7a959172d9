"""Ray nodes with addresses of their own on this machine, and what a cluster talks to beside them.

    with Network() as net, net.s3() as s3, net.mlflow() as tracking:
        with net.node("head", head=True) as head, net.node("other") as other:
            head.run([net.python, "-m", "simclr_ray", "pretrain", …])
            other.kill()

A node is a machine (`machines`) that runs Ray: network, processes, `/tmp`, home, `/dev/shm` and
host name are its own, the file system is everyone's elsewhere. All know one Ray token. All is taken
down at the end of the `with`, by the kernel where this process is killed, and what then remains by
name (namespaces, a bridge, a folder) by the next `Network`. Where this machine cannot,
`CannotBuild` says why, and a test skips.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.cluster import services
from tests.cluster.machines import (
    PREFIX,
    TOKEN_LETTERS,
    CannotBuild,
    Machine,
    check_able,
    environment_of,
    ip,
    session_folder,
    shared_paths,
)

RAY = ("-m", "ray.scripts.scripts")
RAY_PORT = 6379
START_S = 180.0
OBJECT_STORE_MIB = 128
PREFIX_BITS = 24
SUBNETS = tuple(f"10.{second}.{third}." for second in (77, 78) for third in range(1, 255))
__all__ = ["CannotBuild", "Network", "Node", "free_subnet"]


def free_subnet(taken: Iterable[str]) -> str:
    """Return the first three numbers, with a dot after each, of a /24 that no route there meets."""
    used = {address.split("/")[0].rpartition(".")[0] + "." for address in taken}
    for subnet in SUBNETS:
        if subnet not in used:
            return subnet
    raise CannotBuild("no private subnet is free")


@dataclass
class Node(Machine):
    """A machine that runs Ray."""

    head: str = ""  # address of the head's GCS
    ray: subprocess.Popen[str] | None = None

    def start_ray(self, *, is_head: bool, dashboard: bool, cpus: float, store_mib: int,
                  resources: Mapping[str, float], labels: Mapping[str, str],
                  options: Sequence[str] = ()) -> None:  # fmt: skip
        """Start Ray and return when it has joined. Raises `RuntimeError` with its log."""
        where = ["--head", f"--port={RAY_PORT}"] if is_head else [f"--address={self.head}"]
        if is_head:
            where += [f"--include-dashboard={dashboard}", f"--dashboard-host={self.address}"]
        command = [
            *(sys.executable, *RAY, "start", "--block", f"--node-ip-address={self.address}"),
            *(f"--num-cpus={cpus:g}", f"--object-store-memory={store_mib * 2**20}"),
            *(
                "--num-gpus=0",
                "--disable-usage-stats",
                f"--resources={json.dumps(dict(resources))}",
                f"--labels={','.join(f'{key}={value}' for key, value in labels.items())}",
            ),
            *(*where, *options),
        ]
        self.ray = self.popen(command, log="ray")
        deadline = time.monotonic() + START_S
        while "Ray runtime started" not in (self.folder / "ray.log").read_text():
            if self.ray.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Ray did not start on {self.name}:\n{self.told()}")
            time.sleep(0.1)

    def kill(self, *, cut: bool = True) -> None:
        """Kill all of the node at once. A power cut by default: nobody hears of it.

        With `cut=False` its cable stays in, and the kernel closes its connections, as after an
        operator's `kill -9` of everything.
        """
        if cut:
            ip("link", "set", self.link, "down")
        self.stop()

    def drain(self, notice_s: int) -> None:
        """Tell the cluster that this node is preempted, to be gone in so many seconds.

        As a cloud's notice; that `kill` follows is the caller's part. Raises `RuntimeError`.
        """
        done = self.run(
            [
                *(sys.executable, *RAY, "drain-node", "--reason=DRAIN_NODE_REASON_PREEMPTION"),
                *(f"--address={self.head}", f"--node-id={self._ray_id()}"),
                *("--reason-message=spot", f"--deadline-remaining-seconds={notice_s}"),
            ]
        )
        if done.returncode:
            raise RuntimeError(f"{self.name} is not drained: {done.stdout}{done.stderr}")

    def _ray_id(self) -> str:
        """Return Ray's id of this node."""
        program = (
            "import sys; from ray._raylet import GcsClient\n"
            "for key, info in GcsClient(address=sys.argv[1]).get_all_node_info().items():\n"
            "    if info.node_manager_address == sys.argv[2] and info.state == 0:\n"
            "        print(key.hex())"
        )
        done = self.run([sys.executable, "-c", program, self.head, self.address])
        if done.returncode or not done.stdout.strip():
            raise RuntimeError(f"Ray does not know {self.name}: {done.stderr}")
        return done.stdout.split()[-1]


@dataclass
class Network:
    """A bridge with machines on it; a context manager."""

    python: str = sys.executable
    shares: tuple[Path, ...] = ()  # folders below /tmp or home that all machines see as this one
    token: str = field(default_factory=lambda: secrets.token_hex(TOKEN_LETTERS // 2))
    subnet: str = ""
    machines: list[Machine] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)  # of machines that are made from now on
    _folder: Path | None = None
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        """Make the bridge, after what dead sessions left is removed. Raises `CannotBuild`."""
        check_able()
        with ExitStack() as stack:
            self._folder = stack.enter_context(session_folder(self.token))
            routes = json.loads(ip("-json", "-4", "route", "show", "table", "all"))
            self.subnet = free_subnet(row["dst"] for row in routes)
            ip("link", "add", self.bridge, "type", "bridge")
            ip("address", "add", f"{self.subnet}1/{PREFIX_BITS}", "dev", self.bridge)
            ip("link", "set", self.bridge, "up")
            (self._folder / "hosts").write_text("127.0.0.1 localhost\n")
            self.env = environment_of(os.environ) | {
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
            }
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take all down; on an error, add the ends of the machines' logs to it as a note."""
        if error is not None:
            error.add_note("\n".join(m.told() for m in self.machines if m.folder.exists()))
        with self._stack:
            for machine in reversed(self.machines):
                machine.stop()

    @property
    def folder(self) -> Path:
        """Return a folder that all machines see, removed at the end."""
        if self._folder is None:
            raise RuntimeError("the network is not up")
        return self._folder

    @property
    def bridge(self) -> str:
        """Return the name of the bridge."""
        return PREFIX + self.token

    def machine(self, name: str, kind: type[Machine] = Machine) -> Any:
        """Make a machine and plug it in."""
        index = len(self.machines) + 2  # .1 is the bridge, an address is not given twice
        label = f"{PREFIX}{self.token}{index}"
        folder = self.folder / f"{index}-{name}"
        made = kind(name, f"{self.subnet}{index}", folder, f"{label}-{name}", label, dict(self.env))
        self.machines.append(made)
        with (self.folder / "hosts").open("a") as hosts:
            hosts.write(f"{made.address} {name}\n")
        made.start(self.bridge, prefix=PREFIX_BITS, shares=[*shared_paths(), *self.shares])
        return made

    @contextmanager
    def node(
        self, name: str, *, head: bool = False, cpus: float = 2, dashboard: bool = True,
        store_mib: int = OBJECT_STORE_MIB, resources: Mapping[str, float] | None = None,
        labels: Mapping[str, str] | None = None, env: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> Iterator[Node]:  # fmt: skip
        """Give a node of the cluster. The first is the head; commands have its `RAY_ADDRESS`.

        Args:
            name: Its host name.
            head: Whether it holds the GCS.
            cpus: Logical CPUs.
            dashboard: Whether a head serves the dashboard, which Ray Train's clean-up asks.
            store_mib: Size of its object store.
            resources: Its own resources, beside CPUs.
            labels: Its own labels, which label selectors choose by.
            env: What its processes have in their environment beside the network's.
            options: Further ones of `ray start`.
        """
        node: Node = self.machine(name, Node)
        node.env |= dict(env or {})
        if head:
            self.env["RAY_ADDRESS"] = f"{node.address}:{RAY_PORT}"
        node.head = self.env["RAY_ADDRESS"]
        node.env.pop("RAY_ADDRESS", None)  # `ray start` takes it for that of a cluster to join
        node.start_ray(
            is_head=head, dashboard=dashboard, cpus=cpus, store_mib=store_mib,
            resources=resources or {}, labels=labels or {}, options=options,
        )  # fmt: skip
        node.env["RAY_ADDRESS"] = node.head
        try:
            yield node
        finally:
            node.stop()

    def unplug(self, machine: Machine) -> None:
        """Take a machine's cable out: it lives, and hears and says nothing."""
        ip("link", "set", machine.link, "down")

    def plug(self, machine: Machine) -> None:
        """Put the cable back in."""
        ip("link", "set", machine.link, "up")

    def delay(self, machine: Machine, milliseconds: float, *, mbit_per_s: float = 0.0) -> None:
        """Hold back all that passes a machine's cable, by netem, 0 and 0 for nothing.

        Raises `CannotBuild` where the kernel has no netem; `Service.slow` needs none.
        """
        rate = ["rate", f"{mbit_per_s:g}mbit"] if mbit_per_s else []
        for end in (["tc"], ["ip", "netns", "exec", machine.namespace, "tc"]):
            device = machine.link if end == ["tc"] else "eth0"
            given = ["netem", "delay", f"{milliseconds:g}ms", *rate]
            done = subprocess.run(
                [*end, "qdisc", "replace", "dev", device, "root", *given],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise CannotBuild(f"no delay on this kernel: {done.stderr.strip()}")

    @contextmanager
    def s3(self) -> Iterator[services.S3]:
        """Give an S3-compatible server; machines that are made after it have its `env`."""
        python = services.install(self.folder / "packages")
        machine = self.machine("s3")
        service = services.make_s3(machine, python)
        self.env |= service.env
        try:
            yield service
        finally:
            machine.stop()

    @contextmanager
    def mlflow(self) -> Iterator[services.MLflow]:
        """Give an MLflow server before PostgreSQL; its clients are given its `uri`."""
        services.find_postgres()
        python = services.install(self.folder / "packages")
        database, machine = self.machine("database"), self.machine("mlflow")
        password = self.env["RAY_AUTH_TOKEN"]
        try:
            yield services.make_mlflow(machine, database, python, password)
        finally:
            machine.stop()
            database.stop()
