"""Studies run a user's own code where it was typed; what files name is refused before a trial."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from simclr_ray import config as cfg
from simclr_ray.config import imports
from simclr_ray.errors import ConfigError
from simclr_ray.studies.driver import check_startable
from simclr_ray.studies.files import load_study
from simclr_ray.studies.plan import base_tree
from simclr_ray.studies.trials import plan
from tests.ray.images import write_shapes

NET, SCORE = "own_parts:net", "own_parts:score"
TYPED = ("encoder.name=import", f"encoder.path={NET}")


@pytest.fixture(autouse=True)
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(imports.PERMISSION, "")
    monkeypatch.delitem(sys.modules, "own_parts", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_parts.py").write_text("def net(): ...\ndef score(): ...\n")
    write_shapes(tmp_path / "images.parquet", 16)
    data = {"train": "images.parquet", "test": "images.parquet"}
    (tmp_path / "base.yaml").write_text(
        cfg.dump_yaml({"name": "t", "data": data, "batch_size": 8, "storage": "runs"})
    )
    (tmp_path / "study.yaml").write_text(
        cfg.dump_yaml(
            {
                "name": "s",
                "question": "?",
                "base": "base.yaml",
                "space": {"epochs": {"grid": [1, 2]}},
            }
        )
    )
    return "study.yaml"


def start(source: str, *overrides: str) -> None:
    study = load_study(source, "", *overrides)
    check_startable(study, plan(study, base_tree(study)))


def test_what_is_typed_is_permitted(source: str) -> None:
    start(source, *TYPED, f"study.protocols=[linear,probe,{SCORE}]")
    assert imports.is_allowed(NET)
    assert imports.is_allowed(SCORE)
    space = "study.space={encoder.path: {grid: ['own_parts:net', 'own_parts:other']}}"
    load_study(source, "", space)
    assert imports.is_allowed("own_parts:other")


@pytest.mark.parametrize("file", ["base.yaml", "study.yaml"])
def test_what_a_file_names_is_refused_in_one_line(source: str, file: str) -> None:
    tree = cfg.parse_yaml(Path(file).read_text())
    own = {"name": "import", "path": NET}
    tree |= {"encoder": own} if file == "base.yaml" else {"set": {"encoder": own}}
    Path(file).write_text(cfg.dump_yaml(tree))
    with pytest.raises(ConfigError) as caught:
        start(source)
    assert str(caught.value) == (
        f"study s: imports {NET}, which would run that code; permit it by --allow-code "
        "(in Python: allow_code=True of Experiment.load or load_study)"
    )
    imports.allow(imports.EVERYTHING)  # what --allow-code does
    start(source)


def test_a_protocol_is_loaded_before_anything_starts(source: str) -> None:
    with pytest.raises(ConfigError, match="own_parts has no 'scores'"):
        start(source, "study.protocols=[linear,'own_parts:scores']")
    tree = cfg.parse_yaml(Path(source).read_text()) | {"protocols": ["linear", SCORE]}
    Path(source).write_text(cfg.dump_yaml(tree))
    with pytest.raises(ConfigError, match=f"{SCORE}: would run code"):
        start(source)


def test_the_code_of_protocols_is_shipped(tmp_path: Path) -> None:
    imports.allow(SCORE)
    assert imports.runtime_env([], SCORE) == {
        "env_vars": {imports.PERMISSION: SCORE},
        "py_modules": [str(tmp_path / "own_parts.py")],
    }
