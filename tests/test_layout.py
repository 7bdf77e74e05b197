"""The layout of the package: imports only go down, in no circle, and the core leans on no heavy or optional package."""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "navil_jax"
# A room may import those to its left, and those that share its place only if they are named after it.
FLOORS = (
    ("errors",),
    ("config", "console", "paths"),
    ("batch", "sharding"),
    ("model",),
    ("data",),
    ("train", "generate"),
    ("convert",),
    ("evaluate", "plan", "serve"),
    ("study",),
)
BESIDE = {("batch", "config"), ("sharding", "config"), ("config", "errors"), ("paths", "errors")}
CORE = ("errors", "config", "console", "paths", "batch", "sharding", "model", "data", "train")
KEPT_OUT = {"matplotlib", "numba", "tensorflow_datasets", "scipy"}
# Modules of the core that are imported only where their package is there or asked for.
OPTIONAL = {
    "navil_jax.data.formats.tfds": "tensorflow_datasets",
    "navil_jax.data.resampling": "numba",
    "navil_jax.train.plots": "matplotlib",
}


def modules() -> dict[str, Path]:
    """Dotted name -> file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(tree: ast.Module) -> Iterator[str]:
    """Everything that a module imports, inside functions too, but for what only a type checker reads."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)
        waiting += ast.iter_child_nodes(node)


IMPORTS = {name: set(imports(ast.parse(path.read_text()))) - {name} for name, path in MODULES.items()}
INNER = {name: {found for found in IMPORTS[name] if found in MODULES} for name in MODULES}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def floor(module: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(module) in rooms)


def is_command(module: str) -> bool:
    """Nothing imports a command, so it may import every room; `navil_jax` itself only hands names on."""
    return module.endswith(".__main__") or module in ("navil_jax", "navil_jax.chat")


def test_nobody_imports_a_command() -> None:
    assert {found for name in MODULES for found in INNER[name] if is_command(found)} <= {"navil_jax"}


def test_imports_only_go_down() -> None:
    wrong = [
        f"{name} imports {found}"
        for name in MODULES
        if not is_command(name)
        for found in sorted(INNER[name])
        if room(found) != room(name) and floor(found) >= floor(name) and (room(name), room(found)) not in BESIDE
    ]
    assert wrong == []


def test_there_is_no_circle() -> None:
    graph: defaultdict[str, set[str]] = defaultdict(set, {name: set(found) for name, found in INNER.items()})
    while leaves := [name for name in MODULES if name in graph and not graph[name]]:
        for leaf in leaves:
            del graph[leaf]
        for found in graph.values():
            found -= set(leaves)
    assert dict(graph) == {}


def test_the_core_imports_no_optional_package() -> None:
    found = {
        (name, outer.split(".")[0])
        for name, outers in IMPORTS.items()
        if room(name) in CORE and not name.startswith("navil_jax.data.toy") and not is_command(name)
        for outer in outers
        if outer.split(".")[0] in KEPT_OUT
    }
    assert found == set(OPTIONAL.items())


def test_the_core_imports_nothing_of_the_rooms_above_it() -> None:
    core = [name for name in MODULES if room(name) in CORE and not is_command(name)]
    assert {room(found) for name in core for found in INNER[name]} <= {*CORE, ""}


@pytest.mark.slow
def test_the_trainer_runs_without_what_it_need_not_have() -> None:
    """As a program, for a package may import others."""
    blocked = f"import sys\nfor name in {sorted(KEPT_OUT - {'scipy'})}: sys.modules[name] = None\n"  # JAX has SciPy
    program = blocked + "import navil_jax.train.trainer, navil_jax.convert.opened, navil_jax.generate.assistant"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr


def test_the_root_has_few_entries() -> None:
    """Who opens the package sees nouns of the field."""
    entries = {path.stem for path in PACKAGE.iterdir() if path.name not in ("__init__.py", "__pycache__", "py.typed")}
    rooms = {name for names in FLOORS for name in names}
    assert entries - {"configs"} == rooms | {"chat"}
