"""Keep a study's report in `docs/studies`, without the paths of the machine that ran it.

    python -m benchmarks.studies FOLDER [FOLDER ...]

The report is drawn again from what the study's folder holds, and copied; of the page and the data,
paths become `$SIMCLR_RAY_DATA` and `runs`, and links to runs, which are not kept, become text.
`python -m benchmarks.findings` then writes what the studies of laptops found to `docs/findings.md`.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from benchmarks.record import portable
from simclr_ray.studies.definition import Study
from simclr_ray.studies.findings import SCALES, USUAL
from simclr_ray.studies.folder import StudyFolder
from simclr_ray.studies.report import write_report

KEPT = Path(__file__).parents[1] / "docs" / "studies"


def main(folders: list[str]) -> None:
    """Draw and keep each report."""
    if not os.environ.get("SIMCLR_RAY_DATA"):
        raise SystemExit("set SIMCLR_RAY_DATA: its folder is written as the variable")
    for folder in folders:
        study = StudyFolder.at(folder)
        place, _ = write_report(study)
        target = KEPT / kept_name(study.definition()[0])
        target.mkdir(parents=True, exist_ok=True)
        storage = study.files.storage.removesuffix("/studies")
        for source in sorted(Path(place).iterdir()):
            if source.suffix == ".pdf":
                continue  # the same figure once more
            if source.suffix == ".png":
                shutil.copy(source, target / source.name)
                continue
            text = portable(source.read_text(encoding="utf-8")).replace(storage, "runs")
            if source.suffix == ".html":
                text = without_links(text)
            (target / source.name).write_text(text, encoding="utf-8")
        print(f"{target.relative_to(KEPT.parents[1])}: {len(list(target.iterdir()))} files")


def kept_name(study: Study) -> str:
    """Return the name of a report's folder: the study's, with a scale that has other images."""
    is_other = study.scale in SCALES and study.scale != USUAL
    return f"{study.name}_{study.scale}" if is_other else study.name


def without_links(page: str) -> str:
    """Return a report's page with the runs that it leads to as text."""
    return re.sub(r'<a href="\.\./runs/[^"]*"([^>]*)>([^<]*)</a>', r"<span\1>\2</span>", page)


if __name__ == "__main__":
    main(sys.argv[1:])
