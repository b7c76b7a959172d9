"""A user's own code in a config, `name: import`: permitted, found, hashed, and shipped.

Importing runs code, so a path is imported only where it was permitted: by an override of the
command line, `--allow-code`, or `allow`. What is hashed is the whole package that the path
begins with, since a factory may call anything in it; the hash is a part of the run's digest.
"""

from __future__ import annotations

import hashlib
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

from simclr_ray.config.components import ComponentConfig
from simclr_ray.config.schema import Config, ConfigT, Field, model_validator
from simclr_ray.config.validation import nearest
from simclr_ray.errors import ConfigError, one_line

PERMISSION: Final = (
    "SIMCLR_RAY_ALLOW_CODE"  # import paths, comma-separated, or `*`; workers get it as well
)
EVERYTHING: Final = "*"
IMPORT_PATH: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
FORM: Final = "package.module:attribute"


class ImportConfig(ComponentConfig):
    """A component from outside the package, by its import path."""

    name: Literal["import"] = "import"
    path: str = Field(description=f"{FORM}, importable where the command runs.")
    options: dict[str, Any] = Field({}, description="What it is called with.")
    sha256: str = Field("", description="Of the .py files of the module's package; filled in.")

    @model_validator(mode="after")
    def _check_path(self) -> ImportConfig:
        if not IMPORT_PATH.fullmatch(self.path):
            raise ValueError(f"path={self.path!r} is no import path; expected {FORM}")
        return self

    def arguments(self) -> dict[str, Any]:
        """Return the options."""
        return dict(self.options)

    def load(self) -> Any:
        """Return what `path` names. Raises `ConfigError` as `import_object` does."""
        component = import_object(self.path)
        if self.sha256 and (now := sha256_of(self.path)) != self.sha256:
            raise ConfigError.of(
                self.path,
                f"its package has sha256 {now[:12]} and had {self.sha256[:12]} when the config was "
                "resolved; restore it, or clear this sha256 to take it as it is",
            )
        return component


def allow(*paths: str) -> None:
    """Permit importing these paths in this process and in those that it starts; `*`: any."""
    os.environ[PERMISSION] = ",".join(sorted({*_allowed(), *paths} - {""}))


def allow_typed(value: Any) -> None:
    """Permit the import paths in a parsed value: whoever types a path wants it imported."""
    if isinstance(value, Mapping):
        allow_typed([*value, *value.values()])
    elif isinstance(value, list):
        for item in value:
            allow_typed(item)
    elif isinstance(value, str) and IMPORT_PATH.fullmatch(value):
        allow(value)


def is_allowed(path: str) -> bool:
    """Return whether `path` may be imported."""
    allowed = _allowed()
    return EVERYTHING in allowed or path in allowed


def _allowed() -> set[str]:
    return set(os.environ.get(PERMISSION, "").split(","))


def import_object(path: str) -> Any:
    """Return what an import path names, something callable.

    Raises:
        ConfigError: It is not permitted, not there, or not callable: one line each.
    """
    if not IMPORT_PATH.fullmatch(path):
        raise ConfigError.of(path, f"is no import path; expected {FORM}")
    if not is_allowed(path):
        raise ConfigError.of(
            path,
            "would run code; give it as an override of the command line, or permit it by "
            "--allow-code (in Python: allow_code=True of Experiment.load or load_study)",
        )
    module, _, attribute = path.partition(":")
    _find(path)
    try:
        loaded = import_module(module)
    except Exception as error:
        cause = one_line(error)
        raise ConfigError.of(
            path, f"importing {module} raised {type(error).__name__}: {cause}"
        ) from error
    if not hasattr(loaded, attribute):
        hint = nearest(attribute, [n for n in dir(loaded) if not n.startswith("_")])
        raise ConfigError.of(
            path, f"{module} has no {attribute!r}{hint}; expected a class or function"
        )
    component = getattr(loaded, attribute)
    if not callable(component):
        kind = type(component).__name__
        raise ConfigError.of(path, f"is of type {kind}, not callable; expected a class or function")
    return component


def source_of(path: str) -> Path:
    """Return the folder of the package that an import path begins with, or its single file.

    Raises:
        ConfigError: There is no such module.
    """
    spec = _find(path)
    folders = list(spec.submodule_search_locations or [])
    if folders:
        return Path(folders[0]).resolve()
    if spec.origin is None or not spec.origin.endswith(".py"):
        raise ConfigError.of(path, "is not written in Python; its source cannot be hashed")
    return Path(spec.origin).resolve()


