"""`python -m navil_jax.data convert`: any format to ArrayRecord, resumable, with what is bad listed."""

import dataclasses
import fcntl
import io
import json
from pathlib import Path

import fsspec
import pytest
from made_data import jpeg, talk, tar_bytes, write_lines
from PIL import Image

from navil_jax.data.__main__ import main
from navil_jax.data.convert import Converted, convert
from navil_jax.data.formats import open_format
from navil_jax.data.sample import Sample, check_index
from navil_jax.data.sources import SOURCES
from navil_jax.errors import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NAVIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclasses.dataclass
class Made:
    """Samples of all sorts: decoded, encoded, files, none."""

    size: int = 10
    fails_at: int = -1
    read: list[int] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        check_index(index, self.size)
        if index == self.fails_at:
            raise KeyboardInterrupt
        self.read.append(index)
        images = ((Image.new("RGB", (4, 6), (index, 0, 0)),), (jpeg(index),), (Path("a.jpg"),), ())[index % 4]
        return Sample(f"made/{index}", images, ((f"q{index}", "a"),), "kind", None if index % 3 else "S")

    def texts(self):
        return iter(())


def test_samples_come_back_in_order(folder: Path) -> None:
    (folder / "a.jpg").write_bytes(jpeg())
    assert convert(Made(), "out", 3) == Converted(3, 10, 0)
    found = open_format("array_record", "out")
    for index, sample in enumerate(Made()):
        assert dataclasses.replace(found[index], images=()) == dataclasses.replace(sample, images=())
    assert Image.open(io.BytesIO(found[4].images[0])).getpixel((0, 0)) == (4, 0, 0)
    assert (found[5].images, found[2].images, found[3].images) == ((jpeg(5),), (jpeg(),), ())


def test_goes_on_after_an_interruption(folder: Path) -> None:
    (folder / "a.jpg").write_bytes(jpeg())
    with pytest.raises(KeyboardInterrupt):
        convert(Made(fails_at=7), "out", 5)
    assert len(list(folder.glob("out/*.array_record"))) == 3
    with pytest.raises(UserError, match="3 of 5 shards"):
        open_format("array_record", "out")
    again = Made()
    convert(again, "out", 5)
    assert again.read == [6, 7, 8, 9]
    whole = Made()
    convert(whole, "whole", 5)
    assert list(open_format("array_record", "out")) == list(open_format("array_record", "whole"))


def test_another_conversion_in_the_folder_is_refused(folder: Path) -> None:
    (folder / "a.jpg").write_bytes(jpeg())
    convert(Made(), "out", 2, origin="a")
    for change in ({"shards": 3}, {"origin": "b"}):
        with pytest.raises(UserError, match="out: holds a conversion of"):
            convert(Made(), "out", **{"shards": 2, "origin": "a", **change})


def test_bad_samples_are_listed(folder: Path) -> None:
    write_lines(folder / "x.jsonl", [{"text": "a"}, b"{", {"text": "b"}, {"image": "no.jpg", "text": "c"}, b"1", b"2"])
    done = convert(open_format("llava", "x.jsonl"), "out", 3)
    assert done == Converted(3, 2, 4)
    assert [s.key for s in open_format("array_record", "out")] == ["x.jsonl:1", "x.jsonl:3"]
    lines = [json.loads(line) for f in sorted(folder.glob("out/*.bad.jsonl")) for line in f.read_text().splitlines()]
    assert [(line["source"], line["key"]) for line in lines] == [("x.jsonl", f"x.jsonl:{n}") for n in (2, 4, 5, 6)]
    assert convert(open_format("llava", "x.jsonl"), "out", 3) == done
    write_lines(folder / "y.jsonl", [b"{", b"{"])
    with pytest.raises(UserError, match="none of 2 samples can be used"):
        convert(open_format("llava", "y.jsonl"), "none", 1)


def test_changed_files_and_other_folders_are_refused(folder: Path) -> None:
    write_lines(folder / "x.jsonl", [{"text": "gren"}, {"text": "b"}])
    convert(open_format("llava", "x.jsonl"), "out", 1)
    write_lines(folder / "x.jsonl", [{"text": "green"[:4]}, {"text": "c"}])  # as many bytes
    with pytest.raises(UserError, match="out: holds a conversion of files that have changed; empty it"):
        convert(open_format("llava", "x.jsonl"), "out", 1)
    (folder / "out" / "conversion.json").unlink()
    with pytest.raises(UserError, match=r"out: holds \*\.array_record of another origin"):
        convert(open_format("llava", "x.jsonl"), "out", 1)


