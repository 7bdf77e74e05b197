"""The examples of docs/data.md run as they stand there, in one folder, one after another."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs" / "data.md"
# heading of docs/data.md -> package that its example needs
OPTIONAL = {
    "parquet": "pyarrow.parquet",
    "Hugging Face datasets": "datasets",
    "TensorFlow Datasets": "tensorflow_datasets",
}


def examples() -> list[tuple[str, str]]:
    """(heading, code) of every Python block."""
    sections = re.split(r"^## (.+)$", DOCS.read_text(), flags=re.MULTILINE)[1:]
    pairs = zip(sections[::2], sections[1::2], strict=True)
    return [(heading, code) for heading, text in pairs for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NAVIL_CACHE", str(tmp_path / "cache"))
    names: dict[str, object] = {}
    ran = []
    for heading, code in examples():
        if heading in OPTIONAL:
            pytest.importorskip(OPTIONAL[heading])
        exec(compile(code, f"{DOCS.name}, {heading}", "exec"), names)
        ran.append(heading)
    assert len(ran) == 9


def test_examples_are_short() -> None:
    assert [heading for heading, code in examples() if len(code.splitlines()) > 15] == []
