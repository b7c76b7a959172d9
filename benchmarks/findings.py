"""Write `docs/findings.md` from the reports that are kept in `docs/studies`.

    python -m benchmarks.findings

Run it after `python -m benchmarks.studies`, which keeps reports; a test compares the page with what
the kept results give.
"""

from __future__ import annotations

from benchmarks.studies import KEPT
from simclr_ray.studies.findings import findings_page

PAGE = KEPT.parent / "findings.md"
COMMAND = "python -m benchmarks.findings"
IMAGES = (
    "`$SIMCLR_RAY_DATA/cifar10` is CIFAR-10 as parquet in an order of its own, which `python -m "
    "benchmarks.cifar10_order DIR/cifar10` writes (torchvision downloads the images; then "
    "`SIMCLR_RAY_DATA=DIR`); `simclr-ray prepare cifar10` writes another, whose first 10,000 "
    "images are others. Drawn shapes are those of "
    "`simclr-ray prepare shapes shapes/train num_images=10000` and `simclr-ray prepare shapes "
    "shapes/test num_images=10000 seed=1`, whose class is form alone, whatever color, texture, "
    "place and size."
)


def kept_page() -> str:
    """Return the page."""
    return findings_page(KEPT, COMMAND, about=IMAGES)


def main() -> None:
    """Write the page."""
    PAGE.write_text(kept_page(), encoding="utf-8")
    print(PAGE.relative_to(KEPT.parents[1]))


if __name__ == "__main__":
    main()
