"""Real text that is on every machine: the documentation that comes with Python (PSF licence).

The Python language reference as `pydoc` shows it, and the docstrings of the standard library.
"""

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from navil_jax.errors import UserError

PIECE = 400  # characters of a sample, about
HELD_OUT_EVERY = 20
_SKIPPED = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "__pycache__")


def write_corpus(folder: Path, most_bytes: int) -> None:
    """Writes train.jsonl and held_out.jsonl, a record {"text": ...} per piece; nothing if they are there.

    Raises:
      UserError: this Python brings no documentation.
    """
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    if train.exists():
        return
    found: dict[str, None] = {}  # each piece once: docstrings are often copied
    size = 0
    for text in _documents():
        found |= dict.fromkeys(_pieces(text))
        size += len(text)
        if size >= most_bytes:
            break
    pieces = list(found)
    if len(pieces) < 2 * HELD_OUT_EVERY:
        raise UserError("this Python has no documentation of its own to train on; name language_models in the study")
    folder.mkdir(parents=True, exist_ok=True)
    held_out.write_text("".join(_line(piece) for piece in pieces[::HELD_OUT_EVERY]))
    rest = (piece for number, piece in enumerate(pieces) if number % HELD_OUT_EVERY)
    temporary = train.with_suffix(".tmp")
    temporary.write_text("".join(_line(piece) for piece in rest))
    temporary.replace(train)


def _line(piece: str) -> str:
    return json.dumps({"text": piece}) + "\n"


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
