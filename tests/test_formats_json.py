"""JSON lines, JSON arrays, their offset index, and meta files."""

import dataclasses
import errno
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from made_data import jpeg, outcomes, talk, write_lines

from navil_jax.config import Config, DataConfig, ImageConfig, ModelConfig, SourceConfig, VisionConfig, validate
from navil_jax.data.formats import files, open_format
from navil_jax.data.formats.index import SUFFIX, FileIndex
from navil_jax.data.formats.record_images import IMAGE_FIELDS
from navil_jax.data.formats.record_text import TEXT_FIELDS, conversation
from navil_jax.data.formats.records import to_sample
from navil_jax.data.formats.scan_json import scan_array, scan_lines
from navil_jax.data.sample import BadSample, Sample, usable_samples
from navil_jax.data.sources import expand_meta, expand_sources, for_source, open_source
from navil_jax.errors import UserError

GOOD = {"image": "a.jpg", "conversations": talk("<image>\nWhat?", "A cat.", "Sure?", "Yes.", system="Be brief.")}
TEXT_ONLY = {"id": 3, "conversations": talk("Hi", "Hello")}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NAVIL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jpg").write_bytes(jpeg())
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 5\n", "is a pointer of Git LFS"),
        (b"\xef\xbb\xbf\n<!doctype HTML><html>", "is a web page"),
    ],
)
def test_files_that_are_no_lines_of_records_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=reason):
        open_format("llava", str(tmp_path / "x.jsonl"))


def test_a_folder_of_images_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    for root in ("nowhere", "x.jsonl"):
        with pytest.raises(UserError, match=rf"{root}: no such folder of images"):
            open_format("llava", str(tmp_path / "x.jsonl"), str(tmp_path / root))


@pytest.mark.parametrize(
    ("settings", "held_out", "reason"),
    [
        ({"repeat_time": 10**400}, "", "a.repeat_time: must be above 0 and at most"),
        ({"length": 10**400}, "", "a.length: must be at least 1"),
        ({}, "meta.json", "source m: held_out has no effect on a source of kind meta"),
    ],
)
def test_meta_files_are_used_whole_or_refused(tmp_path: Path, settings: dict, held_out: str, reason: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "meta.json").write_text(json.dumps({"a": {"annotation": "a.jsonl", **settings}}))
    with pytest.raises(UserError, match=reason):
        expand_meta(SourceConfig("m", kind="meta", path=str(tmp_path / "meta.json"), held_out=held_out))


def test_lines_and_array_hold_the_same_samples(tmp_path: Path) -> None:
    two = {"image": ["a.jpg", "a.jpg"], "conversations": talk("First <image>, then <image>?", "Same.")}
    records = [GOOD, TEXT_ONLY, two, {"image": "a.jpg", "caption": "A cat."}, {"text": "Long ago."}]
    lines = open_format("llava", write_lines(tmp_path / "x.jsonl", records))
    (tmp_path / "x.json").write_text(json.dumps(records, indent=2))
    array = open_format("llava", str(tmp_path / "x.json"))
    turns = (("<image>\nWhat?", "A cat."), ("Sure?", "Yes."))
    assert lines[0] == Sample("x.jsonl:1", (jpeg(),), turns, "", "Be brief.")
    assert array[0].key == "x.json#1"
    assert [s.images for s in lines] == [(jpeg(),), (), (jpeg(), jpeg()), (jpeg(),), ()]
    assert lines[3].turns == (("Describe the picture.", "A cat."),)
    assert lines[4].turns == (("", "Long ago."),)
    content = [(s.images, s.turns, s.system) for s in lines]
    assert [(s.images, s.turns, s.system) for s in array] == content
    assert [(s.images, s.turns, s.system) for s in pickle.loads(pickle.dumps(lines))] == content
    assert list(lines.texts())[:4] == ["<image>\nWhat?", "A cat.", "Sure?", "Yes."]


