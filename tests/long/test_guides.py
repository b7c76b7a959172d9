"""The commands of the guides run as they are written, in a folder with photographs."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from simclr_ray.data.shapes import render
from tests.long.test_commands import ADDED, Place
from tests.shell_blocks import blocks, without_comment

pytestmark = pytest.mark.long

SMALL = [
    "epochs=1", "batch_size=64", "augment.size=32", "encoder.width=0.125", "data.limit=128",
    "evaluation.linear.epochs=2", "schedule.warmup_epochs=0", "tracking.system_metrics=false",
]  # fmt: skip
PAGES = (
    "docs/start.md",
    "docs/your_images.md",
    "docs/choosing.md",
    "docs/wrong.md",
    "docs/gpus.md",
)
BLOCKS = [(page, block) for page in PAGES for block in blocks(page) if "make demo" not in block]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("guides")
    for name, first in (("photos", 0), ("cells", 200), ("labelled", 400), ("held_out", 600)):
        for index in range(first, first + 160):
            drawn = render(index, 7)
            kind = f"class {drawn.label % 2}" if name in ("labelled", "held_out") else "."
            path = folder / name / kind / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(drawn.pixels)
            (image.convert("L") if name == "cells" else image).save(path)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    (text,) = blocks("docs/your_images.md", "yaml")
    (folder / "cells.yaml").write_text(text, encoding="utf-8")
    return Place(folder, ADDED | {"pretrain": SMALL})


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("page", "block"), BLOCKS, ids=[f"{p}-{b.splitlines()[0][:40]}" for p, b in BLOCKS]
)
def test_a_block_of_a_guide_runs(page: str, block: str, place: Place) -> None:
    wanted = [line for line in block.splitlines() if without_comment(line).startswith("simclr-ray")]
    before = len(place.verbs())
    place.run(block)
    assert len(place.verbs()) - before == len(wanted), page


def test_the_neighbours_of_the_first_photograph_are_drawn(place: Place) -> None:
    """After the five commands of the first guide."""
    sheet = Image.open(io.BytesIO((place.folder / "neighbours.png").read_bytes()))
    assert sheet.width > 800
    assert "<canvas" in (place.folder / "map.html").read_text()


def test_the_commands_for_alike_images_run(place: Place) -> None:
    """On the embeddings that the first guide has left."""
    (block,) = (b for b in blocks("docs/encoders.md") if "model duplicates" in b)
    for name in ("cat.jpg", "dog.jpg"):
        Image.fromarray(render(0, 3).pixels).save(place.folder / name)
    place.run("\n".join(line for line in block.splitlines() if not line.startswith("pip ")))
    assert (place.folder / "near.html").is_file()
    assert (place.folder / "pairs.tsv").is_file()
