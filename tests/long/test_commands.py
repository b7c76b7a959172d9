"""The blocks of README and CONTRIBUTING that train, install or build, run as they are written.

A block runs in bash, in a folder with small images. `simclr-ray` is a program in front of ours that
adds what makes a command small: fewer epochs, a smaller batch. It fails on a verb that it has no
such arguments for.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simclr_ray.data.shapes import render
from tests.ray.images import write_shapes
from tests.shell_blocks import OTHERS, ROOT, Command, blocks, how_to_run, without_comment

pytestmark = pytest.mark.long

SMALL = ["epochs=1", "batch_size=16", "encoder.width=0.125", "evaluation.linear.epochs=2"]
SMALL += [
    "data.limit=160",
    "scaling.threads_per_worker=1",
    "tracking.system_metrics=false",
    "schedule.warmup_epochs=0",
]
# two seeds and lengths: `study plan` holds out one of each
STUDY = [*SMALL[2:], "data.limit=64", "study.seeds=[0, 1]", "study.comparisons=[]"]
STUDY += ["study.space={batch_size: {grid: [16]}, epochs: {grid: [1, 2]}}"]
# What is added to a verb; every verb of the pages has a line.
ADDED: dict[str, list[str]] = {
    "cluster check": [], "config": [], "doctor": [], "embed": [], "export": [], "inspect": [],
    "predict": [], "prepare": [], "preview": [], "status": [],
    "evaluate": ["evaluation.linear.epochs=2"],
    "pretrain": SMALL,
    "run list": [], "run probe": [], "run sync": [], "run report": ["--num", "20"],
    "model search": [], "model duplicates": [], "model map": [],
    "model finetune": ["epochs=1", "batch_size=8"],
    "model distill": ["epochs=1", "batch_size=16"],
    "study list": [], "study status": [], "study stop": [], "study resume": [],
    "study report": [], "study best": [], "study plan": [],
    "study advise": ["--minutes", "3", *SMALL[1:]],
    "study run": STUDY,
}  # fmt: skip

SHIM = """#!{python}
import json, os, sys
words, added = sys.argv[1:], json.loads({added!r})
verb = next((v for v in (" ".join(words[:2]), words[0]) if v in added), None)
if verb is None:
    sys.exit("no arguments make this verb small: " + " ".join(words))
with open({log!r}, "a") as log:
    print(json.dumps(words), file=log)
os.execv(sys.executable, [sys.executable, "-m", "simclr_ray", *words, *added[verb]])
"""


class Place:
    """A home with images, and a PATH on which our program makes everything small."""

    def __init__(self, folder: Path, added: dict[str, list[str]] = ADDED) -> None:
        self.folder, self.log = folder, folder / "verbs.jsonl"
        self.log.touch()
        programs = folder / "bin"
        programs.mkdir()
        program = programs / "simclr-ray"
        program.write_text(
            SHIM.format(python=sys.executable, added=json.dumps(added), log=str(self.log))
        )
        program.chmod(0o755)
        self.environment = {
            **os.environ,
            "HOME": str(folder),
            "PATH": f"{programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}"
            f"{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, script: str, cwd: Path | None = None) -> str:
        """Run a script by bash, which stops at the first command that fails; return its output."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=cwd or self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    def verbs(self) -> list[list[str]]:
        """Return the commands of ours that have run."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("readme")
    for index in range(64):
        drawn = render(index, 7)
        path = folder / "images" / f"class {drawn.label % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn.pixels).save(path)
    for split, num_images in (("train", 320), ("test", 80)):
        (folder / "cifar" / split).mkdir(parents=True)
        write_shapes(folder / "cifar" / split / "a.parquet", num_images)
    (folder / "shards").mkdir()
    out = io.BytesIO()
    Image.fromarray(render(0, 7).pixels).save(out, "JPEG")
    pq.write_table(pa.table({"jpg": [out.getvalue()] * 64}), folder / "shards" / "a.parquet")
    (config,) = blocks("README.md", "yaml")
    (folder / "my.yaml").write_text(config, encoding="utf-8")
    return Place(folder)


OURS = [block for block in blocks("README.md") if "simclr-ray" in block]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("block", OURS, ids=lambda block: block.splitlines()[0][:50])
def test_a_block_of_the_readme_runs(block: str, place: Place) -> None:
    wanted = [line for line in block.splitlines() if without_comment(line).startswith("simclr-ray")]
    before = len(place.verbs())
    place.run(block)
    assert len(place.verbs()) - before == len(wanted)


def copy_of_the_tree(folder: Path) -> Path:
    """Return a git repository of the checkout's files, so that nothing is written into ours."""
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    who = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "copy"]):
        subprocess.run(["git", "-C", str(folder), *words], check=True)
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_the_tree(tmp_path_factory.mktemp("tree"))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "command",
    [c for c in OTHERS if (how_to_run(c) or ("",))[0] == "long"],
    ids=lambda command: command.text[:50],
)
def test_a_command_on_the_checkout_runs(command: Command, place: Place, tree: Path) -> None:
    known = how_to_run(command)
    assert known is not None
    place.environment |= {"PYTHONPATH": str(tree), "GIT_COMMITTER_NAME": "Test",
                          "GIT_COMMITTER_EMAIL": "test@example.org"}  # fmt: skip
    place.run(f"{command.text} {known[1]}", cwd=tree)


@pytest.mark.timeout(2400)
def test_the_first_command_of_the_readme_works_in_a_bare_copy(tmp_path: Path) -> None:
    folder = copy_of_the_tree(tmp_path / "clone")
    bare = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    bare["PATH"] = os.pathsep.join(
        p for p in bare["PATH"].split(os.pathsep) if Path(p) != Path(sys.executable).parent
    )
    done = subprocess.run(
        ["make", f"PYTHON={sys.base_prefix}/bin/python3", "demo"],
        cwd=folder,
        env=bare,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert any(line.split()[:1] == ["embed"] for line in done.stdout.splitlines()[-3:])
