"""What a reader passes over, counted by reason, with a few names: nothing is lost unsaid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from simclr_ray.config.wording import counted

NAMES_SHOWN = 3  # of each reason
LISTS = "lists, whose labels are not read"
REMEDY = "labels of a list are read from parquet, with the columns image (paths) and label"


class LeftOut:
    """How many files are left out by each reason, and the first of their names."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str = "", count: int = 1) -> None:
        """Count files by a reason, under the name that they have or lie below."""
        self.counts[reason] += count
        names = self.names.setdefault(reason, [])
        if name and name not in names and len(names) <= NAMES_SHOWN:
            names.append(name)

    def update(self, others: Iterable[LeftOut]) -> LeftOut:
        """Add what others count; return this one."""
        for other in others:
            for reason, count in other.counts.items():
                self.add(reason, count=count)
                for name in other.names[reason]:
                    self.add(reason, name, 0)
        return self

    def total(self) -> int:
        """Return how many files there are."""
        return self.counts.total()

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return self.total() > 0

    def line(self) -> str:
        """Return `left out 8 files: 5 not images (a.doc, b.doc, c.doc, …), 3 hidden (.a.jpg)`."""
        reasons = []
        for reason, count in self.counts.most_common():
            names = self.names[reason]
            more = ["…"] if len(names) > NAMES_SHOWN else []
            named = ", ".join([*names[:NAMES_SHOWN], *more])
            reasons.append(f"{count} {reason}" + (f" ({named})" if named else ""))
        remedy = f"; {REMEDY}" if self.counts[LISTS] else ""
        return f"left out {counted(self.total(), 'file')}: {', '.join(reasons)}{remedy}"