BAD = [
    (b"{broken", "not JSON: Expecting property name enclosed in double quotes at character 2"),
    (b'{"text": "\xff\xfe"}', "not UTF-8 at byte 10"),
    (b"", "the line is empty"),
    (b"[1]", "a record must be an object, not list"),
    ({"image": "a.jpg"}, "has none of conversations, messages, texts"),
    ({"image": "none.jpg", "text": "x"}, "no such file"),
    ({"image": "http://x.org/a.jpg", "text": "x"}, "download it first"),
    ({"image": [None, "a.jpg"], "text": "x"}, "image: image 1 of 2 is empty; an image must be a path"),
    ({"image": 3, "text": "x"}, "an image must be a path or encoded bytes, not int"),
    ({"image": "a.jpg", "conversations": talk("<image> <image>", "x")}, "1 images but <image> stands 2 times"),
    ({"conversations": talk("<image>", "x")}, "0 images but <image> stands 1 times"),
    ({"conversations": talk("q", "a", "q")}, "conversations: the last question has no answer"),
    ({"conversations": talk("q", " ")}, "conversations: answer 1 is empty"),
    ({"conversations": []}, "conversations: must be a list with at least one entry"),
    ({"conversations": talk("q", "a")[::-1]}, "conversations 1: is of assistant where user is due"),
    ({"conversations": [{"from": "robot", "value": "x"}]}, "conversations 1: unknown role 'robot'"),
    ({"conversations": [{"from": "human"}]}, "conversations 1: must be an object with from and value"),
    ({"conversations": [{"from": "human", "value": None}]}, "conversations 1: must be text, not NoneType"),
    ({"conversations": talk("q", "\ud800")}, "half a surrogate pair"),
    (b"[" * 100_000, "nested too deeply"),
    ({"image": "a" * 5000, "text": "x"}, "File name too long"),
    ({"image": ".", "text": "x"}, "Is a directory"),
    ({"image": "nothing://a.jpg", "text": "x"}, "nothing://"),
    ({"question": "q"}, "answer: must be text, not NoneType"),
]


def test_bad_lines_are_named_and_the_others_are_used(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [*(record for record, _ in BAD), TEXT_ONLY])
    source = open_format("llava", path)
    *bad, good = outcomes(source)
    assert [(wanted in found, found) for found, (_, wanted) in zip(bad, BAD, strict=True)] == [(True, f) for f in bad]
    assert good == Sample(f"x.jsonl:{len(BAD) + 1}", (), (("Hi", "Hello"),))
    with pytest.raises(BadSample) as caught:
        source[1]
    assert (caught.value.source, caught.value.key) == (path, "x.jsonl:2")
    assert str(pickle.loads(pickle.dumps(caught.value))) == f"x.jsonl:2: not UTF-8 at byte 10 ({path})"
    assert list(usable_samples(source)) == [good]
    with pytest.raises(IndexError):
        source[len(source)]


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=4)
    | st.sampled_from(["human", "gpt", "<image>", "a.jpg"]),
    lambda v: (
        st.lists(v, max_size=3)
        | st.dictionaries(
            st.sampled_from(["from", "value", "role", "content", "type", "text", "bytes", "path"]), v, max_size=3
        )
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    _VALUES | st.dictionaries(st.sampled_from([*IMAGE_FIELDS, *TEXT_FIELDS, "system", "kind", "key", "url"]), _VALUES)
)
def test_any_record_is_a_sample_or_bad(tmp_path_factory: pytest.TempPathFactory, record: object) -> None:
    """Nothing but `BadSample` leaves a record, whatever JSON it is."""
    source = open_format("llava", write_lines(tmp_path_factory.mktemp("any") / "x.jsonl", [record]))
    (found,) = outcomes(source)
    assert list(source.texts()) or isinstance(found, str)


def test_a_failing_disk_is_no_fault_of_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_format("llava", write_lines(tmp_path / "x.jsonl", [GOOD]))

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "read_file", fail)
    with pytest.raises(OSError, match="Input/output error"):
        source[0]


