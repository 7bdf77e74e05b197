"""JSON files are read whole, or refused by name and line, however they are written."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_data import outcomes

from navil_jax.data.formats import open_format
from navil_jax.data.sample import Sample
from navil_jax.errors import UserError

RECORDS = [{"text": "one"}, {"text": "two"}, {"text": "three"}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAVIL_CACHE", str(tmp_path / "cache"))


def answers(path: Path) -> list[str]:
    return [
        found if isinstance(found, str) else found.turns[0][1] for found in outcomes(open_format("llava", str(path)))
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("x.jsonl", b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode()),
        ("x.JSONL", LINES.encode()),
        ("x.ndjson", LINES.encode()),
        ("x.json", b"\xef\xbb\xbf" + json.dumps(RECORDS, indent=1).replace("\n", "\r\n").encode() + b"\r\n \n"),
        ("x.JSON", json.dumps(RECORDS).encode()),
        ("x.jsonl", LINES.encode().replace(b'{"text": "two"}', b'\xef\xbb\xbf{"text": "two"}')),  # joined files
    ],
)
def test_files_of_other_dress_are_read(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert answers(tmp_path / name) == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", LINES.encode("utf-16"), "is UTF-16; make it UTF-8: iconv"),
        ("x.jsonl", LINES.encode("utf-16-le"), "is UTF-16"),
        ("x.jsonl", LINES.encode("utf-16-be"), "is UTF-16"),
        ("x.json", json.dumps(RECORDS).encode("utf-32"), "is UTF-32"),
        ("x.json", json.dumps(RECORDS).encode("utf-32-be"), "is UTF-32"),
        ("x.json", json.dumps(RECORDS).encode("utf-16"), "is UTF-16"),
        ("x.jsonl.gz", gzip.compress(LINES.encode(), mtime=0), r"is compressed \(gz\); unpack it first"),
        ("x.json.gz", gzip.compress(json.dumps(RECORDS).encode(), mtime=0), r"is compressed \(gz\)"),
        ("x.jsonl", gzip.compress(LINES.encode(), mtime=0), r"is compressed \(gz\)"),
        ("x.csv", b"image,caption\na.jpg,x\n", "is neither JSON lines nor a JSON array"),
        ("x.json", json.dumps(RECORDS).encode() + b'\n\n[{"text": "four"}]', "line 3: there is more behind the end"),
        ("x.json", json.dumps(RECORDS).encode() + b"]", "line 1: there is more behind the end"),
        ("x.json", json.dumps({"data": RECORDS}).encode(), "is no JSON array of samples"),
    ],
)
def test_files_that_cannot_be_read_whole_are_refused_by_name(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_format("llava", str(tmp_path / name))
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(caught.value)


def test_compressed_files_of_a_folder_are_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "B.JSONL").write_text(LINES)
    assert len(open_format("llava", str(tmp_path))) == 6
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(LINES.encode(), mtime=0))
    with pytest.raises(UserError, match=r"c\.jsonl\.gz is compressed; unpack it, or move it out"):
        open_format("llava", str(tmp_path))


_GOOD = st.text(alphabet=st.characters(blacklist_categories=("Cs",), blacklist_characters="<["), min_size=1).map(
    "x".__add__
)
_NO_RECORDS = [b"{", b"[1]", b"3", b'"x"', b"null", b'{"text": "\xff"}', b'{"text": "\\ud800"}', b'{"text": {}}']
_NO_RECORDS += [b"[" * 100_000 + b"]" * 100_000, b'{"text": NaN}', b'{"text": -Infinity}', b'{"text": "a"} x']
_NO_RECORDS += [b'{"text": "a", "text": "b"}']
_BAD = st.sampled_from(_NO_RECORDS)


@settings(max_examples=100, deadline=None)
@given(
    lines=st.lists(_GOOD | _BAD, min_size=1, max_size=8),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    end=st.booleans(),
    array=st.booleans(),
)
def test_every_record_is_read_or_is_bad_with_its_place(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[str | bytes],
    mark: bytes,
    newline: bytes,
    end: bool,
    array: bool,
) -> None:
    """As many samples as records, in order; those that are whole say what was written."""
    if array:  # where a bracket is missing, nothing tells where the next record begins
        lines = [line for line in lines if line != b"{"] or ["x"]
    texts = [line if isinstance(line, bytes) else json.dumps({"text": line}).encode() for line in lines]
    path = tmp_path_factory.mktemp("any") / ("x.json" if array else "x.jsonl")
    inner = (b"," + newline).join(texts) if array else newline.join(texts)
    path.write_bytes(mark + (b"[" + inner + b"]" if array else inner) + newline * end)
    source = open_format("llava", str(path))
    found = outcomes(source)
    assert len(found) == len(lines)
    for number, (line, sample) in enumerate(zip(lines, found, strict=True), 1):
        assert isinstance(sample, Sample) == isinstance(line, str), (line, sample)
        if isinstance(sample, Sample):
            assert sample.turns == (("", line),)
            assert sample.key == (f"x.json#{number}" if array else f"x.jsonl:{number}")
