"""Which split files are of, by their names: train and test side by side are never one dataset.

The hub's rules, as far as they are about names: `data/train-00000-of-00002.parquet`,
`test.parquet`, `validation/0000.parquet`. Of images, whose folders are classes as well, see
`split_folders`. A split is named by `PATH#SPLIT`, in `prepare` also by its option; of several one
must be.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from simclr_ray.config.logging import warn_once
from simclr_ray.config.wording import counted
from simclr_ray.errors import DataError
from simclr_ray.storage.filesystem import address_below

log = logging.getLogger(__name__)

# huggingface/datasets, data_files.py: SPLIT_KEYWORDS
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF_WORD = {word: split for split, words in _WORDS.items() for word in words}
_WORDS_ALL = frozenset(_SPLIT_OF_WORD)
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}\b")


def usual_name(split: str) -> str:
    """Return what a split is called here: `val` is `validation`."""
    return _SPLIT_OF_WORD.get(split.lower(), split)


def split_of(path: str, folder: str, columns: Collection[str] = ()) -> str:
    """Return the split of a file below a folder, empty where its name does not say: file first.

    A folder `split=test` says it before all else; one of a column that is read, `label=test`,
    says the value of that column.

    Args:
        path: Of the file.
        folder: That it lies in.
        columns: That are read, by name.
    """
    *folders, name = path.removeprefix(folder).strip("/").split("/")
    values = [part.partition("=") for part in reversed(folders)]
    for key, mark, value in values:
        if mark and key.lower() == "split" and key not in columns:
            return _split_in(value) or value
    of_folders = (v if mark else k for k, mark, v in values if not mark or k not in columns)
    for part in (name.rpartition(".")[0] or name, *of_folders):
        if split := _split_in(part):
            return split
    match = _SHARD.match(name)  # a split of another name, `unlabeled-00000-of-00002.parquet`
    return match[1] if match else ""


def _split_in(name: str) -> str:
    """Return the split of the first word of a name that is one; empty: none is."""
    words = [w for w in re.split(r"[^a-z]+", name.lower()) if w in _SPLIT_OF_WORD]
    return _SPLIT_OF_WORD[words[0]] if words else ""


def splits_in(
    paths: Sequence[str], folder: str, columns: Collection[str] = ()
) -> dict[str, list[str]]:
    """Return the files of each split, if there are several; one, or none, is no choice."""
    groups = _by_split(paths, folder, columns)
    names = [name for name in groups if name]
    return groups if len(names) > 1 and any(name in _WORDS for name in names) else {}


def _by_split(paths: Sequence[str], folder: str, columns: Collection[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(split_of(path, folder, columns), []).append(path)
    return groups


def choose_split(
    paths: Sequence[str], folder: str, split: str, uri: str, columns: Collection[str] = ()
) -> list[str]:
    """Return the files of a split, or all where there is but one and none is asked for.

    Args:
        paths: Of all files.
        folder: That they lie in.
        split: Its name; empty: none is asked for.
        uri: What the folder is called in messages.
        columns: That are read, by name: see `split_of`.

    Raises:
        DataError: There are several and none is asked for, or not the one that is.
    """
    groups = splits_in(paths, folder, columns)
    if not split:
        if groups:
            raise DataError(ask_for_split(uri, _counts(groups, "file")))
        _say_configs(paths, folder, uri)
        return list(paths)
    wanted = usual_name(split)
    every = _by_split(paths, folder, columns)
    kept = every.get(wanted, [])
    if not kept:
        there = _shown(_counts(every, "file"))
        raise DataError(f"{uri}: there is no split {split}; by their names files are of {there}")
    _say_configs(kept, folder, uri)
    return kept


def _say_configs(paths: Sequence[str], folder: str, uri: str) -> None:
    """Warn of files of one split that folders hold alike: those are of several sets in one."""
    folders_of: dict[str, set[str]] = {}
    for path in paths:
        *every, name = path.removeprefix(folder).strip("/").split("/")
        above = [part for part in every if "=" not in part]  # label=cat/ holds a part of one set
        is_named = bool(_split_in(name.rpartition(".")[0] or name) or _SHARD.match(name))
        if not is_named and above and _split_in(above[-1]):  # CONFIG/train/0000.parquet
            name, is_named = f"{above.pop()}/{name}", True
        if is_named or any(part.lower().startswith("split=") for part in every):
            folders_of.setdefault(name, set()).add("/".join(above))
    configs = sorted(
        {place for places in folders_of.values() if len(places) > 1 for place in places}
    )
    if configs:
        first = next(filter(None, configs))
        one = f"{address_below(uri, first)}#{split_of(paths[0], folder)}"
        shown = ", ".join(place or "." for place in configs)
        warn_once(log, f"{uri}: the files of {shown} are taken together; for one of them: {one}")


def ask_for_split(uri: str, splits: Mapping[str, str]) -> str:
    """Return the sentence that a split must be named.

    Args:
        uri: Where they lie side by side.
        splits: How much there is of each.
    """
    names = [name for name in splits if name]
    first = next((name for name in names if usual_name(name) == "train"), max(names))
    shown = _shown(splits)
    return f"{uri} holds the splits {shown} side by side: name one, as in {uri}#{first}"


def _counts(groups: Mapping[str, Sequence[str]], noun: str) -> dict[str, str]:
    return {name: counted(len(files), noun) for name, files in groups.items()}


def _shown(splits: Mapping[str, str]) -> str:
    named = sorted((name or "none", number) for name, number in splits.items())
    return ", ".join(f"{name} ({number})" if number else name for name, number in named)


class SplitFolder(NamedTuple):
    """The images of one split.

    Attributes:
        folder: Below the root, that holds its class folders; empty: the root does.
        names: Of its images, below that folder.
    """

    folder: str
    names: list[str]


def split_folders(names: Sequence[str]) -> dict[str, SplitFolder]:
    """Return the splits of a folder of images, by the names of their folders; none: it has none.

    A class may well be called `train`, so names alone do not decide. Folders side by side are
    splits where all of them have such a name, or where those of train and of another split hold
    folders of their own; `train` alone is one where it holds folders. They may lie in one folder
    (`data/train/CLASS`), or all classes may hold splits (`CLASS/train`).

    Args:
        names: Of the images, below the root, with `/`.
    """
    above: list[str] = []
    parts = [name.split("/") for name in names]
    while True:
        folders = _by_folder(parts)
        loose = len(parts) - sum(map(len, folders.values()))
        if _are_splits(folders):
            return {
                name: SplitFolder("/".join([*above, name]), ["/".join(rest) for rest in inside])
                for name, inside in folders.items()
            }
        if loose or len(folders) != 1:
            break
        (name,) = folders
        above.append(name)
        parts = folders[name]
    return _below_classes(names)


def _by_folder(parts: Sequence[list[str]]) -> dict[str, list[list[str]]]:
    """Return what lies in each folder, by the rest of its path."""
    folders: dict[str, list[list[str]]] = {}
    for first, *rest in parts:
        if rest:
            folders.setdefault(first, []).append(rest)
    return dict(sorted(folders.items()))


def _are_splits(folders: Mapping[str, Sequence[Sequence[str]]]) -> bool:
    exact = {name: _SPLIT_OF_WORD[name.lower()] for name in folders if name.lower() in _WORDS_ALL}
    nested = {split for name, split in exact.items() if any(len(r) > 1 for r in folders[name])}
    if len(folders) == 1:
        return bool(nested)
    worded = [_split_in(name) for name in folders]
    if all(worded) and len({*worded}) > 1 and ("train" in worded or len(exact) == len(folders)):
        return True
    return "train" in nested and len(nested) > 1


def _below_classes(names: Sequence[str]) -> dict[str, SplitFolder]:
    """Return the splits where every class folder holds folders of splits alone."""
    splits: dict[str, SplitFolder] = {}
    for name in names:
        _, *inner = name.split("/")
        split = _SPLIT_OF_WORD.get(inner[0].lower(), "") if len(inner) > 1 else ""
        if not split:
            return {}
        splits.setdefault(split, SplitFolder("", [])).names.append(name)
    return splits if len(splits) > 1 else {}


def choose_split_folder(
    names: Sequence[str], split: str, uri: str, hint: str = ""
) -> SplitFolder | None:
    """Return the images of a split, or of the only one; None: there is none, and none is asked for.

    Args:
        names: Of all images, below the root.
        split: Its name, or that of a folder; empty: none is asked for.
        uri: What the root is called in messages.
        hint: What may be done where they are no splits.

    Raises:
        DataError: There are several and none is asked for, or not just the one that is.
    """
    splits = split_folders(names)
    counts = _counts({name: folder.names for name, folder in splits.items()}, "image")
    if not split:
        if len(splits) > 1:
            raise DataError(ask_for_split(uri, counts) + hint)
        return next(iter(splits.values()), None)
    folders = _by_folder([name.split("/") for name in names])
    splits = splits or {
        name: SplitFolder(name, ["/".join(rest) for rest in inside])
        for name, inside in folders.items()
    }
    wanted = usual_name(split)
    matches = [name for name in splits if name == split]
    matches = matches or [name for name in splits if usual_name(name) == wanted]
    matches = matches or [name for name in splits if _split_in(name) == wanted]
    if len(matches) == 1:
        return splits[matches[0]]
    there = _shown(counts) or "no splits in it"
    if matches:
        raise DataError(f"{uri}: {split} may be each of {', '.join(matches)}; name one of them")
    raise DataError(f"{uri}: there is no split {split}; by their folders images are of {there}")
