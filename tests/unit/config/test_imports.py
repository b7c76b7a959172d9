"""`name: import` runs code of the user's only where the user has said so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from simclr_ray import config as cfg
from simclr_ray.config import imports
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import ConfigError

CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\ndef net(): ...\n"
PATH = "own_code.nets:net"
TREE = {
    "name": "t",
    "data": {"train": "x"},
    "encoder": {"name": "import", "path": PATH, "options": {"width": 3}},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(imports.PERMISSION, raising=False)
    for name in [n for n in sys.modules if n.partition(".")[0] == "own_code"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "own_code"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text(CODE)
    (package / "notes.txt").write_text("no part of the code")
    (tmp_path / "own.yaml").write_text(cfg.dump_yaml(TREE))
    return package


def test_a_file_that_names_code_is_refused_in_one_line_and_nothing_runs(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Experiment.load("own.yaml")
    assert str(caught.value) == (
        "own.yaml: imports own_code.nets:net, which would run that code; permit it by "
        "--allow-code (in Python: allow_code=True of Experiment.load or load_study)"
    )
    with pytest.raises(ConfigError, match="would run code"):
        cfg.validate(Experiment, TREE).encoder.load()
    assert not (folder / "ran").exists()


def test_code_is_permitted_by_an_argument_or_by_an_override(folder: Path) -> None:
    given = Experiment.load("own.yaml", "encoder.name=import", "encoder.path=own_code.other:net")
    assert imports.is_allowed("own_code.other:net")
    assert not imports.is_allowed(PATH)
    assert given.encoder.name == "import"
    Experiment.load("own.yaml", allow_code=True).encoder.load()
    assert (folder / "ran").exists()


def test_the_hash_is_of_all_python_files_of_the_package(folder: Path) -> None:
    first = imports.sha256_of(PATH)
    (folder / "notes.txt").write_text("changed")
    assert imports.sha256_of(PATH) == first
    (folder / "inner").mkdir()
    (folder / "inner" / "more.py").write_text("a = 1\n")
    second = imports.sha256_of(PATH)
    (folder / "inner" / "more.py").rename(folder / "inner" / "renamed.py")
    assert len({first, second, imports.sha256_of(PATH)}) == 3


def test_what_is_shipped_is_the_package_and_the_permission(folder: Path) -> None:
    config = Experiment.load("own.yaml", allow_code=True)
    env = imports.runtime_env(config)
    assert env == {"env_vars": {imports.PERMISSION: PATH}, "py_modules": [str(folder)]}
    plain = cfg.validate(Experiment, {"name": "t", "data": {"train": "x"}})
    assert imports.runtime_env(plain) == {}
    installed = imports.runtime_env(
        cfg.validate(
            Experiment, TREE | {"encoder": {"name": "import", "path": "torch.nn:Identity"}}
        )
    )
    assert "py_modules" not in installed


@pytest.mark.parametrize("path", ["own_code", "own_code.nets", ":net", "own code:net", "a:b.c"])
def test_what_is_no_import_path_is_said_so(path: str) -> None:
    tree = TREE | {"encoder": {"name": "import", "path": path}}
    with pytest.raises(ConfigError) as caught:
        cfg.validate(Experiment, tree)
    told = f"encoder: path={path!r} is no import path; expected package.module:attribute"
    assert str(caught.value) == told
