"""webdataset tars, parquet files, Hugging Face folders, TFDS and ArrayRecord, and what becomes of broken ones."""

import json
import pickle
import sys
from pathlib import Path
from typing import ClassVar

import fsspec
import grain
import numpy as np
import pytest
from made_data import jpeg, outcomes, talk, tar_bytes

from navil_jax.data.formats import FORMATS, open_format
from navil_jax.data.formats.array_record import pack, shard_name, unpack, write_shard
from navil_jax.data.sample import BadSample, Sample
from navil_jax.errors import UserError

IMAGE = jpeg()
SAMPLES = [
    Sample("k0", (IMAGE, jpeg(90)), (("<image> or <image>?", "a"), ("And?", "é")), "kind", "Be brief."),
    Sample("k1", (), (("q", "x"),)),
    Sample("k2", (IMAGE,), (("q", "y"),), "", ""),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAVIL_CACHE", str(tmp_path / "cache"))


class TestWebDataset:
    MEMBERS: ClassVar = {
        "d/0001.jpg": IMAGE,
        "d/0001.txt": b"A cat.\n",
        "d/0002.0.JPG": IMAGE,
        "d/0002.1.png": IMAGE,
        "d/0002.json": json.dumps({"conversations": talk("<image>, <image>?", "Two.")}).encode(),
        "d/0002.txt": b"not used",
        "d/0003.cls": b"7",
        "d/0003.webp": IMAGE,
        f"e/{'long' * 60}.txt": b"Text alone.",
    }

    def open(self, tmp_path: Path, content: bytes, prompt: str = ""):
        (tmp_path / "w-0.tar").write_bytes(content)
        return open_format("webdataset", str(tmp_path / "w-{0..0}.tar"), prompt=prompt)

    def test_members_of_a_key_are_a_sample(self, tmp_path: Path) -> None:
        source = self.open(tmp_path, tar_bytes(self.MEMBERS), "P")
        assert [s.key for s in source] == [f"w-0.tar/{k}" for k in ("d/0001", "d/0002", "d/0003", f"e/{'long' * 60}")]
        turns = [[("P", "A cat.")], [("<image>, <image>?", "Two.")], [("P", "7")], [("P", "Text alone.")]]
        assert [list(s.turns) for s in source] == turns
        assert [s.images for s in source] == [(IMAGE,), (IMAGE, IMAGE), (IMAGE,), ()]
        assert pickle.loads(pickle.dumps(source))[2] == source[2]

    def test_several_tars_and_addresses(self) -> None:
        system = fsspec.filesystem("memory")
        for number in range(8, 11):
            system.pipe_file(f"/web/{number:02}.tar", tar_bytes({f"{number}.txt": b"x", f"{number}.jpg": IMAGE}))
        source = open_format("webdataset", "memory://web/{08..10}.tar")
        assert [s.key for s in source] == ["08.tar/8", "09.tar/9", "10.tar/10"]
        assert len(list(source.texts())) == 6

    def test_every_cut_is_told_and_no_sample_loses_a_part(self, tmp_path: Path) -> None:
        """Of four samples, cut at every 64 bytes of the third: the first is whole and the last one found is bad."""
        members = {f"{n}.{e}": c for n in range(4) for e, c in (("txt", b"A cat."), ("jpg", IMAGE))}
        whole = tar_bytes(members)
        size = 3 * 512 + -(-len(IMAGE) // 512) * 512  # of a sample
        for cut in range(2 * size, 3 * size, 64):
            *good, bad = outcomes(self.open(tmp_path, whole[:cut]))
            assert 1 <= len(good) <= 2
            assert [(s.key, s.images) for s in good] == [(f"w-0.tar/{n}", (IMAGE,)) for n in range(len(good))]
            assert isinstance(bad, str)
        assert len([s for s in outcomes(self.open(tmp_path, whole)) if isinstance(s, Sample)]) == 4

    def test_a_broken_header_is_told(self, tmp_path: Path) -> None:
        content = bytearray(tar_bytes({f"{n}.txt": b"x" for n in range(5)}))
        content[2 * 1024 + 148 : 2 * 1024 + 156] = b"12345\0 x"  # checksum of the third member
        found = outcomes(self.open(tmp_path, bytes(content)))
        assert isinstance(found[0], Sample)
        assert "nothing behind it in the tar can be read" in found[1]

    @pytest.mark.parametrize(
        ("members", "reason"),
        [
            ({"1.json": b"{"}, "w-0.tar/1.json: not JSON"),
            ({"1.json": b"[]"}, "1.json: a record must be an object, not list"),
            ({"1.txt": b"\xff"}, "not UTF-8 at byte 0"),
            ({"1.jpg": IMAGE}, "has none of conversations"),
            ({"1.json": b'{"url": "http://x", "caption": "c"}'}, "download the images first"),
        ],
    )
    def test_bad_samples(self, tmp_path: Path, members: dict[str, bytes], reason: str) -> None:
        bad, good = outcomes(self.open(tmp_path, tar_bytes({**members, "2.txt": b"x"})))
        assert reason in bad
        assert good.turns == (("", "x"),)

    def test_no_tar(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"is compressed \(gz\); unpack it first"):
            self.open(tmp_path, b"\x1f\x8b" + bytes(range(256)) * 4)
        with pytest.raises(UserError, match="is no tar file"):
            self.open(tmp_path, bytes(range(1, 256)) * 4)
        with pytest.raises(UserError, match="has no samples"):
            self.open(tmp_path, tar_bytes({}))


class TestParquet:
    def write(self, path: Path, columns: dict, **options: object) -> str:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table(columns), path, **options)
        return str(path)

    def test_rows_of_any_row_group(self, tmp_path: Path) -> None:
        captions = [f"c{i}" for i in range(10)]
        for name in ("a.parquet", "b.parquet"):
            self.write(
                tmp_path / name, {"image": [IMAGE] * 10, "caption": captions, "other": captions}, row_group_size=3
            )
        source = open_format("parquet", str(tmp_path), prompt="P")
        order = [19, 0, 7, 3, 12, 9]
        assert [source[i].turns[0] for i in order] == [("P", f"c{i % 10}") for i in order]
        assert [source[i].key for i in (0, 19)] == ["a.parquet#1", "b.parquet#10"]
        assert pickle.loads(pickle.dumps(source))[5] == source[5]

    def test_two_row_groups_are_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from pyarrow.parquet import ParquetFile

        path = self.write(tmp_path / "a.parquet", {"text": [f"{i}" for i in range(100)]}, row_group_size=5)
        read, read_row_group = [], ParquetFile.read_row_group

        def counted(file: ParquetFile, group: int, **options: object) -> object:
            read.append(group)
            return read_row_group(file, group, **options)

        monkeypatch.setattr(ParquetFile, "read_row_group", counted)
        source = open_format("parquet", path)
        assert [int(s.turns[0][1]) for s in source] == list(range(100))
        assert read == list(range(20))
        for index, reads in ((94, 20), (99, 20), (89, 21), (99, 21), (94, 22)):
            assert source[index].turns[0][1] == f"{index}"
            assert len(read) == reads, index

    def test_conversations_and_structs(self, tmp_path: Path) -> None:
        rows = {
            "images": [[{"bytes": IMAGE, "path": "x"}] * 2, []],
            "conversations": [talk("<image><image>?", "a"), talk("q", "b")],
            "system": ["s", None],
        }
        source = open_format("parquet", self.write(tmp_path / "a.parquet", rows))
        assert [(len(s.images), s.turns, s.system) for s in source] == [
            (2, (("<image><image>?", "a"),), "s"),
            (0, (("q", "b"),), None),
        ]

    def test_threads_read_together(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "a.parquet", {"text": [f"{i}" for i in range(200)]}, row_group_size=7)
        data = grain.MapDataset.source(open_format("parquet", path)).shuffle(seed=1)
        read = data.to_iter_dataset(grain.ReadOptions(num_threads=8, prefetch_buffer_size=32))
        assert sorted(int(s.turns[0][1]) for s in read) == list(range(200))

    def test_mistakes(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "a.parquet", {"image": [IMAGE], "words": ["x"]})
        with pytest.raises(UserError, match=r"no column of conversations, .*; the columns are image, words"):
            open_format("parquet", path)
        path = self.write(tmp_path / "a.parquet", {"url": ["http://x"], "caption": ["x"]})
        with pytest.raises(UserError, match="addresses of images only"):
            open_format("parquet", path)
        Path(path).write_bytes(Path(path).read_bytes()[:-20])
        with pytest.raises(UserError, match=r"a\.parquet: cannot be read as parquet"):
            open_format("parquet", path)
        path = self.write(tmp_path / "a.parquet", {"image": [IMAGE] * 2, "caption": [float("nan"), 2.5]})
        bad, number = outcomes(open_format("parquet", path))
        assert "has none of" in bad
        assert number.turns[0][1] == "2.5"
        path = self.write(tmp_path / "a.parquet", {"image": [None, IMAGE], "caption": ["x", None]})
        text, bad = outcomes(open_format("parquet", path))
        assert text.images == ()
        assert "has none of" in bad

    def test_a_broken_row_group_spoils_its_own_rows(self, tmp_path: Path) -> None:
        path = Path(
            self.write(tmp_path / "a.parquet", {"text": ["a" * 50, "b" * 50]}, row_group_size=1, use_dictionary=False)
        )
        content = bytearray(path.read_bytes())
        content[4:30] = b"\0" * 26
        path.write_bytes(content)
        bad, good = outcomes(open_format("parquet", str(path)))
        assert "row group 0 is broken" in bad
        assert good.turns == (("", "b" * 50),)

    def test_addresses(self, tmp_path: Path) -> None:
        content = Path(self.write(tmp_path / "a.parquet", {"text": ["a", "b"]})).read_bytes()
        fsspec.filesystem("memory").pipe_file("/pq/a.parquet", content)
        assert [s.turns[0][1] for s in open_format("parquet", "memory://pq")] == ["a", "b"]


class TestHuggingFace:
    def test_saved_folder(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        rows = {"image": [{"bytes": IMAGE, "path": None}] * 2, "text": ["a", "b"], "more": [1, 2]}
        data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        data.save_to_disk(tmp_path / "one")
        source = open_format("huggingface", str(tmp_path / "one"), prompt="P")
        assert [(s.key, s.images, s.turns) for s in source] == [
            ("one#1", (IMAGE,), (("P", "a"),)),
            ("one#2", (IMAGE,), (("P", "b"),)),
        ]
        datasets.DatasetDict({"train": data, "validation": data}).save_to_disk(tmp_path / "two")
        with pytest.raises(UserError, match=r"holds the splits train, validation; give one .*two/train"):
            open_format("huggingface", str(tmp_path / "two"))
        assert len(open_format("huggingface", str(tmp_path / "two" / "validation"))) == 2
        with pytest.raises(UserError, match=r"no folder of Dataset\.save_to_disk"):
            open_format("huggingface", str(tmp_path))

    def test_classes_are_their_names(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        feature = datasets.ClassLabel(names=["cat", "dog"])
        features = datasets.Features({"question": datasets.Value("string"), "answer": feature})
        data = datasets.Dataset.from_dict({"question": ["q"] * 3, "answer": [1, 0, None]}, features=features)
        data.save_to_disk(tmp_path / "saved")
        data.to_parquet(tmp_path / "a.parquet")
        for kind, name in (("huggingface", "saved"), ("parquet", "a.parquet")):
            dog, cat, none = outcomes(open_format(kind, str(tmp_path / name)))
            assert (dog.turns, cat.turns) == ((("q", "dog"),), (("q", "cat"),))
            assert none == "answer: must be text, not NoneType"

    def test_images_in_parts_of_messages(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        part = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
        features = datasets.Features(
            {"messages": datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)})}
        )
        parts = [{"type": "image", "text": None, "image": {"bytes": IMAGE, "path": None}}]
        parts += [{"type": "text", "text": "Which?", "image": None}]
        answer = [{"type": "text", "text": "Red.", "image": None}]
        talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        data = datasets.Dataset.from_dict({"messages": [talk]}, features=features)
        data.save_to_disk(tmp_path / "saved")
        data.to_parquet(tmp_path / "a.parquet")
        for kind, name in (("huggingface", "saved"), ("parquet", "a.parquet")):
            (sample,) = open_format(kind, str(tmp_path / name))
            assert (sample.images, sample.turns) == ((IMAGE,), (("<image>Which?", "Red."),))

    def test_videos_are_not_passed_over(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        features = datasets.Features({"video": datasets.Video(decode=False), "caption": datasets.Value("string")})
        rows = {"video": [{"bytes": b"x", "path": "a.mp4"}, None], "caption": ["x", "y"]}
        data = datasets.Dataset.from_dict(rows, features=features)
        data.save_to_disk(tmp_path / "saved")
        data.to_parquet(tmp_path / "a.parquet")
        for kind, name in (("huggingface", "saved"), ("parquet", "a.parquet")):
            bad, good = outcomes(open_format(kind, str(tmp_path / name)))
            assert "video" in bad
            assert good.turns == (("", "y"),)


class TestTfds:
    def test_classes_are_their_names(self, tmp_path: Path) -> None:
        tfds = pytest.importorskip("tensorflow_datasets")
        from navil_jax.data.formats.tfds import plain

        named = tfds.features.ClassLabel(names=["cat", "dog"])
        features = tfds.features.FeaturesDict(
            {"answer": named, "all": tfds.features.Sequence(named), "box": {"side": tfds.features.Scalar(np.int64)}}
        )
        found = plain(features, {"answer": 1, "all": [0, 1], "box": {"side": 7}})
        assert found == {"answer": "dog", "all": ["cat", "dog"], "box": {"side": 7}}

    def test_there_and_back(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorflow_datasets")
        from navil_jax.data.formats.tfds import prepare

        path = prepare(SAMPLES, str(tmp_path), "made")
        source = open_format("tfds", path)
        assert sorted(source, key=lambda sample: sample.key) == SAMPLES
        assert pickle.loads(pickle.dumps(source))[0] == source[0]
        assert len(open_format("tfds", path + "#train[:2]")) == 2
        assert "tensorflow" not in sys.modules
        with pytest.raises(UserError, match="cannot be read as TFDS"):
            open_format("tfds", path + "#test")
        with pytest.raises(UserError, match="cannot be read as TFDS"):
            open_format("tfds", str(tmp_path))


class TestArrayRecord:
    def write(self, folder: Path, shards: int = 3) -> str:
        folder.mkdir()
        for number in range(shards):
            write_shard(str(folder / shard_name(number, shards)), [pack(SAMPLES[number])])
        return str(folder)

    def test_there_and_back(self, tmp_path: Path) -> None:
        source = open_format("array_record", self.write(tmp_path / "x"))
        assert list(source) == SAMPLES
        assert list(pickle.loads(pickle.dumps(source))) == SAMPLES
        assert list(source.texts()) == ["<image> or <image>?", "a", "And?", "é", "q", "x", "q", "y"]

    def test_a_missing_shard_is_told(self, tmp_path: Path) -> None:
        folder = self.write(tmp_path / "x")
        (tmp_path / "x" / shard_name(1, 3)).unlink()
        with pytest.raises(UserError, match="2 of 3 shards of data; run the conversion again"):
            open_format("array_record", folder)
        assert len(open_format("array_record", f"{folder}/{shard_name(0, 3)}")) == 1

    def test_broken_files(self, tmp_path: Path) -> None:
        folder = self.write(tmp_path / "x")
        shard = tmp_path / "x" / shard_name(0, 3)
        content = shard.read_bytes()
        shard.write_bytes(content[:-100])
        with pytest.raises(UserError, match="cannot be read as ArrayRecord"):
            open_format("array_record", folder)
        place = content.index(b"k0")
        shard.write_bytes(content[:place] + b"!!" + content[place + 2 :])
        bad, *good = outcomes(open_format("array_record", folder))
        assert "the file is broken here" in bad
        assert good == SAMPLES[1:]

    @pytest.mark.parametrize(
        "record", [b"", b"\x02" + pack(SAMPLES[0])[1:], b"\x01\xc1", pack(SAMPLES[0])[:-3], b"\x01\x07"]
    )
    def test_other_records(self, tmp_path: Path, record: bytes) -> None:
        with pytest.raises(ValueError, match="record"):
            unpack(record)
        write_shard(str(tmp_path / "x.array_record"), [record, pack(SAMPLES[1])])
        source = open_format("array_record", str(tmp_path / "x.array_record"))
        with pytest.raises(BadSample, match=r"x\.array_record#1"):
            source[0]
        assert source[1] == SAMPLES[1]


@pytest.mark.parametrize("kind", ["parquet", "huggingface", "tfds"])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    package = {"parquet": "pyarrow", "huggingface": "datasets", "tfds": "tensorflow_datasets"}[kind]
    for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"navil_jax.data.formats.{FORMATS[kind][0]}", raising=False)
    monkeypatch.delitem(sys.modules, "navil_jax.data.formats.parquet", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=rf"pip install {package.replace('_', '-')}"):
        open_format(kind, str(tmp_path))
