"""What a path names is read whole, or said: folders in folders, other endings, links, pipes, files of another kind."""

import json
import logging
import os
from pathlib import Path

import pytest
from made_data import outcomes, write_lines

from navil_jax.data.formats import files, open_format
from navil_jax.data.formats.records import parse_json
from navil_jax.errors import UserError

TEXT = {"text": "x"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NAVIL_CACHE", str(tmp_path.parent / "cache"))
    return tmp_path


def opened(path: Path | str, kind: str = "llava") -> int:
    return len(open_format(kind, str(path)))


def test_every_ending_of_json_lines_is_read(folder: Path) -> None:
    for name in ("a.jsonl", "b.JSONL", "c.ndjson", "d.NDJSON"):
        write_lines(folder / name, [TEXT, TEXT])
    (folder / "e.JSON").write_text(json.dumps([TEXT]))
    assert opened(folder) == 9


def test_what_a_folder_holds_besides_is_said_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_lines(folder / "a.jsonl", [TEXT])
    for name in ("a.json.bak", "b.jsonl.tmp", "c.csv", "deep/er/d.jsonl", ".hidden/e.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_lines(folder / name, [TEXT])
    for name in ("images/1.jpg", "README.md", "notes.txt", "x.bad.jsonl", ".f.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "x.bad.jsonl").unlink()
    with caplog.at_level(logging.WARNING):
        assert opened(folder) == opened(folder) == 1
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{folder}: 4 files there are not read, such as a.json.bak; only .jsonl, .json")


def test_a_folder_that_is_read_whole_says_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_lines(folder / "a.jsonl", [TEXT])
    (folder / "images").mkdir()
    (folder / "images" / "a.jpg").touch()
    assert opened(folder) == opened(folder / "a.jsonl") == 1
    assert not caplog.records


def test_one_name_or_the_other(folder: Path) -> None:
    for number, name in enumerate(("a", "b", "c", "1", "2"), 1):
        write_lines(folder / f"{name}.jsonl", [TEXT] * number)
    assert opened(folder / "{a,c}.jsonl") == 4
    assert opened(folder / "{a,{1..2}}.jsonl") == 10
    write_lines(folder / "{a,b}.jsonl", [TEXT])
    assert opened(folder / "{a,b}.jsonl") == 1
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        opened(folder / "{a,none}.jsonl")


def test_what_is_no_file_is_called_what_it_is(folder: Path) -> None:
    (folder / "link.jsonl").symlink_to("gone.jsonl")
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "empty").mkdir()
    for path, said in (
        ("link.jsonl", "a link to gone.jsonl, which is not there"),
        ("pipe.jsonl", "a pipe, not a file"),
        ("empty", r"the folder has no files \.jsonl, .*; it is empty"),
        ("*.parquet", "no file is called so"),
        ("gone.jsonl", "no such file"),
    ):
        with pytest.raises(UserError, match=said):
            opened(folder / path)
    with pytest.raises(UserError, match="a pipe, not a file"):
        opened(folder / "p*.jsonl")


def test_images_that_are_no_files_are_called_what_they_are(folder: Path) -> None:
    (folder / "link.jpg").symlink_to("gone.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    names = ["link.jpg", "pipe.jpg", "folder.jpg", "a\0b.jpg", "x" * 300 + ".jpg"]
    found = outcomes(open_format("llava", write_lines(folder / "x.jsonl", [{"image": n, **TEXT} for n in names])))
    wanted = ["a link to gone.jpg", "a pipe, not a file", "Is a directory", "null byte", "File name too long"]
    assert [want in str(said) for want, said in zip(wanted, found, strict=True)] == [True] * 5
    assert not any("Errno" in str(said) or "embedded" in str(said) for said in found)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps([TEXT, TEXT], indent=1), "is one JSON array"),
        ("[" + ",\n".join([json.dumps(TEXT)] * 2) + "]", "is one JSON array"),
        ("\ufeff[\n" + json.dumps(TEXT) + "\n]\n", "is one JSON array"),
        (json.dumps(TEXT, indent=2), "spread over several lines"),
        (f"{json.dumps(TEXT, indent=2)}\n{json.dumps(TEXT, indent=2)}\n", "spread over several lines"),
        (f"{json.dumps(TEXT)}\r{json.dumps(TEXT)}\r", r"lines end in \\r alone"),
    ],
)
def test_files_that_are_no_json_lines_say_what_to_do(folder: Path, content: str, said: str) -> None:
    (folder / "x.jsonl").write_text(content, newline="")
    with pytest.raises(UserError, match=rf"x\.jsonl: .*{said}"):
        opened(folder / "x.jsonl")


def test_an_array_on_one_line_says_what_it_looks_like(folder: Path) -> None:
    (said,) = outcomes(open_format("llava", write_lines(folder / "x.jsonl", [[TEXT, TEXT]])))
    assert said == "a record must be an object, not list; of one JSON array, call the file *.json"


def test_a_number_with_too_many_digits_is_said_in_plain_words() -> None:
    with pytest.raises(ValueError, match="a number of more than 4,300 digits"):
        parse_json(b'{"a": ' + b"7" * 5000 + b"}")


def test_looking_for_other_files_ends_in_a_large_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOOKED_AT", 3)
    for number in range(5):
        (folder / f"{number}").mkdir()
        write_lines(folder / f"{number}" / "a.jsonl", [TEXT])
    assert len(files.passed_over(str(folder), (".jsonl",))) <= 3
