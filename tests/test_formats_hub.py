"""Data sets in the layout of the Hugging Face hub: converted file by file as they come."""

import json
import os
import pickle
import re
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from made_data import jpeg

from navil_jax.data import formats
from navil_jax.data.__main__ import main
from navil_jax.data.convert import WriteStream
from navil_jax.data.formats import hub, open_format
from navil_jax.data.formats.records import Reading


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three files of three rows in charts/, of which the fifth row is bad; the hub cannot be reached."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.opened.cache_clear()
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answer": datasets.ClassLabel(names=["cat", "dog"]),
            "page": datasets.Value("string"),
        }
    )
    (tmp_path / "charts/data").mkdir(parents=True)
    for file in range(3):
        rows = [
            {"image": {"bytes": jpeg(3 * file + n), "path": None}, "question": "What?", "answer": n % 2, "page": "u"}
            for n in range(3)
        ]
        if file == 1:
            rows[1]["question"] = "<image> <image>"
        table = datasets.Dataset.from_list(rows, features=features)
        pq.write_table(table.data.table, tmp_path / f"charts/data/train-{file:05}-of-00003.parquet")
    return tmp_path


def convert(path: str = "charts", out: str = "out", *more: str) -> int:
    return main(["convert", "--from", "huggingface", "--path", path, "--out", out, "--workers=0", *more])


def test_every_file_becomes_a_shard(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert convert() == 0
    said = capsys.readouterr().out
    assert "out: 8 samples in 3 shards; 1 left out" in said
    assert "not used: page (8 samples)" in said
    source = open_format("array_record", "out")
    assert [sample.key for sample in source][2:5] == ["charts/1#3", "charts/2#1", "charts/2#3"]
    assert (source[1].images, source[1].turns) == ((jpeg(1),), (("What?", "dog"),))
    (bad,) = map(json.loads, (folder / "out/data-00001-of-00003.bad.jsonl").read_text().splitlines())
    assert (bad["key"], bad["index"]) == ("charts/2#2", 1)
    assert convert("charts#train", "again") == 0


def test_a_conversion_goes_on_with_the_file_that_could_not_be_read(folder: Path, capsys: pytest.CaptureFixture) -> None:
    path = folder / "charts/data/train-00001-of-00003.parquet"
    content, stat = path.read_bytes(), path.stat()
    path.write_bytes(content[:-200])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert convert() == 2
    error = capsys.readouterr().err
    assert "charts: reading ended after 0 rows of file 2 (" in error
    assert error.strip().count("\n") == 0
    first = folder / "out/data-00000-of-00003.array_record"
    assert sorted(folder.glob("out/*.array_record")) == [first]
    written = first.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert convert() == 0
    assert "out: 8 samples in 3 shards; 1 left out" in capsys.readouterr().out
    assert first.stat().st_mtime_ns == written
    assert convert(out="whole") == 0
    for shard in folder.glob("whole/*.array_record"):
        assert (folder / "out" / shard.name).read_bytes() == shard.read_bytes()


def test_other_files_are_refused(folder: Path, capsys: pytest.CaptureFixture) -> None:
    job = WriteStream(formats.open_stream("charts", Reading()), "out")
    assert convert() == 0
    os.utime(folder / "charts/data/train-00000-of-00003.parquet", (1, 1))
    hub.opened.cache_clear()
    assert convert() == 2
    assert "out: holds a conversion of files that have changed" in capsys.readouterr().err
    (folder / "out/data-00000-of-00003.array_record").unlink()
    with pytest.raises(OSError, match="charts has changed since the conversion began; start again"):
        pickle.loads(pickle.dumps(job))(0)


@pytest.mark.parametrize(
    ("path", "more", "said"),
    [
        (
            "no/such",
            (),
            "no/such: was not saved by Dataset.save_to_disk, and cannot be opened as a data set of the hub",
        ),
        ("charts#test", (), "charts#test: was not saved .* Bad split: test. Available splits: \\['train'\\]"),
        ("charts#small:train", (), "'small' not found"),
        ("charts", ("--shards=2",), "--shards: data of the hub are read as they come; convert them first"),
        ("charts", ("--shuffle=0",), "--shuffle: data of the hub are read as they come"),
        ("charts", ("--estimate",), "--estimate: data of the hub are read as they come"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture, path: str, more: tuple[str, ...], said: str) -> None:
    assert convert(path, "out", *more) == 2
    error = capsys.readouterr().err
    assert re.search(said, error)
    assert error.strip().count("\n") == 0
