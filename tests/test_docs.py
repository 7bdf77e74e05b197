"""What the documents name exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def defined_in(file: Path) -> set[str]:
    """`test_x` and `TestY::test_z` of a test file."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


def test_every_test_that_the_differences_name_exists():
    text = (ROOT / "docs" / "differences.md").read_text()
    named = re.findall(r"`(test_\w+)::([\w:]+)`", text)
    assert len(named) > 20
    missing = [f"{file}::{test}" for file, test in named if test not in defined_in(ROOT / "tests" / f"{file}.py")]
    assert missing == []
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| what"))]
    assert [row for row in rows if "`test_" not in row] == []
