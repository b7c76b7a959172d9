"""The house stands: imports go down, foreign systems have one door each, files stay short."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import simclr_ray
from simclr_ray import errors
from simclr_ray.config.components import ComponentConfig, variants
from simclr_ray.config.sections.model import AnyEncoderConfig, AnyHeadConfig
from simclr_ray.config.sections.training import AnyLossConfig, AnyOptimizerConfig
from simclr_ray.config.sections.views import AnyStageConfig, SimCLRViewsConfig

ROOT = Path(simclr_ray.__file__).parent
TRAVELLING = ROOT / "augment" / "decode"
MAX_LINES, MAX_FUNCTION_LINES = 400, 60
MAX_POSITIONAL = 6  # arguments that a call may give by their place; further ones by name
# Called by place by torch; the verbs of `cli` are called by typer, whose options they declare.
CALLED_BY_PLACE = ("distributed.spawn._run_rank", "nn.pairwise.forward")
MOST_CONFIG_CHECKS = 8  # isinstance on config classes outside of their own room

# The rooms of `docs/architecture.md`, floor by floor: a room imports from lower floors only.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("config",),
    ("storage", "distributed", "augment", "tracking"),
    ("nn", "data"),
    ("optim", "evaluation"),
    ("inference",),
    ("train",),
    ("studies",),
    ("cli",),
)
MOST_ROOMS, MOST_FLOORS = 14, 9
# Names that are no rooms: the package's own door, and `python -m simclr_ray`.
DOORSTEPS = ("", "__main__")
# Package -> who may import it. `inference.pyfunc` travels with a registered model.
DOORS: dict[str, tuple[str, ...]] = {
    "torch.distributed": ("distributed",),
    "ray": (  # what starts or asks a cluster is in `distributed`; these send tasks and read errors
        "distributed",
        "data.ray_tasks",
        "data.stream",
        "evaluation.ray_features",
        "inference.serving",
        "train.cluster_check",
        "train.elastic",
        "train.failures",
        "train.head_start",
        "train.heartbeat",
        "train.monitor",
        "train.pipeline",
        "train.ray_fit",
        "train.ray_settings",
        "train.ray_worker",
        "train.restarts",
        "train.single_fit",
        "train.single_worker",
        "studies.baselines",
        "studies.search",
        "studies.step_timing",
        "studies.trial_runner",
        "studies.tune",
        "studies.tune_trainable",
        "cli.doctor",
        "cli.main",
        "cli.node_checks",
    ),
    "ray.autoscaler": ("distributed.launch",),
    "yaml": ("distributed.launch",),
    "jsonschema": ("distributed.launch",),
    "ray.data": ("data", "evaluation.ray_features"),
    "ray.train": ("train",),
    "ray.serve": ("inference.serving",),
    "fastapi": ("inference.serving",),
    "prometheus_client": ("inference.serving_metrics",),
    "ray.tune": ("studies.tune", "studies.tune_trainable", "studies.search"),
    "mlflow": (
        "tracking",
        "inference.registry",
        "inference.mlflow_model",
        "inference.pyfunc",
    ),
    "matplotlib": ("train.figures", "studies.figures"),
    "pydantic": ("config",),
    "ruamel": ("config",),
    "rich": ("cli.console", "cli.progress"),
    "typer": ("cli",),
    "safetensors": ("storage.checkpoint", "inference"),
    "filelock": ("storage.run_lock",),
    "huggingface_hub": ("storage.hub",),
    "jinja2": ("storage.page",),
    "scipy": (
        "studies.analysis",
        "studies.claims",
        "studies.effects",
        "studies.expected_accuracy",
        "data.duplicates",
        "train.run_report",
    ),
    "faiss": ("inference.embedding_index",),
    "sklearn": ("inference.embedding_map",),
    "timm": ("nn.timm_models", "inference.export_others"),
    "onnx": ("inference.export_others",),
    "onnxruntime": ("inference.export_others",),
    "fcntl": ("distributed.shared_memory", "data.image_cache", "storage.scratch"),
}


def files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def module_of(path: Path) -> str:
    """Return the dotted name below the package; the door itself is the empty name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_typing_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported(node: ast.AST) -> Iterator[str]:
    """Yield every dotted name that a node and all below it import, typing-only ones aside."""
    if is_typing_guard(node):
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.module is not None
        yield from (f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Return what a file imports; relative names are for the folder that travels with models."""
    names = tuple(imported(ast.parse(path.read_text(encoding="utf-8"))))
    if path.parent == TRAVELLING:
        return tuple(re.sub(r"^\.", "simclr_ray.augment.decode.", name) for name in names)
    assert not any(name.startswith(".") for name in names), f"{path}: relative import"
    return names


@cache
def attributes(path: Path) -> set[str]:
    """Return the dotted chains that a file uses, such as `torch.distributed.all_gather`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def room_of(module: str) -> str:
    """Return the room that a module stands in: the first part of its name."""
    return module.partition(".")[0]


def floor_of(module: str) -> int:
    """Return the floor of the room of `module`; unknown rooms fail."""
    room = room_of(module)
    floors = [floor for floor, rooms in enumerate(FLOORS, start=1) if room in rooms]
    assert floors, f"{room} stands on no floor: enter it here and in docs/architecture.md"
    return floors[0]


def ours(name: str, modules: set[str]) -> str | None:
    """Return the module of ours that an imported dotted name means, or None."""
    if not within(name, "simclr_ray"):
        return None
    inner = name.removeprefix("simclr_ray").removeprefix(".")
    while inner and inner not in modules:
        inner = inner.rpartition(".")[0]
    return inner


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    modules = {module_of(path) for path in files()}
    found: dict[str, set[str]] = {}
    for path in files():
        named = {ours(name, modules) for name in imports(path)}
        module = module_of(path)
        found[module] = {m for m in named if m is not None and m != module}
    return found


def test_the_rooms_are_those_of_the_plan() -> None:
    here = {
        p.name.removesuffix(".py")
        for p in ROOT.iterdir()
        if p.name not in ("__init__.py", "__main__.py", "py.typed", "__pycache__")
        and (p.is_dir() or p.suffix == ".py")
    }
    assert here == {room for floor in FLOORS for room in floor}
    assert len(here) <= MOST_ROOMS
    assert len(FLOORS) <= MOST_FLOORS


def test_a_room_imports_from_lower_floors_only(graph: dict[str, set[str]]) -> None:
    wrong = [
        f"{module} (floor {floor_of(module)}) imports {other} ({floor_of(other)})"
        for module, others in graph.items()
        if module not in DOORSTEPS
        for other in others
        if room_of(other) != room_of(module)
        if other in DOORSTEPS or floor_of(other) >= floor_of(module)
    ]
    assert wrong == []


def test_there_is_no_circle_inside_a_room(graph: dict[str, set[str]]) -> None:
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, naming the cycle


@pytest.mark.parametrize("package", DOORS)
def test_a_foreign_system_is_imported_behind_its_own_door_only(package: str) -> None:
    strangers = [
        f"{module_of(path)} uses {name}"
        for path in files()
        for name in (*imports(path), *attributes(path))
        if within(name, package) and not any(within(module_of(path), d) for d in DOORS[package])
    ]
    assert strangers == []


def test_every_door_is_used() -> None:
    used = {
        (module_of(path), name) for path in files() for name in (*imports(path), *attributes(path))
    }
    unused = [
        f"{package}: {door}"
        for package, doors in DOORS.items()
        for door in doors
        if not any(within(module, door) and within(name, package) for module, name in used)
    ]
    assert unused == []


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    if ast.get_docstring(node) is None:
        return 0
    first = node.body[0]
    return (first.end_lineno or first.lineno) - first.lineno + 1


def test_no_file_is_longer_than_it_should_be() -> None:
    lengths = {module_of(p): len(p.read_text(encoding="utf-8").splitlines()) for p in files()}
    assert {m: n for m, n in lengths.items() if n > MAX_LINES} == {}


def test_no_function_is_longer_than_it_should_be() -> None:
    long = []
    for path in files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1 - docstring_lines(node)
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{module_of(path)}.{node.name}: {lines}")
    assert long == []


def test_one_function_puts_an_error_on_one_line() -> None:
    """`errors.one_line`: where it is written out, an error without a text ends in `: `."""
    copies = re.compile(r"join\(str\(\w+\)\.split\(\)\)")
    found = [module_of(p) for p in files() if copies.search(p.read_text(encoding="utf-8"))]
    assert found == ["errors"]


def test_no_function_takes_more_by_place_than_a_reader_can_count() -> None:
    long = []
    for path in files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
                num = len([name for name in names if name not in ("self", "cls", "ctx")])
                if num > MAX_POSITIONAL and room_of(module_of(path)) != "cli":
                    long.append(f"{module_of(path)}.{node.name}")
    assert sorted(long) == sorted(CALLED_BY_PLACE)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        (r"(?:MIB|GIB)", "config.wording"),
        (r"(?:Floats|Float32s|Float64s|Int64s)", "data.arrays"),
    ],
)
def test_units_and_array_types_are_named_in_one_place(name: str, place: str) -> None:
    named = re.compile(rf"^_?{name}\b[^=\n]*=", re.MULTILINE)
    found = [module_of(p) for p in files() if named.search(p.read_text(encoding="utf-8"))]
    assert found == [place]