def test_bad_elements_of_an_array_are_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[\n{"text": "a"},\n{"text": tru},\n\n{"text": 7,\n "image": "no.jpg"}\n]\n')
    found = outcomes(open_format("llava", str(tmp_path / "x.json")))
    assert found[1] == "line 3: not JSON: Expecting value at character 10"
    assert found[2].startswith("line 5: no such file")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", "", "has no samples"),
        ("x.jsonl", " \n\n", "has no samples"),
        ("x.json", "", "is empty, a JSON array is needed"),
        ("x.json", "[]", "has no samples"),
        ("x.json", '{"a": 1}', "is no JSON array of samples; name files of one sample a line"),
        ("x.json", '[{"a": [1}', "does not end; the file is cut off or lacks a bracket"),
        ("x.json", '[{"a": "]}', "does not end"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        open_format("llava", str(tmp_path / name))
    assert name in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        open_format("llava", str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match=r"the folder has no files \.tar, but "):
        open_format("webdataset", str(tmp_path))
    if not importlib.util.find_spec("gcsfs"):
        with pytest.raises(UserError, match=r"gs://: .*install gcsfs"):
            open_format("llava", "gs://bucket/x.jsonl")
    with pytest.raises(UserError, match="nothing://"):
        open_format("llava", "nothing://x.jsonl")


class TestIndex:
    @settings(max_examples=60, deadline=None)
    @given(lines=st.lists(st.binary(max_size=6).map(lambda b: b.replace(b"\n", b"")), max_size=8), end=st.booleans())
    def test_ranges_are_the_lines(self, tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], end: bool):
        content = b"\n".join(lines) + b"\n" * end
        path = tmp_path_factory.mktemp("lines") / "x.jsonl"
        path.write_bytes(content)
        assume(content.strip() and 0 < content[0] < 128 and content[:2] not in (b"{\0", b"[\0"))
        assume(not files.compression(content))
        path = tmp_path_factory.mktemp("lines") / "x.jsonl"
        path.write_bytes(content)
        assume(content.strip() and content[0] < 128 and content[:2] not in (b"\x1f\x8b", b"BZ", b"PK", b"{\0", b"[\0"))
        assume(content[:1] != b"\0")
        wanted = content.rstrip().split(b"\n")
        index = FileIndex(str(path), "lines", scan_lines)
        found = [content[slice(*index[i])] for i in range(len(index))]
        assert [line.removesuffix(b"\n") for line in found] == wanted

    @pytest.mark.parametrize("content", [b"", b"\n", b" \n\n "])
    def test_a_file_without_lines_is_refused(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "x.jsonl"
        path.write_bytes(content)
        with pytest.raises(UserError, match="no samples"):
            FileIndex(str(path), "lines", scan_lines)

    @settings(max_examples=30, deadline=None)
    @given(
        st.lists(
            st.recursive(st.text() | st.none() | st.integers(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)),
            min_size=1,
        )
    )
    def test_ranges_are_the_elements(self, tmp_path_factory: pytest.TempPathFactory, values: list):
        for options in ({}, {"indent": 1}, {"separators": (",", ":"), "ensure_ascii": False}):
            path = tmp_path_factory.mktemp("array") / "x.json"
            content = json.dumps(values, **options).encode()
            path.write_bytes(content)
            index = FileIndex(str(path), "array", scan_array)
            cut = [content[slice(*index[i])].strip().removesuffix(b",") for i in range(len(index))]
            assert [json.loads(element) for element in cut] == values

    def test_is_used_again_until_the_file_changes(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "x.jsonl", [{"text": "a"}])
        assert len(open_format("llava", path)) == 1
        written = os.stat(path + SUFFIX).st_mtime_ns
        assert len(open_format("llava", path)) == 1
        assert os.stat(path + SUFFIX).st_mtime_ns == written
        write_lines(tmp_path / "x.jsonl", [{"text": "bb"}, {"text": "c"}])
        assert [s.turns[0][1] for s in open_format("llava", path)] == ["bb", "c"]
        status = os.stat(path)
        write_lines(tmp_path / "x.jsonl", [{"text": "c"}, {"text": "bb"}])  # as long, with another time
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert [s.turns[0][1] for s in open_format("llava", path)] == ["c", "bb"]

    def test_an_index_is_no_data(self, tmp_path: Path) -> None:
        write_lines(tmp_path / "x.jsonl", [{"text": "a"}])
        for _ in range(2):
            assert len(open_format("llava", str(tmp_path / "x*"))) == 1

    def test_cut_off_or_foreign_is_written_anew(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "x.jsonl", [{"text": "a"}, {"text": "b"}])
        whole = Path(FileIndex(path, "lines", scan_lines).file).read_bytes()
        for broken in (whole[:-8], whole[:10], b"", b"x" * len(whole)):
            Path(path + SUFFIX).write_bytes(broken)
            assert len(FileIndex(path, "lines", scan_lines)) == 2
            assert Path(path + SUFFIX).read_bytes() == whole

    def test_a_file_that_shrinks_while_in_use_is_told(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "x.jsonl", [{"text": "a"}, {"text": "b"}])
        source = open_format("llava", path)
        write_lines(tmp_path / "x.jsonl", [{"text": "a"}])
        with pytest.raises(OSError, match="has changed since it was opened"):
            source[1]

    def test_a_file_of_another_content_is_not_read_with_the_old_index(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "x.jsonl", [{"text": "a"}, {"text": "b"}])
        source = open_format("llava", path)
        os.utime(path, ns=(0, 0))  # the same content
        assert [s.turns[0][1] for s in source] == ["a", "b"]
        write_lines(tmp_path / "x.jsonl", [{"text": "b"}, {"text": "a"}])
        with pytest.raises(OSError, match="has changed since it was opened"):
            source[0]
        write_lines(tmp_path / "x.jsonl", [{"text": "c"}, {"text": "d"}])
        os.utime(path, ns=(0, 0))  # as the index knows it
        assert [s.turns[0][1] for s in open_format("llava", path)] == ["c", "d"]

    def test_goes_to_the_cache_where_the_folder_is_read_only(
        self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write_lines(tmp_path / "x.jsonl", [{"text": "a"}])
        access = os.access
        monkeypatch.setattr(os, "access", lambda p, mode: str(p) != str(tmp_path) and access(p, mode))
        assert FileIndex(path, "lines", scan_lines).file.startswith(str(cache))
        assert not Path(path + SUFFIX).exists()

    @pytest.mark.slow
    def test_memory_is_flat(self, tmp_path: Path) -> None:
        """200,000 lines of 1 KB (200 MB) are indexed and read with a few MB above the imports."""
        path = tmp_path / "x.jsonl"
        line = json.dumps({"text": "x" * 1000}).encode() + b"\n"
        with open(path, "wb") as file:
            for _ in range(200):
                file.write(line * 1000)
        code = (
            "import resource, sys\n"
            "from navil_jax.data.formats.llava import Llava\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
            "before = peak()\n"
            "source = Llava(sys.argv[1])\n"
            "assert len(source) == 200_000\n"
            "assert all(len(source[i].turns[0][1]) == 1000 for i in range(0, 200_000, 97))\n"
            "print(peak() - before)\n"
        )
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
        assert int(done.stdout) < 64


def test_addresses_work_like_paths(cache: Path) -> None:
    system = fsspec.filesystem("memory")
    system.pipe_file("/bucket/img/a.jpg", jpeg())
    for name in ("x.jsonl", "y.jsonl"):
        system.pipe_file(f"/bucket/{name}", (json.dumps(GOOD) + "\n" + json.dumps(TEXT_ONLY)).encode())
    source = open_format("llava", "memory://bucket/*.jsonl", root="memory://bucket/img")
    assert [s.key for s in source] == ["x.jsonl:1", "x.jsonl:2", "y.jsonl:1", "y.jsonl:2"]
    assert source[2].images == (jpeg(),)
    assert len(list(cache.glob("*" + SUFFIX))) == 2
    system.pipe_file("/bucket/x.jsonl", b'{"text": "new"}')
    assert [s.turns for s in open_format("llava", "memory://bucket/x.jsonl")] == [(("", "new"),)]
    system.pipe_file("/bucket/z.json", json.dumps([TEXT_ONLY, TEXT_ONLY]).encode())
    assert len(open_format("llava", "memory://bucket/z.json")) == 2


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
            ]
        },
        {"texts": [{"user": "<image>q", "assistant": "a", "source": "x"}]},
        {"turns": [["<image>q", "a"]]},
        {"question": "<image>q", "answer": "a"},
        {"question": b"<image>q", "answer": b"a"},
    ],
)
def test_ways_to_write_a_conversation(record: dict) -> None:
    said = conversation(record)
    assert (said.system, said.turns) == (None, [("<image>q", "a")])
    assert to_sample({"images": [{"bytes": jpeg(), "path": None}], **record}, "k").images == (jpeg(),)


