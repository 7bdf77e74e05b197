"""Tars are read as the webdataset package reads them, or what differs is named: no sample loses a member."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from made_data import jpeg, outcomes

from navil_jax.data.formats import open_format
from navil_jax.data.formats.files import expand
from navil_jax.data.sample import Sample
from navil_jax.errors import UserError

RED, BLUE, GREY = (jpeg(red) for red in (200, 90, 10))
Member = tuple[str, bytes | str]  # name, and content or what it is a link to


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NAVIL_CACHE", str(tmp_path / "cache"))
    return tmp_path


def packed(*members: Member, kind: bytes = tarfile.SYMTYPE, form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = kind, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def read(folder: Path, content: bytes) -> list[Sample | str]:
    (folder / "w.tar").write_bytes(content)
    return outcomes(open_format("webdataset", str(folder / "w.tar")))


def test_hidden_files_of_macos_are_left_out(folder: Path) -> None:
    members: list[Member] = [("./.DS_Store", b"x")]
    for key, image in (("0", RED), ("1", BLUE)):
        for name, content in ((f"{key}.jpg", image), (f"{key}.txt", b"A sheet.")):
            members += [(f"./._{name}", b"\0\5\x16\7Mac OS X"), (f"__MACOSX/._{name}", b"x"), (f"./{name}", content)]
    found = read(folder, packed(*members))
    assert [(s.key, s.images) for s in found] == [("w.tar/0", (RED,)), ("w.tar/1", (BLUE,))]


def test_members_of_a_key_apart_are_bad_and_the_others_used(folder: Path) -> None:
    found = read(folder, packed(("0.jpg", RED), ("1.jpg", BLUE), ("1.txt", b"y"), ("0.txt", b"x")))
    assert ["members of 0 stand apart" in f if isinstance(f, str) else f.images for f in found] == [True, (BLUE,), True]


@pytest.mark.parametrize("name", ["0.jpg", "0.JPG", "0.txt", "./0.jpg"])
def test_a_name_twice_is_bad(folder: Path, name: str) -> None:
    (found,) = read(folder, packed(("0.jpg", RED), ("0.txt", b"x"), (name, BLUE)))
    assert "stands twice" in found


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_are_bad_samples(folder: Path, kind: bytes) -> None:
    members: list[Member] = [("0.jpg", RED), ("0.txt", b"x"), ("1.jpg", "0.jpg"), ("1.txt", b"y")]
    good, bad = read(folder, packed(*members, kind=kind))
    assert good.images == (RED,)
    assert "1.jpg is a link" in bad


@pytest.mark.parametrize(
    ("members", "images"),
    [
        ([("k.jpg", RED), ("k.seg.png", BLUE), ("k.mask.png", GREY)], (RED,)),
        ([("k.10.jpg", GREY), ("k.2.png", BLUE), ("k.1.jpg", RED)], (RED, BLUE, GREY)),
        ([("k.jpg", RED), ("k.npy", b"x"), ("k.index", b"3")], (RED,)),
        ([("k.jpg", RED), ("k.json", b'{"url": "http://x", "image": "coco/k.jpg"}')], (RED,)),
    ],
)
def test_which_members_are_images(folder: Path, members: list[Member], images: tuple[bytes, ...]) -> None:
    (found,) = read(folder, packed(*members, ("k.txt", b"x")))
    assert isinstance(found, Sample), found
    assert found.images == images


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("k.jpg", RED), ("k.png", BLUE)], "which are its images, and in which order? jpg, png"),
        ([("k.jpg", RED), ("k.1.jpg", BLUE)], "which are its images"),
        ([("k.01.jpg", RED), ("k.1.jpg", BLUE)], "two images of number 1"),
        ([("k.seg.png", RED)], "k.seg.png is not read"),
        ([("k.mp4", b"x"), ("k.1.mp4", b"x")], "k.mp4 is not read"),
        ([("k.mp4", b"x")], "video"),
        ([("k.jpg", RED), ("k.mp4", b"x")], "mp4 names what is not read"),
        ([("k", RED)], "k is not read"),
        ([("k.jpg", RED), ("k.right.jpg", BLUE)], "right.jpg names what is not read"),
        ([("k.jpg", RED), ("k.depth.png", GREY)], "depth.png names what is not read"),
        ([("k.jpg", RED), ("k.depth.npy", b"x")], "depth.npy names what is not read"),
        ([("k.jpg", RED), ("k.prompt.txt", b"Which?")], "prompt is not read"),
        ([("k.jpg", RED), ("k.choices.txt", b"A, B")], "choices is not read"),
        ([("k.jpg", RED), ("k.caption.txt", b"y")], "caption and txt are different texts"),
        ([("k.jpg", RED), ("k.json", b'{"images": ["a", "b"]}')], "k.json names 2 images, and 1 stand beside it"),
    ],
)
def test_members_that_are_not_used_make_a_sample_bad(folder: Path, members: list[Member], reason: str) -> None:
    (found,) = read(folder, packed(*members, ("k.txt", b"x")))
    assert isinstance(found, str), found
    assert reason in found


def test_members_of_text_are_fields_of_the_record(folder: Path) -> None:
    members = ("k.jpg", RED), ("k.question.txt", b"Which?"), ("k.answer.txt", b"Red."), ("k.width.txt", b"3")
    (found,) = read(folder, packed(*members))
    assert found.turns == (("Which?", "Red."),)
    assert found.unused == ("width",)


def test_byte_order_marks_of_texts_are_no_text(folder: Path) -> None:
    found = read(folder, packed(("0.txt", b"\xef\xbb\xbfA sheet.\r\n"), ("1.txt", "x".encode("utf-16"))))
    assert found[0].turns == (("", "A sheet."),)
    assert "not UTF-8" in found[1]


def test_joined_and_compressed_tars_are_refused(folder: Path) -> None:
    one = packed(("0.txt", b"x"))
    for content, message in ((one + one, "more behind the tar's end"), (b"\x1f\x8b" + one, r"is compressed \(gz\)")):
        with pytest.raises(UserError, match=message):
            read(folder, content)
    (folder / "w.tar").write_bytes(one)
    (folder / "x.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match=r"x\.tar\.gz is compressed; unpack it"):
        open_format("webdataset", str(folder))


def test_ranges_may_go_down_and_keep_their_zeros(folder: Path) -> None:
    for number in (8, 9, 10, 11):
        for name in (f"w-{number}.tar", f"w-{number:03}.tar"):
            (folder / name).touch()
    names = [f"w-{number}.tar" for number in (11, 10, 9, 8)]
    assert [Path(file).name for file in expand(str(folder / "w-{11..8}.tar"), (".tar",))] == names
    padded = [f"w-{number:03}.tar" for number in (8, 9, 10, 11)]
    assert [Path(file).name for file in expand(str(folder / "w-{008..11}.tar"), (".tar",))] == padded


_ENDINGS = st.sampled_from(
    ["jpg", "png", "0.jpg", "1.jpg", "2.png", "10.jpg", "txt", "cls", "json", "seg.png", "mp4", "npy", "JPG"]
)
_NAMES = st.tuples(st.sampled_from(["", "./", "d/", "._", "x" * 120]), st.sampled_from("0123"), _ENDINGS).map(
    lambda parts: f"{parts[0]}{parts[1]}.{parts[2]}"
)
_CONTENT = {"txt": b"a text", "cls": b"7", "json": b"{}", "mp4": b"clip", "npy": b"numbers"}


@settings(max_examples=150, deadline=None)
@given(
    names=st.lists(_NAMES, min_size=1, max_size=10),
    links=st.sets(st.integers(0, 9)),
    form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_every_member_is_in_one_sample_or_that_sample_is_bad(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], links: set[int], form: int
) -> None:
    """The samples are the runs of one key; a good one has all images and the text of its key, each once."""
    members: list[Member] = []
    for number, name in enumerate(names):
        ending = name.rpartition(".")[2].lower()
        content = _CONTENT.get(ending, bytes([number]))  # each image is another one
        members.append((name, "0.jpg" if number in links else content))
    shown = [(name.removeprefix("./"), content) for name, content in members if not name.startswith("._")]
    keys = [name.partition(".")[0] for name, _ in shown]
    runs = [key for number, key in enumerate(keys) if number == 0 or keys[number - 1] != key]
    folder = tmp_path_factory.mktemp("tar")
    assume(runs)
    found = read(folder, packed(*members, form=form))
    assert len(found) == len(runs)
    for key, sample in zip(runs, found, strict=True):
        if isinstance(sample, str):
            assert sample
            continue
        own = {name.lower(): content for name, content in shown if name.partition(".")[0] == key}
        assert len(own) == keys.count(key)
        assert all(isinstance(content, bytes) for content in own.values())
        assert sample.key == f"w.tar/{key}"
        alone = [own[name] for name in own if name in (f"{key}.jpg", f"{key}.png")]
        numbered = [own[name] for number in (0, 1, 2, 10) for name in own if name.startswith(f"{key}.{number}.")]
        assert list(sample.images) == alone + numbered
        assert len(alone) <= 1 and not (alone and numbered)
        assert sample.images or not [name for name in own if name.endswith(("png", "mp4", "npy"))]
        assert not [name for name in own if name.endswith("mp4")]
        assert sample.turns[0][1] == ("a text" if f"{key}.txt" in own else "7")
