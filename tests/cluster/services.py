"""What a cluster talks to, each on a machine of its own: S3 by moto, MLflow before PostgreSQL.

Their packages are installed into an environment that only they see.
"""

from __future__ import annotations

import json
import pwd
import shutil
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from tests.cluster.machines import CannotBuild, Machine
from tests.long.environments import make_environment

PACKAGES = (
    *("moto==5.2.5", "boto3==1.44.8", "botocore==1.44.8", "s3transfer==0.19.3"),
    *("jmespath==1.1.0", "responses==0.26.3", "xmltodict==1.0.4", "py-partiql-parser==0.6.3"),
    *("flask==3.1.3", "flask-cors==6.0.5", "werkzeug==3.1.9", "itsdangerous==2.2.0"),
    *("blinker==1.9.0", "psycopg2-binary==2.9.13"),
)
S3_PORT, MLFLOW_PORT, POSTGRES_PORT = 9000, 5000, 5432
BEHIND = 10_000  # what is added to a port, for the server behind the proxy
START_S = 300.0  # an MLflow makes its tables within 8 s, and on a busy machine in minutes
POSTGRES_FOLDER = Path("/usr/lib/postgresql")  # Debian's, a folder for each version below
USER = "postgres"  # PostgreSQL refuses to run as root


def install(folder: Path) -> str:
    """Make the environment of the services and return its Python. Raises `CannotBuild`."""
    python = folder / "env" / "bin" / "python"
    if not python.exists():
        folder.mkdir(parents=True)
        try:
            make_environment(folder, PACKAGES)
        except (AssertionError, OSError) as error:
            shutil.rmtree(folder)
            raise CannotBuild(f"packages of the services cannot be installed: {error}") from error
    return str(python)


def find_postgres() -> Path:
    """Return the folder of PostgreSQL's programs. Raises `CannotBuild`."""
    found = sorted(POSTGRES_FOLDER.glob("*/bin/initdb"), key=lambda p: float(p.parts[-3]))
    try:
        pwd.getpwnam(USER)
    except KeyError:
        found = []
    if not found:
        raise CannotBuild("PostgreSQL is missing (Debian: apt-get install postgresql)")
    return found[-1].parent


@dataclass
class Service:
    """A server behind a proxy that can hold it back."""

    machine: Machine
    command: list[str]
    port: int

    @property
    def url(self) -> str:
        """Return where it answers, for all machines and for this process."""
        return f"http://{self.machine.address}:{self.port}"

    def start(self) -> None:
        """Start it; return when it listens. Raises `CannotBuild`."""
        self.slow(0.0)
        self.machine.popen(self.command, log="server")
        program = str(Path(__file__).with_name("slow_proxy.py"))
        listen, behind = f"{self.machine.address}:{self.port}", self.port + BEHIND
        _wait_for_port(self.machine, behind, "127.0.0.1")
        self.machine.popen(
            [sys.executable, "-S", program, listen, str(behind), str(self._settings)], log="proxy"
        )
        _wait_for_port(self.machine, self.port, self.machine.address)

    def kill(self) -> None:
        """Kill it by SIGKILL: connections break, new ones are refused."""
        self.machine.kill_processes()

    def restart(self) -> None:
        """Start it again after `kill`."""
        self.start()

    def slow(self, seconds: float, *, bytes_per_s: float = 0.0) -> None:
        """Let each request wait, and all together pass at most so many bytes a second; 0: at once.

        What is underway keeps the pace that it had.
        """
        written = self._settings.with_suffix(".new")
        written.write_text(json.dumps({"seconds": seconds, "bytes_per_s": bytes_per_s}))
        written.replace(self._settings)

    @property
    def _settings(self) -> Path:
        return self.machine.folder / "slow.json"