def test_a_type_that_is_not_checked_says_why() -> None:
    bare = re.compile(r"# type: ignore(?:\[[\w, -]*\])?[ \t]*$", re.MULTILINE)
    found = [
        f"{path.relative_to(ROOT.parent)}:{text.count(chr(10), 0, match.start()) + 1}"
        for folder in ("simclr_ray", "tests", "benchmarks")
        for path in sorted((ROOT.parent / folder).rglob("*.py"))
        for text in [path.read_text(encoding="utf-8")]
        for match in bare.finditer(text)
    ]
    assert found == []


def test_no_file_is_named_for_nothing() -> None:
    vague = {"utils", "util", "helpers", "helper", "misc", "manager", "base", "common"}
    assert [p.name for p in files() if p.stem in vague] == []


def meanings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the public classes and aliases of a file, and what each means.

    An alias that two files write alike has one meaning, and of arrays so has any precision.
    """
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, f"class of {module_of(path)}"
            continue
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            name, value = ast.unparse(node.targets[0]), ast.unparse(node.value)
        elif isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "TypeAlias":
            name, value = ast.unparse(node.target), ast.unparse(node.value or node.target)
        else:
            continue
        if re.fullmatch(r"[A-Z]\w*[a-z]\w*", name) and not value.startswith("TypeVar("):
            yield name, re.sub(r"\bnpt\.|(?<=np\.float)\d+", "", value)


def test_a_class_or_alias_has_its_name_alone() -> None:
    """Whoever searches for a name finds one thing."""
    named: dict[str, set[str]] = {}
    for path in files():
        for name, meaning in meanings(path):
            named.setdefault(name, set()).add(meaning)
    assert {name: several for name, several in named.items() if len(several) > 1} == {}


def test_importing_the_package_loads_no_heavy_library() -> None:
    program = (
        "import sys, simclr_ray; "
        "print([m for m in ('torch', 'ray', 'mlflow', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_public_names_resolve_and_are_sorted_as_ruff_sorts_them() -> None:
    names = simclr_ray.__all__
    assert set(names) <= set(dir(simclr_ray))
    constants = [n for n in names if n.isupper()]
    classes = [n for n in names if n[0].isupper() and not n.isupper()]
    functions = [n for n in names if n[0].islower()]
    assert names == [*sorted(constants), *sorted(classes), *sorted(functions)]
    for name in names:
        found = getattr(simclr_ray, name)
        assert callable(found), name
        assert found.__doc__, name
    rooms = {path.stem for path in Path(simclr_ray.__file__).parent.iterdir()}
    assert not set(names) & rooms, "a submodule that is imported would cover the name"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = simclr_ray.nothing
    with pytest.raises(AttributeError, match="it is called 'run_pipeline' now"):
        _ = simclr_ray.complete


def config_class_checks(path: Path) -> list[str]:
    """Return the `isinstance` and `case` on config classes of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    asked = [
        node.args[1]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "isinstance"
    ]
    asked += [node.cls for node in ast.walk(tree) if isinstance(node, ast.MatchClass)]
    shown = [ast.unparse(node) for node in asked]
    return [f"{module_of(path)}: {text}" for text in shown if re.search(r"Config\b", text)]


