"""Real text that is on every machine: the documentation that comes with Python (PSF licence).

The Python language reference as `pydoc` shows it, and the docstrings of the standard library.
"""

import ast
import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from navil_jax.errors import UserError

PIECE = 400  # characters of a piece, about
HELD_OUT_EVERY = 20
_SKIPPED = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "__pycache__")


@functools.cache
def pieces(most_bytes: int) -> tuple[str, ...]:
    """Texts of about `PIECE` characters, each once, up to about `most_bytes` in all.

    Raises:
      UserError: this Python brings no documentation.
    """
    found: dict[str, None] = {}  # docstrings are often copied
    size = 0
    for text in _documents():
        found |= dict.fromkeys(_pieces(text))
        size += len(text)
        if size >= most_bytes:
            break
    if len(found) < 2 * HELD_OUT_EVERY:
        raise UserError("this Python has no documentation of its own to learn from")
    return tuple(found)


def _documents() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions keep it in a package of its own
        topics = {}
    yield from topics.values()
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not set(path.relative_to(root).parts).intersection(_SKIPPED):
            yield from _docstrings(path)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield text


def _pieces(text: str) -> Iterator[str]:
    """Whole lines of ASCII, joined up to about `PIECE` characters; what is too short to be a text is left out."""
    piece = ""
    for line in filter(str.isascii, text.splitlines()):
        piece += line[:PIECE].rstrip() + "\n"
        if len(piece) >= PIECE:
            yield piece.strip()
            piece = ""
    if len(piece.strip()) > PIECE // 8:
        yield piece.strip()
