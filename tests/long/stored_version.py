"""Use a registered version without this package: `python stored_version.py FOLDER NAME`.

FOLDER holds `mlflow.db`, `images/` and `inputs.npy` (tensors of `Encoder.transform`). Written are
`NAME-pyfunc.json`, `NAME-served.json` and, of an encoder, `NAME-program.npy`. Run by
`test_serving.py` in an environment with nothing but what the version names.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch

START_S = 180.0


def main(folder: Path, name: str) -> None:
    """Embed or classify by pyfunc, by a server, and by the exported program alone."""
    assert importlib.util.find_spec("simclr_ray") is None
    assert importlib.util.find_spec("ray") is None
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    address = f"models:/{name}/1"
    images = [file.read_bytes() for file in sorted((folder / "images").iterdir())]
    model = mlflow.pyfunc.load_model(address)
    answer = model.predict(pd.DataFrame({"image": images}))
    write(folder / f"{name}-pyfunc.json", plain(answer))
    write(folder / f"{name}-served.json", served(address, images))
    stored = Path(mlflow.artifacts.download_artifacts(artifact_uri=address))
    (program,) = stored.rglob("encoder.pt2")
    network = torch.export.load(program).module()
    with torch.no_grad():
        features = network(torch.from_numpy(np.load(folder / "inputs.npy")))
    np.save(folder / f"{name}-program.npy", features.numpy())


def plain(answer: Any) -> Any:
    """Return a table or an array as JSON has it."""
    return answer.to_dict("records") if isinstance(answer, pd.DataFrame) else answer.tolist()


def write(path: Path, tree: Any) -> None:
    """Write JSON."""
    path.write_text(json.dumps(tree))


def served(address: str, images: list[bytes]) -> Any:
    """Return what `mlflow models serve` answers to JPEG bytes as base64."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", address]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "-w", "1"]
    server = subprocess.Popen(command, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 2):
                break
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.5)
        rows = [[base64.b64encode(image).decode()] for image in images]
        body = json.dumps({"dataframe_split": {"columns": ["image"], "data": rows}})
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            data=body.encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())["predictions"]
    finally:
        os.killpg(server.pid, 15)
        server.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
