"""Names of the columns in which features come back from the actors that make them."""

from __future__ import annotations

from typing import Final

PIECE, ROW, ID, LABEL, PATH, ERROR = "piece", "row", "id", "label", "path", "error"
FAILED: Final = "failed"  # of a table in place of a piece


def feature_column(index: int) -> str:
    """Return the column with the features of network `index`."""
    return f"features_{index}"


def kept_column(name: str) -> str:
    """Return the column that hands on column `name` of the rows."""
    return f"kept {name}"
