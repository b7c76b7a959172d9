"""YAML of launch files as Ray and kubectl read it, 1.1, refused where it would be misread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import yaml  # type: ignore[import-untyped] # has no stubs

from simclr_ray.errors import ConfigError, ConfigIssue

MOST_VALUES: Final = 100_000  # aliases may stand for any number: a few lines for billions
_MERGE: Final = "tag:yaml.org,2002:merge"


def documents_of(text: str, source: str) -> list[Any]:
    """Return the documents of a YAML file.

    Args:
        text: The file.
        source: Its name, for messages.

    Raises:
        ConfigError: It is no YAML, a key stands twice in one mapping (YAML keeps the last without
            a word), or an alias holds itself.
    """
    documents, issues = [], []
    try:
        loader = yaml.SafeLoader(text)
        while loader.check_node():
            node = loader.get_node()
            _count_values(node, source, {})
            issues += [ConfigIssue(source, problem) for problem in _duplicates(node, set())]
            documents.append(loader.construct_document(node))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = f"is not YAML: {at}{_reason(error)}"
        raise ConfigError.of(source, problem) from error
    except RecursionError as error:
        raise ConfigError.of(source, "is nested too deep to be read") from error
    except ValueError as error:  # a date or a number that none is
        raise ConfigError.of(source, f"is not YAML: {error}") from error
    if issues:
        raise ConfigError(issues)
    return documents


def _reason(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)


def _children(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [item for pair in node.value for item in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _count_values(node: Any, source: str, counts: dict[int, int]) -> int:
    """Return how many values a node holds, aliases written out; raise `ConfigError` for too many.

    Args:
        node: Of the tree.
        source: Name of the file.
        counts: Of the nodes that were counted, by identity; 0 while one is being counted.
    """
    if counts.get(id(node)) == 0:
        at = f"line {node.start_mark.line + 1}"
        raise ConfigError.of(source, f"{at}: an alias holds itself; write it out")
    if id(node) not in counts:
        counts[id(node)] = 0
        counts[id(node)] = 1 + sum(_count_values(n, source, counts) for n in _children(node))
    if counts[id(node)] > MOST_VALUES:
        problem = f"its aliases stand for more than {MOST_VALUES:,} values; write them out"
        raise ConfigError.of(source, problem)
    return counts[id(node)]


def _duplicates(node: Any, seen: set[int]) -> Iterator[str]:
    """Yield what is wrong for each key that a mapping has twice."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        marks: dict[tuple[str, str], Any] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            first = marks.setdefault((key.tag, key.value), key.start_mark)
            if first is not key.start_mark:
                yield (
                    f"line {key.start_mark.line + 1}: the key {key.value} stands in line "
                    f"{first.line + 1} already, and the second replaces the first; leave one"
                )
    for child in _children(node):
        yield from _duplicates(child, seen)
