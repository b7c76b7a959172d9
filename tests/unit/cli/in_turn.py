"""Several command lines one after the other: the imports of one process serve all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import simclr_ray

ROOT = Path(simclr_ray.__file__).parents[1]
IN_TURN = """
import json, sys, traceback
from simclr_ray.cli.main import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["simclr-ray", *words]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        code = 1
        traceback.print_exc()
    sys.stdout.flush()
    print(f"ENDED {code}")
    print(f"ENDED {code}", file=sys.stderr, flush=True)
"""


class Ended(NamedTuple):
    """What one of several commands has left."""

    returncode: int
    stdout: str
    stderr: str


def run_in_turn(*commands: list[str], cwd: Path) -> list[Ended]:
    """Return exit code and output of each `simclr-ray COMMAND`, run in one process."""
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN, json.dumps(commands)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
        check=True,
    )
    codes, out = _split(done.stdout)
    again, err = _split(done.stderr)
    assert codes == again
    assert len(codes) == len(commands), done.stderr
    return [Ended(*ended) for ended in zip(codes, out, err, strict=True)]


def _split(text: str) -> tuple[list[int], list[str]]:
    parts = re.split(r"^ENDED (-?\d+)$\n", text, flags=re.MULTILINE)
    return [int(code) for code in parts[1::2]], parts[:-1:2]
