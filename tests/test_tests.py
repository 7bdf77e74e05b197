"""Rules that the tests keep, read from their source: every one asserts to its end, through public names, on its own."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.glob("*.py"))
OURS = ("navil_jax", "benchmarks")
FOREIGN = {"os._exit", "pickle._Pickler", "shutil._ntuple_diskusage", "content._metadata"}  # of Python and of torch


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_test(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name.startswith("test_")


def own_statements(function: ast.AST) -> Iterator[ast.AST]:
    """What a function holds, without the functions and classes within it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield child
            yield from own_statements(child)


def early_returns(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    for function in filter(is_test, ast.walk(tree)):
        for node in own_statements(function):
            if isinstance(node, ast.Return):
                yield node, "a test returns early; narrow its strategy or call hypothesis.assume"


def private_names(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            for name in filter(private, (alias.name for alias in node.names)):
                yield node, f"imports {name}; test through a public name"
        elif isinstance(node, ast.Attribute) and private(node.attr):
            text = ast.unparse(node)
            if not text.startswith("self.") and text not in FOREIGN:
                yield node, f"uses {text}; test through a public name"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "getattr")):
            for argument in node.args[:2]:
                if isinstance(argument, ast.Constant) and private(str(argument.value).rpartition(".")[2]):
                    yield node, f"reaches {argument.value}; test through a public name"


def imports_of_tests(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            if name.split(".")[-1].startswith("test_"):
                yield node, f"imports {name}; what tests share lives in modules that are no tests"


def skipped_modules(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    for node in own_statements(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("importorskip"):
            yield node, "a module skips as a whole; only the tests that need the package may"


RULES = (early_returns, private_names, imports_of_tests, skipped_modules)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule):
    found = [f"{file.name}:{node.lineno}: {what}" for file in FILES for node, what in rule(ast.parse(file.read_text()))]
    assert found == []


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (early_returns, "def test_x():\n    if 1:\n        return\n    assert 1"),
        (early_returns, "class A:\n    def test_x(self):\n        for i in x:\n            return"),
        (private_names, "from navil_jax.model import _x"),
        (private_names, "def test_x(engine):\n    engine()._decode()"),
        (private_names, "monkeypatch.setattr('navil_jax.a._b', 1)"),
        (private_names, "monkeypatch.setattr(module, '_b', 1)"),
        (imports_of_tests, "from test_a import b"),
        (imports_of_tests, "import tests.test_a"),
        (skipped_modules, "a = pytest.importorskip('a')"),
    ],
)
def test_what_breaks_a_rule_is_found(rule, source: str):
    assert len(list(rule(ast.parse(source)))) == 1


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_what_keeps_the_rules_is_not(rule):
    source = """
from navil_jax.convert import __main__ as convert
def test_x():
    pytest.importorskip('a')
    def inner():
        return self._x
    assert inner() == convert.__doc__
"""
    assert list(rule(ast.parse(source))) == []
