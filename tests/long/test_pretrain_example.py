"""The example in the docstring of `sr.pretrain`, which starts Ray and trains an epoch."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

PROGRAM = """
import doctest, sys
from simclr_ray.train import driver
done = doctest.testmod(driver, optionflags=doctest.ELLIPSIS)
print(done)
sys.exit(done.failed or done.attempted < 6)
"""


@pytest.mark.timeout(600)
def test_the_example_of_pretrain_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=os.environ
        | {
            "TMPDIR": str(tmp_path),
            "RAY_TMPDIR": tempfile.gettempdir(),  # a socket's path has 107 characters at most
            "RAY_AUTH_MODE": "disabled",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