class S3(Service):
    """An S3-compatible server. What it holds is in its memory: `kill` loses it."""

    @property
    def env(self) -> dict[str, str]:
        """Return what its clients need in their environment."""
        return {
            "AWS_ACCESS_KEY_ID": "nodes",
            "AWS_SECRET_ACCESS_KEY": "nodes",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.url,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def uri(self, bucket: str) -> str:
        """Make a bucket, unless it is there, and return its URI, which says where and by whom.

        It serves machines whose environment does not have `env`, as well as this process.
        """
        import pyarrow.fs as pafs

        options = f"scheme=http&endpoint_override={quote(self.url.partition('//')[2], safe='')}"
        allowed = "allow_bucket_creation=true"
        uri = f"s3://nodes:nodes@{bucket}?region=us-east-1&{options}&{allowed}"
        fs, path = pafs.FileSystem.from_uri(uri)
        fs.create_dir(path)
        return f"s3://{bucket}"


@dataclass
class MLflow(Service):
    """An MLflow server whose store is PostgreSQL on a machine of its own."""

    database: Machine

    @property
    def uri(self) -> str:
        """Return its tracking URI."""
        return self.url


def make_s3(machine: Machine, python: str) -> S3:
    """Start an S3-compatible server."""
    command = [python, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(S3_PORT + BEHIND)]
    service = S3(machine, command, S3_PORT)
    service.start()
    return service


def make_mlflow(machine: Machine, database: Machine, python: str, password: str) -> MLflow:
    """Start PostgreSQL and an MLflow server that keeps its runs there and serves artifacts."""
    store = _start_postgres(database, password)
    served = machine.folder / "served"
    command = [
        *(python, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"),
        *("--artifacts-destination", str(served), "--serve-artifacts"),
        *("--host", "127.0.0.1", "--port", str(MLFLOW_PORT + BEHIND), "--allowed-hosts", "*"),
    ]
    service = MLflow(machine, command, MLFLOW_PORT, database)
    service.start()
    return service


def _start_postgres(machine: Machine, password: str) -> str:
    """Start PostgreSQL with an empty database; return SQLAlchemy's URI of it."""
    programs, data = find_postgres(), machine.folder / "data"
    account = pwd.getpwnam(USER)
    secret = machine.folder / "password"
    secret.write_text(password)
    data.mkdir(mode=0o700)
    machine.folder.chmod(0o711)
    for path in (secret, data):
        shutil.chown(path, account.pw_uid, account.pw_gid)
    as_user = ["setpriv", f"--reuid={USER}", f"--regid={account.pw_gid}", "--init-groups"]
    made = machine.run(
        [
            *(*as_user, str(programs / "initdb"), "-D", str(data), "--locale=C.UTF-8"),
            *("--auth=scram-sha-256", f"--pwfile={secret}"),
        ]
    )
    if made.returncode:
        raise CannotBuild(f"initdb: {made.stderr.strip()}")
    with (data / "pg_hba.conf").open("a") as rules:
        rules.write("host all all samenet scram-sha-256\n")
    options = {"listen_addresses": machine.address, "unix_socket_directories": str(data)}
    told = [f"--{name}={value}" for name, value in options.items()]
    machine.popen([*as_user, str(programs / "postgres"), "-D", str(data), *told], log="postgres")
    _wait_for_port(machine, POSTGRES_PORT, machine.address)
    return f"postgresql+psycopg2://{USER}:{password}@{machine.address}:{POSTGRES_PORT}/postgres"


def _wait_for_port(machine: Machine, port: int, address: str) -> None:
    """Return when something on `machine` listens. Raises `CannotBuild`, with what was said."""
    knock = f"import socket; socket.create_connection(({address!r}, {port}), 2).close()"
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if address == machine.address:  # the bridge reaches it
            with suppress(OSError), socket.create_connection((address, port), 2):
                return
        elif machine.run([sys.executable, "-S", "-c", knock]).returncode == 0:
            return
        time.sleep(0.2)
    raise CannotBuild(f"{machine.name}: port {port} did not open\n{machine.told()}")