def test_components_are_asked_and_not_told_apart_by_their_config_class() -> None:
    found = [
        check
        for path in files()
        if room_of(module_of(path)) != "config"
        for check in config_class_checks(path)
    ]
    assert len(found) <= MOST_CONFIG_CHECKS, found


def test_an_experiment_is_resolved_in_one_place() -> None:
    """What stands below an entry point takes a `ResolvedExperiment`: mypy sees to the rest."""
    calls = [
        f"{module_of(path)}:{node.lineno}"
        for path in files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("resolve", "resolve.resolve")
    ]
    assert len(calls) == 1, calls
    assert calls[0].startswith("train.resolve:")


FAMILIES = {
    "loss": AnyLossConfig,
    "encoder": AnyEncoderConfig,
    "head": AnyHeadConfig,
    "optimizer": AnyOptimizerConfig,
    "op": AnyStageConfig,
    "views": SimCLRViewsConfig,
}
VARIANTS = [
    pytest.param(config, id=f"{family}-{name}")
    for family, union in FAMILIES.items()
    for name, config in variants(union).items()
    if name != "import"
]
# What the package itself has by default, or asks about beyond building it.
KNOWN_ELSEWHERE = (
    "ResNetConfig", "MLPHeadConfig", "NoHeadConfig", "ClassifierHeadConfig", "NTXentConfig",
    "DistillationConfig", "LARSConfig", "CropConfig", "SimCLRViewsConfig",
)  # fmt: skip


@pytest.mark.parametrize("config", VARIANTS)
def test_a_component_is_two_files_its_own_and_that_of_its_config_class(
    config: type[ComponentConfig],
) -> None:
    module, _, name = config.component.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    if config.__name__ in KNOWN_ELSEWHERE:
        return
    own = {module_of(Path(inspect.getfile(config))), module.removeprefix("simclr_ray.")}
    reexport = "config.experiment"  # of names for users; nothing there knows a variant
    mentions = {
        module_of(path)
        for path in files()
        if re.search(rf"\b{config.__name__}\b", path.read_text(encoding="utf-8"))
    }
    assert mentions - {reexport} <= own


def test_the_tree_of_errors_names_every_one() -> None:
    ours = [n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, Exception)]
    assert errors.__doc__ is not None
    assert [name for name in ours if name not in errors.__doc__] == []
