"""What pydantic finds wrong, one line an issue: path, value, what is allowed, nearest name."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pydantic_core
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from simclr_ray.config.schema import (
    Config,
    configs_in,
    default_name,
    name_of,
)
from simclr_ray.errors import ConfigIssue, one_line

Where = tuple[str | int, ...]

EXTRA = "extra_forbidden"
SCALARS = ("str", "int", "float", "bool")
NODE_ERRORS = ("model_type", "model_attributes_type", "dict_type")
FOREIGN = 3  # unknown keys at the top, and half of all: a file that was written for another program

# Keys and values of format 1 and their names since; `docs/upgrade.md` has the whole list.
RENAMED = {
    "start": "init",
    "start.weights": "init.weights",
    "data.bank": "data.eval_train",
    "data.max_bad_share": "data.max_bad_fraction",
    "max_bad_share": "max_bad_fraction",
    "evaluation.bank_limit": "evaluation.eval_train_limit",
    "register_as": "registry",
    "register_as.name": "registry.name",
    "register_as.alias": "registry.alias",
    "batch_norm.images": "batch_norm.group_size",
    "scaling.colour_on": "scaling.color_augment_on",
    "augment.first_size": "augment.start_size",
    "augment.full_size_at": "augment.full_size_epoch_fraction",
    "judge": "protocols",
    "also": "extra_metrics",
    "paper.like": "paper.matches",
    "colour": "color",
    "lbfgs": "logistic_regression",
    "knn_solo": "knn_k20",
    "knn_1": "knn_k1",
    "top1": "downstream_top1",
    "train/accuracy": "train/contrastive_top1",
}


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the closest of `allowed`, or nothing when none is close."""
    allowed = list(allowed)
    if RENAMED.get(name) in allowed:
        return f" (it is called {RENAMED[name]!r} since format 2)"
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def issues_of(
    schema: type[Config], tree: Any, errors: Sequence[pydantic_core.ErrorDetails], source: str = ""
) -> list[ConfigIssue]:
    """Return an issue for each thing that pydantic found; one in all for a file of another tool."""
    strange = [str(e["loc"][0]) for e in errors if e["type"] == EXTRA and len(e["loc"]) == 1]
    keys = [key for key in strange if key not in RENAMED]
    if len(keys) >= FOREIGN and 2 * len(keys) >= len(tree):
        shown = ", ".join(f"{key}{nearest(key, schema.model_fields)}" for key in keys)
        kind, allowed = schema.__name__.lower(), ", ".join(sorted(schema.model_fields))
        problem = f"holds no {kind}: unknown keys {shown}; allowed here: {allowed}"
        return [ConfigIssue(source, problem)]
    return list(dict.fromkeys(_issue(schema, tree, item) for item in errors))


def yaml_problem(error: YAMLError) -> str:
    """Return in one line what is wrong with a YAML document, and where."""
    if not isinstance(error, MarkedYAMLError):
        where = getattr(error, "position", None)
        at = "" if where is None else f"character {where + 1}: "
        return f"{at}{getattr(error, 'reason', '') or one_line(error)}"
    mark = error.problem_mark or error.context_mark
    at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    if "found character '\\t'" in str(error.problem):
        return f"{at}a tab; YAML is indented by spaces"
    if mark and "constructor for the tag '!" in str(error.problem):  # `!!` is of YAML itself
        typed = "key='\"!value\"' of a command line"
        return f'{at}a text that begins with ! is quoted: key: "!value" in a file, {typed}'
    parts = [text for text in (error.context, error.problem) if text]
    return at + " ".join(" ".join(parts).split())


