"""The package runs nothing that it reads: no pickle of a file, no eval, no shell, no YAML tag."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import simclr_ray

ROOT = Path(simclr_ray.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# What runs code or unpickles, by how it is called.
FORBIDDEN = re.compile(
    r"(eval|exec|compile|__import__|os\.system|os\.popen|os\.exec\w+|marshal\.loads?|shelve\.open"
    r"|(?:pd\.|pandas\.)?read_pickle|joblib\.load|dill\.loads?|(?:cloud)?pickle\.(?:loads?|Unpickler)"
    r"|yaml\.(?:unsafe_|full_)?load(?:_all)?|torch\.hub\.load\w*|spec\.loader\.exec_module)"
)
# What goes between processes of one Ray; and a registered encoder's own package, which is trusted.
PERMITTED = {
    ("data/ray_tasks.py", "pickle.loads"),
    ("distributed/ray_cluster.py", "cloudpickle.loads"),
    ("inference/pyfunc.py", "spec.loader.exec_module"),
}


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [(ast.unparse(node.func), node) for node in nodes if isinstance(node, ast.Call)]


def keyword(call: ast.Call, name: str) -> object:
    """Return the literal value of a keyword argument; None where it is not given."""
    values = [k.value for k in call.keywords if k.arg == name]
    return ast.literal_eval(values[0]) if values else None


def test_nothing_is_unpickled_from_a_file_or_evaluated() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in FILES
        for name, _ in calls(path)
        if FORBIDDEN.fullmatch(name)
    }
    assert found == PERMITTED


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_readers_that_could_run_code_are_told_not_to(path: Path) -> None:
    for name, call in calls(path):
        if name == "torch.load":
            assert keyword(call, "weights_only") is True, ast.unparse(call)
        if name in ("np.load", "numpy.load"):
            assert keyword(call, "allow_pickle") is False, ast.unparse(call)
        if name == "YAML":
            assert keyword(call, "typ") == "safe", ast.unparse(call)
        if name.startswith("subprocess."):
            assert keyword(call, "shell") is None, ast.unparse(call)