def test_shards_are_made_anew_when_what_was_bad_can_be_used(folder: Path) -> None:
    write_lines(folder / "x.jsonl", [{"text": "a"}, {"image": "late.jpg", "text": "b"}, {"text": "c"}])
    assert convert(open_format("llava", "x.jsonl"), "out", 2) == Converted(2, 2, 1)
    (folder / "late.jpg").write_bytes(jpeg())
    assert convert(open_format("llava", "x.jsonl"), "out", 2) == Converted(2, 3, 0)
    assert [s.turns[0][1] for s in open_format("array_record", "out")] == ["a", "b", "c"]


def test_every_format_converts_alike(folder: Path, capsys: pytest.CaptureFixture) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    system = fsspec.filesystem("memory")
    (folder / "a.jpg").write_bytes(jpeg())
    write_lines(folder / "x.jsonl", [{"image": "a.jpg", "caption": "c"}])
    (folder / "x.tar").write_bytes(tar_bytes({"1.jpg": jpeg(), "1.txt": b"c"}))
    parquet.write_table(pyarrow.table({"jpg": [jpeg()], "txt": ["c"]}), folder / "x.parquet")
    system.pipe_file("/in/x.tar", (folder / "x.tar").read_bytes())
    jobs = {
        "llava": "x.jsonl",
        "webdataset": "memory://in/x.tar",
        "parquet": "x.parquet",
    }
    for kind, path in jobs.items():
        out = f"memory://out/{kind}"
        assert main(["convert", "--from", kind, "--path", path, "--out", out, "--prompt", "P", "--workers", "0"]) == 0
        assert f'SourceConfig("{kind}", kind="array_record", path="{out}")' in capsys.readouterr().out
        (sample,) = open_format("array_record", out)
        assert (sample.images, sample.turns) == ((jpeg(),), (("P", "c"),))


def test_meta_goes_to_a_folder_each(folder: Path, capsys: pytest.CaptureFixture) -> None:
    for name, count in (("a", 3), ("b", 1)):
        write_lines(folder / f"{name}.jsonl", [{"conversations": talk("q", name)}] * count)
    meta = {"a": {"annotation": "a.jsonl"}, "b": {"annotation": "b.jsonl", "repeat_time": 3, "max_dynamic_patch": 2}}
    (folder / "m.json").write_text(json.dumps(meta))
    assert main(["convert", "--from", "meta", "--path", "m.json", "--out", "out"]) == 0
    told = capsys.readouterr().out
    assert 'SourceConfig("a", kind="array_record", path="out/a", weight=0.5)' in told
    assert 'SourceConfig("b", kind="array_record", path="out/b", weight=0.5, repeat=3.0, max_patches=1568)' in told
    assert len(open_format("array_record", "out/a")) == 3


def test_built_in_sources_convert(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "made", lambda split: Made(4))
    (folder / "a.jpg").write_bytes(jpeg())
    assert main(["convert", "--from", "made", "--out", "out", "--shards", "9"]) == 0
    assert len(list(folder.glob("out/*-of-00004.array_record"))) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "lava", "--path", "x", "--out", "o"], "no kind of data named 'lava'; nearest is 'llava'"),
        (["--from", "llava", "--out", "o"], "--path: data of kind llava need a path"),
        (["--from", "llava", "--path", "x.jsonl", "--out", "o"], "x.jsonl: no such file"),
        (["--from", "scenes", "--out", "o", "--shards", "-1"], "--shards: must be at least 1, not -1"),
        (["--from", "scenes", "--out", "o", "--prompt", "x"], "--prompt: has no effect on data of kind scenes"),
        (["--from", "scenes", "--out", "o", "--path", "x"], "--path: has no effect on data of kind scenes"),
        (["--from", "llava", "--path", "x", "--out", "o", "--split", "test"], "--split: has no effect"),
        (["--from", "array_record", "--path", "x", "--out", "o", "--root", "x"], "--root: has no effect"),
        (["--from", "scenes", "--out", ""], "--out: is empty, name a file or folder"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    assert main(["convert", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["convert", "--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("examples:", "--from llava", "webdataset", "goes on where", "bad.jsonl"))


def test_one_conversion_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    source = open_format("llava", str(tmp_path / "x.jsonl"))
    convert(source, str(tmp_path / "out"))
    with open(tmp_path / "out" / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="out: another command writes there"):
            convert(source, str(tmp_path / "out"))
    assert convert(source, str(tmp_path / "out")).samples == 1


def test_held_out_files_that_are_not_there_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "r.py").write_text(
        "from navil_jax.config import *\n"
        f"source = SourceConfig('x', kind='llava', path='{tmp_path}/x.jsonl', held_out='{tmp_path}/none.jsonl')\n"
        "def get_config():\n    return Config(data=DataConfig(sources=(source,)))\n"
    )
    assert main(["preview", "--config", str(tmp_path / "r.py")]) == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err
