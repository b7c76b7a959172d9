"""Which split files are of, by their names: train and test side by side are never one dataset.

The hub's rules, as far as they are about names: `data/train-00000-of-00002.parquet`,
`test.parquet`, `validation/0000.parquet`. A split is named by `PATH#SPLIT`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from simclr_ray.config.wording import counted
from simclr_ray.errors import DataError

# huggingface/datasets, data_files.py: SPLIT_KEYWORDS
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF_WORD = {word: split for split, words in _WORDS.items() for word in words}
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}\b")


def usual_name(split: str) -> str:
    """Return what a split is called here: `val` is `validation`."""
    return _SPLIT_OF_WORD.get(split.lower(), split)


def split_of(path: str, folder: str) -> str:
    """Return the split of a file below a folder, empty where its name does not say: file first."""
    *folders, name = path.removeprefix(folder).strip("/").split("/")
    for part in (name.rpartition(".")[0] or name, *reversed(folders)):
        words = [w for w in re.split(r"[^a-z]+", part.lower()) if w in _SPLIT_OF_WORD]
        if words:
            return _SPLIT_OF_WORD[words[0]]
    match = _SHARD.match(name)  # a split of another name, `unlabeled-00000-of-00002.parquet`
    return match[1] if match else ""


def splits_in(paths: Sequence[str], folder: str) -> dict[str, list[str]]:
    """Return the files of each split, if there are several; one, or none, is no choice."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(split_of(path, folder), []).append(path)
    names = [name for name in groups if name]
    return groups if len(names) > 1 and any(name in _WORDS for name in names) else {}


def choose_split(paths: Sequence[str], folder: str, split: str, uri: str) -> list[str]:
    """Return the files of a split, or all where there is but one and none is asked for.

    Args:
        paths: Of all files.
        folder: That they lie in.
        split: Its name; empty: none is asked for.
        uri: What the folder is called in messages.

    Raises:
        DataError: There are several and none is asked for, or not the one that is.
    """
    groups = splits_in(paths, folder)
    if not split:
        if groups:
            raise DataError(
                f"{uri} holds the splits {_shown(groups)} side by side: name one, as in "
                f"{uri}#{next(name for name in sorted(groups, reverse=True) if name)}"
            )
        return list(paths)
    wanted = usual_name(split)
    kept = [path for path in paths if split_of(path, folder) == wanted]
    if not kept:
        there = _shown(groups or {split_of(path, folder): [path] for path in paths})
        raise DataError(f"{uri}: there is no split {split}; by their names files are of {there}")
    return kept


def _shown(groups: dict[str, list[str]]) -> str:
    named = sorted((name or "none", len(files)) for name, files in groups.items())
    return ", ".join(f"{name} ({counted(num, 'file')})" for name, num in named)