META = {
    "a": {"root": "img", "annotation": "a.jsonl", "repeat_time": 2, "length": 400, "max_dynamic_patch": 12},
    "b": {"annotation": "b.jsonl", "repeat_time": 0.5, "data_augment": True, "conv_style": "x"},
}


def config_of(path: Path, **settings: object) -> Config:
    return Config(
        data=DataConfig(sources=(SourceConfig("m", 3.0, "meta", str(path), **settings), SourceConfig("scenes")))
    )


class TestMeta:
    def test_becomes_sources_with_their_settings(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "m.json").write_text(json.dumps(META))
        (tmp_path / "img").mkdir()
        write_lines(tmp_path / "b.jsonl", [TEXT_ONLY] * 40)
        write_lines(tmp_path / "a.jsonl", [GOOD] * 30)
        config = expand_sources(config_of(tmp_path / "m.json", prompt="P", loss_weight="token"))
        a, b, scenes = config.data.sources
        assert (a.name, a.kind, a.path, a.root) == ("a", "llava", str(tmp_path / "a.jsonl"), str(tmp_path / "img"))
        assert (a.weight, b.weight) == (3 * 60 / 80, 3 * 20 / 80)
        assert (a.repeat, b.repeat, a.transforms, b.transforms) == (2.0, 0.5, (), ("jpeg",))
        assert (a.max_patches, b.max_patches, a.prompt, b.loss_weight) == (12 * 784, None, "P", "token")
        assert scenes == SourceConfig("scenes")
        assert "b: conv_style not used" in caplog.text
        assert f"a.length: 400, but {a.path} has 30 samples, which count" in caplog.text
        assert len(open_source(b, "train")) == 40
        assert len(open_source(config_of(tmp_path / "m.json").data.sources[0], "train")) == 70
        validate(config)

    @pytest.mark.parametrize(
        ("switch", "own", "expected"),
        [
            (True, (), ("jpeg",)),
            (True, ("resolution", "jpeg"), ("resolution", "jpeg")),
            (False, ("resolution",), ()),
            (None, ("resolution",), ("resolution",)),
        ],
    )
    def test_data_augment_switches_the_transforms_of_the_recipe(
        self, tmp_path: Path, switch: bool | None, own: tuple[str, ...], expected: tuple[str, ...]
    ) -> None:
        settings = {"annotation": "a.jsonl", "length": 1} | ({} if switch is None else {"data_augment": switch})
        write_lines(tmp_path / "a.jsonl", [TEXT_ONLY])
        (tmp_path / "m.json").write_text(json.dumps({"a": settings}))
        config = expand_sources(config_of(tmp_path / "m.json", transforms=own))
        assert config.data.sources[0].transforms == expected

    @pytest.mark.parametrize(("patch_size", "patches"), [(14, 2048), (16, 1568), (32, 392)])
    def test_tiles_are_counted_in_the_patches_of_the_model(self, tmp_path: Path, patch_size: int, patches: int) -> None:
        write_lines(tmp_path / "a.jsonl", [TEXT_ONLY])
        (tmp_path / "m.json").write_text('{"a": {"annotation": "a.jsonl", "length": 1, "max_dynamic_patch": 2}}')
        model = ModelConfig(vision=VisionConfig(patch_size=patch_size))
        config = dataclasses.replace(config_of(tmp_path / "m.json"), model=model)
        assert expand_sources(config).data.sources[0].max_patches == patches

    def test_a_part_must_fit_the_config(self, tmp_path: Path) -> None:
        write_lines(tmp_path / "a.jsonl", [TEXT_ONLY])
        (tmp_path / "m.json").write_text('{"a": {"annotation": "a.jsonl", "length": 1, "max_dynamic_patch": 1}}')
        config = dataclasses.replace(config_of(tmp_path / "m.json"), images=ImageConfig(min_patches=1024))
        message = r"sources\.0\.max_patches of 'a': 784 is below images\.min_patches = 1024 \(sources .*: a, scenes\)"
        with pytest.raises(UserError, match=message):
            expand_sources(config)

    def test_an_annotation_may_be_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "parts").mkdir()
        for name in "xy":
            write_lines(tmp_path / "parts" / f"{name}.jsonl", [TEXT_ONLY] * 2)
        (tmp_path / "m.json").write_text('{"a": {"annotation": "parts"}, "b": {"annotation": "parts/x.jsonl"}}')
        source = open_source(config_of(tmp_path / "m.json").data.sources[0], "train")
        assert [s.key for s in source] == ["x.jsonl:1", "x.jsonl:2", "y.jsonl:1", "y.jsonl:2", "x.jsonl:1", "x.jsonl:2"]
        assert len(list(source.texts())) == 12

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "not JSON"),
            ("[]", "must be an object of sources"),
            ('{"a": 1}', "a: must be an object with root, annotation"),
            ('{"a": {"root": "x"}}', "a: annotation is missing"),
            ('{"a": {"annotation": "x", "repeat_time": "2"}}', "a.repeat_time: '2' is of the wrong type"),
            ('{"a": {"annotation": "x", "length": true}}', "a.length: True is of the wrong type"),
            ('{"a": {"annotation": "x", "repeat_time": 0}}', "a.repeat_time: must be above 0"),
            ('{"a": {"annotation": "x", "repeat_time": NaN}}', "a.repeat_time: must be .*, not nan"),
            ('{"a": {"annotation": "x", "repeat_time": 1e308}}', "a.repeat_time: must be .*, not 1e.308"),
            ('{"": {"annotation": "x"}}', "a source has no name"),
            ('{"a": {"annotation": "x"}, "a": {"annotation": "y"}}', "'a' stands twice in one object"),
            (
                '{"a": {"annotation": "x", "repeat_times": 2}}',
                "a.repeat_times: no such setting; nearest is repeat_time",
            ),
            ('{"a": {"annotation": "x"}}'.encode("utf-16").decode("latin-1"), "is UTF-16"),
        ],
    )
    def test_mistakes(self, tmp_path: Path, content: str, message: str) -> None:
        (tmp_path / "m.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(UserError, match=message) as caught:
            expand_sources(config_of(tmp_path / "m.json"))
        assert "m.json" in str(caught.value)


def test_two_sources_of_one_name_are_refused(tmp_path: Path) -> None:
    one, other = (SourceConfig("web", kind="llava", path=f"{name}.jsonl") for name in "ab")
    with pytest.raises(UserError, match=r"0 \(a\.jsonl\) and 1 \(b\.jsonl\) are both called 'web'"):
        expand_sources(Config(data=DataConfig(sources=(one, other))))
    write_lines(tmp_path / "a.jsonl", [TEXT_ONLY])
    (tmp_path / "m.json").write_text('{"web": {"annotation": "a.jsonl"}}')
    parts = SourceConfig("m", kind="meta", path=str(tmp_path / "m.json"))
    with pytest.raises(UserError, match=r"are both called 'web'; give them different names"):
        expand_sources(Config(data=DataConfig(sources=(parts, other))))


def test_settings_of_a_source() -> None:
    own = SourceConfig("scenes", system_message="", loss_weight="token", max_patches=512)
    config = Config(data=DataConfig(sources=(SourceConfig("scenes"), own), system_message="S"))
    assert for_source(config, 0) == config
    changed = for_source(config, 1)
    assert (changed.data.system_message, changed.data.loss_weight, changed.images.max_patches) == ("", "token", 512)
    assert changed.data.sources == config.data.sources


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (SourceConfig("x", kind="lava", path="y"), "no kind of data named 'lava'; nearest is 'llava'"),
        (SourceConfig("sceens"), "nearest is 'scenes'"),
        (SourceConfig("x", kind="llava", path="/nowhere/y.jsonl"), "/nowhere/y.jsonl: no such file"),
    ],
)
def test_sources_that_cannot_be_opened(entry: SourceConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(entry, "train")


def test_held_out_samples_have_a_path_of_their_own(tmp_path: Path) -> None:
    train, test = (write_lines(tmp_path / f"{n}.jsonl", [TEXT_ONLY] * n) for n in (3, 2))
    entry = SourceConfig("x", kind="llava", path=train, held_out=test)
    assert [len(open_source(entry, split)) for split in ("train", "test")] == [3, 2]
    with pytest.raises(UserError, match="no held-out samples; give their path as held_out"):
        open_source(SourceConfig("x", kind="llava", path=train), "test")


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        (SourceConfig("x", kind="llava"), "path"),
        (SourceConfig("x", path="y.jsonl"), "kind"),
        (SourceConfig("x", repeat=0.0), "repeat"),
        (SourceConfig("x", max_patches=3), "max_patches"),
    ],
)
def test_settings_that_cannot_be(entry: SourceConfig, key: str) -> None:
    with pytest.raises(UserError, match=rf"config\.data\.sources\.0\.{key}"):
        validate(Config(data=DataConfig(sources=(entry,))))