def _issue(schema: type[Config], tree: Any, item: Any) -> ConfigIssue:
    where = _without_tags(tree, item["loc"])
    path = ".".join(str(part) for part in where)
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind == EXTRA:
        keys = _keys_at(schema, tree, where[:-1])
        if path in RENAMED:
            return ConfigIssue(path, f"is called {RENAMED[path]} since format 2 (docs/upgrade.md)")
        hint = nearest(str(where[-1]), keys)
        allowed = f"; allowed here: {', '.join(sorted(keys))}" if keys else ""
        return ConfigIssue(path, f"unknown key{hint}{allowed}")
    if kind == "missing":
        return ConfigIssue(path, "missing key, and it has no default")
    if kind == "literal_error":
        options = [part.strip("' ") for part in context["expected"].replace(" or ", ",").split(",")]
        return ConfigIssue(
            path, f"got {value!r}; allowed: {', '.join(options)}{nearest(str(value), options)}"
        )
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        options = _variants_at(schema, tree, where)
        tag = value.get("name") if isinstance(value, Mapping) else value
        hint = nearest(str(tag), options)
        shown = "missing" if tag is None else f"got {tag!r}"
        return ConfigIssue(f"{path}.name", f"{shown}; allowed: {', '.join(options)}{hint}")
    if kind == "value_error":
        return ConfigIssue(path, str(context["error"]))
    if kind in NODE_ERRORS:
        return ConfigIssue(path, f"got {value!r}; it must be keys and values")
    if where[-1:] and where[-1] in SCALARS:  # one of each type of a scalar
        path = ".".join(str(part) for part in where[:-1])
        return ConfigIssue(path, f"got {value!r}; it must be text, a number, true or false")
    return ConfigIssue(path, f"got {value!r}; {_sentence(item['msg'])}")


def _sentence(message: str) -> str:
    """Return pydantic's message as the end of ours."""
    message = re.sub(r"^(Input|String|List) should", "it must", message)
    message = message.replace("List", "it").replace("Input", "it")
    return message.partition(" after validation")[0].strip()


def _without_tags(tree: Any, loc: Where) -> Where:
    """Drop the union tags that pydantic puts into a path: they are no keys of the user's file."""
    kept: list[str | int] = []
    node = tree
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        tag = isinstance(node, Mapping) and part not in node
        if tag and (not last or node.get("name") == part):
            continue
        kept.append(part)
        if isinstance(node, Mapping):
            node = node.get(part, {})
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
    return tuple(kept)


def _keys_at(schema: type[Config], tree: Any, where: Where) -> list[str]:
    """Return the keys that the node at `where` may have, following unions by their `name`."""
    node = _node_at(schema, tree, where)
    return list(node.model_fields) if node else []


def _variants_at(schema: type[Config], tree: Any, where: Where) -> list[str]:
    """Return the names that the union at `where` knows, or the list of one."""
    if isinstance(where[-1], int):
        where = where[:-1]
    parent = _node_at(schema, tree, where[:-1])
    annotation = parent.model_fields[str(where[-1])].annotation if parent else None
    return [name_of(variant) for variant in configs_in(annotation)]


def _node_at(schema: type[Config], tree: Any, where: Where) -> type[Config] | None:
    """Return the config class of the node at `where`, None where it is no config."""
    current: type[Config] = schema
    variants: list[type[Config]] = []
    node = tree
    below_mapping = False
    for part in where:
        if isinstance(part, int):  # a list's: its items have the variants of the field
            node = node[part] if isinstance(node, list) and part < len(node) else {}
            named = [
                v for v in variants if isinstance(node, Mapping) and name_of(v) == node.get("name")
            ]
            current = (named or variants or [schema])[0]
            continue
        node = node[part] if isinstance(node, Mapping) and part in node else {}
        if below_mapping:  # its keys are the user's
            below_mapping = False
            continue
        field = current.model_fields.get(part)
        if field is None:
            return None
        below_mapping = typing.get_origin(field.annotation) is dict
        variants, usual = configs_in(field.annotation), default_name(field)
        variant = node.get("name", usual) if isinstance(node, Mapping) else usual
        named = [v for v in variants if name_of(v) == (variant or name_of(v))]
        if not (named or variants):
            return None
        current = (named or variants)[0]
    return current