def sha256_of(path: str) -> str:
    """Return the sha256 of an import path's package: names and content of its .py files, sorted."""
    source = source_of(path)
    files = sorted(source.rglob("*.py")) if source.is_dir() else [source]
    stamps = tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files)
    return _sha256_of(source, stamps)


@cache
def _sha256_of(source: Path, stamps: tuple[tuple[str, int, int], ...]) -> str:
    total = hashlib.sha256()
    for name, _, _ in stamps:
        file = Path(name)
        total.update(f"{file.relative_to(source.parent).as_posix()}\0".encode())
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def is_installed(path: str) -> bool:
    """Return whether an import path's package is installed, as it is on other nodes."""
    folders = {*site.getsitepackages(), site.getusersitepackages()}
    folders |= {sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")}
    return any(source_of(path).is_relative_to(Path(f).resolve()) for f in folders)


def imports_in(config: Any, where: str = "") -> Iterator[tuple[str, ImportConfig]]:
    """Yield the dotted path and the node of every `name: import` in a config."""
    if isinstance(config, ImportConfig):
        yield where, config
    elif isinstance(config, list):
        for index, item in enumerate(config):
            yield from imports_in(item, f"{where}.{index}")
    elif isinstance(config, Config):
        for key in type(config).model_fields:
            yield from imports_in(getattr(config, key), f"{where}.{key}" if where else key)


def with_hashes(config: ConfigT) -> ConfigT:
    """Return a config with the sha256 of every `name: import` in it filled in.

    Raises:
        ConfigError: A path may not or cannot be imported, or is not of the sha256 that it has.
    """
    hashed: ConfigT = _with_hashes(config)
    return hashed


def _with_hashes(node: Any) -> Any:
    if isinstance(node, ImportConfig):
        node.load()
        return node.model_copy(update={"sha256": sha256_of(node.path)})
    if isinstance(node, list):
        return [_with_hashes(item) for item in node]
    if not isinstance(node, Config):
        return node
    fields = {key: getattr(node, key) for key in type(node).model_fields}
    new = {key: _with_hashes(value) for key, value in fields.items()}
    changed = {key: value for key, value in new.items() if value != fields[key]}
    return node.model_copy(update=changed) if changed else node


def import_paths(tree: Any) -> set[str]:
    """Return the import paths in a plain tree: every `path` beside `name: import`."""
    if isinstance(tree, Mapping):
        own = {str(tree.get("path"))} if tree.get("name") == "import" else set()
        return own.union(*(import_paths(value) for value in tree.values()))
    if isinstance(tree, list):
        return set().union(*(import_paths(item) for item in tree))
    return set()


def permit_code(tree: Any, stored: Any, shown: str, *, allow_code: bool = False) -> None:
    """Permit the code that a config names, as far as its user has.

    Args:
        tree: The whole config, overrides applied: what they name is permitted by being given.
        stored: The same without overrides, as read from `shown`.
        shown: File or preset.
        allow_code: Permit what `stored` names.

    Raises:
        ConfigError: `stored` names code that nobody has permitted, and it is not overridden.
    """
    paths, read = import_paths(tree), import_paths(stored)
    permitted = paths if allow_code else paths - read
    if permitted:
        allow(*permitted)
    refused = sorted(path for path in paths & read if not is_allowed(path))
    if refused:
        raise ConfigError.of(
            shown,
            f"imports {', '.join(refused)}, which would run that code; permit it by --allow-code "
            "(in Python: allow_code=True of Experiment.load or load_study)",
        )


def runtime_env(config: Any, *others: str) -> dict[str, Any]:
    """Return the Ray runtime environment by which workers have the code of a config; {}: none.

    `others` are import paths besides, such as those of protocols. Packages that are installed are
    not shipped; workers compare their sha256 all the same.
    """
    paths = {*others, *(node.path for _, node in imports_in(config))}
    if not paths:
        return {}
    sources = {str(source_of(path)) for path in paths if not is_installed(path)}
    env: dict[str, Any] = {"env_vars": {PERMISSION: os.environ.get(PERMISSION, "")}}
    return env | ({"py_modules": sorted(sources)} if sources else {})


def _find(path: str) -> ModuleSpec:
    """Return where the package of an import path lies; the working folder counts, comes last."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # the console script, unlike `python -m`, leaves it out
    top = path.partition(":")[0].partition(".")[0]
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise ConfigError.of(
            path, f"there is no module {top!r} on the Python path; expected {FORM}"
        )
    return spec
