"""Reading checkpoint folders: every layout, lazily, with every fault named."""

import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from torch_bin import whole, write_bin

from navil_jax.convert.reader import TensorFolder
from navil_jax.convert.stored import TensorInfo
from navil_jax.convert.writer import write_safetensors
from navil_jax.errors import UserError

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
VALUES = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(10).astype(ml_dtypes.bfloat16),
    "c": np.array([[1, -2]], np.int64),
    "d": np.array(True),
}


def write_shards(folder: Path) -> Path:
    """a and b in the first shard, c and d in the second."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = {name: TensorInfo(value.shape, value.dtype) for name, value in VALUES.items()}
    write_safetensors(folder, infos, VALUES.__getitem__, shard_bytes=44)
    return folder


def write_bins(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shards = {f"pytorch_model-0000{i}-of-00002.bin": names for i, names in ((1, "ab"), (2, "cd"))}
    for shard, names in shards.items():
        write_bin(folder / shard, OrderedDict((name, whole(name, VALUES[name])) for name in names))
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def hub_cache(folder: Path) -> Path:
    """blobs/HASH, and links to them, as the hub's downloads lie on disk."""
    snapshot = folder / "snapshots" / "main"
    write_shards(folder / "blobs")
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((folder / "blobs").iterdir())):
        file.rename(file.with_name(f"hash{number}"))
        (snapshot / file.name).symlink_to(f"../../blobs/hash{number}")
    return snapshot


def without_index(write: Callable[[Path], Path]) -> Callable[[Path], Path]:
    def written(folder: Path) -> Path:
        write(folder)
        next(folder.glob("*.json")).unlink()
        return folder

    return written


def one_bin(folder: Path) -> Path:
    folder.mkdir()
    write_bin(folder / "pytorch_model.bin", {name: whole(name, value) for name, value in VALUES.items()})
    return folder


def one_file(folder: Path) -> Path:
    folder.mkdir()
    infos = {name: TensorInfo(value.shape, value.dtype) for name, value in VALUES.items()}
    write_safetensors(folder, infos, VALUES.__getitem__)
    (folder / "pytorch_model.bin").write_text("the other format is not looked at")
    return folder


@pytest.mark.parametrize(
    "layout",
    [write_shards, without_index(write_shards), one_file, hub_cache, write_bins, without_index(write_bins), one_bin],
)
def test_every_layout(tmp_path: Path, layout: Callable[[Path], Path]):
    folder = TensorFolder(layout(tmp_path / "checkpoint"))
    assert set(folder) == set(VALUES)
    for name, value in VALUES.items():
        assert (folder.tensors[name].shape, folder.tensors[name].dtype) == (value.shape, value.dtype)
        read = folder.read(name)
        assert (read.dtype, read.shape, read.tobytes()) == (value.dtype, value.shape, value.tobytes())
        assert not read.flags.writeable
        assert not read.flags.owndata


def test_memory_of_a_tensor_is_given_back(tmp_path: Path):
    size = 8 << 20
    values = {str(i): TensorInfo((size,), np.dtype(np.int8)) for i in range(10)}
    write_safetensors(tmp_path, values, lambda name: np.full(size, int(name), np.int8))
    folder = TensorFolder(tmp_path)
    before = resident_file_bytes()
    for name in values:
        read = folder.read(name)
        assert read.sum(dtype=np.int64) == size * int(name)
        assert resident_file_bytes() - before < 2.5 * size  # this one, and the one before while this one was opened
    assert resident_file_bytes() - before > 0.5 * size
    part = read[:100]
    del read
    assert part[7] == 9


def resident_file_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) << 10


def test_opening_reads_no_data(tmp_path: Path):
    """A file of 1 TB, all of it a hole."""
    entry = {"dtype": "F8_E4M3", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 40]}
    header = json.dumps({"x": entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(file, 8 + len(header) + (1 << 40))
    read = TensorFolder(tmp_path).read("x")
    assert (read.shape, read.dtype, float(read[-1, -1])) == ((1 << 20, 1 << 20), ml_dtypes.float8_e4m3fn, 0)


def edit_index(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def fault(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return fault


def edit_header(old: bytes, new: bytes) -> Callable[[Path], object]:
    def fault(folder: Path) -> None:
        whole_file = (folder / FIRST).read_bytes()
        start = 8 + int.from_bytes(whole_file[:8], "little")
        header = whole_file[8:start].replace(old, new)
        assert header != whole_file[8:start]
        (folder / FIRST).write_bytes(len(header).to_bytes(8, "little") + header + whole_file[start:])

    return fault


def second_again_as_first(folder: Path) -> None:
    shutil.copy(folder / SECOND, folder / FIRST)
    (folder / INDEX).unlink()


FAULTS = {
    "no folder": (shutil.rmtree, "checkpoint: no such folder; give"),
    "no weights": (lambda f: [file.unlink() for file in f.iterdir()], "no model.*safetensors and no pytorch_model"),
    "index no JSON": (lambda f: (f / INDEX).write_text('{"weight_map": '), f"{INDEX}: not JSON with a weight_map"),
    "index of something": (lambda f: (f / INDEX).write_text("[]"), f"{INDEX}: not JSON with a weight_map"),
    "index leaves folder": (edit_index(lambda m: m.update(a="../x")), f"{INDEX}: not JSON with a weight_map"),
    "lost shard": (lambda f: (f / SECOND).unlink(), f"{SECOND}: missing, and with it 2 tensors of the index; download"),
    "lost, no index": (lambda f: [(f / INDEX).unlink(), (f / FIRST).unlink()], f"{FIRST}: missing; download"),
    "absent tensor": (edit_index(lambda m: m.update(x=FIRST)), f"{FIRST}: lacks x, which the index places in it"),
    "tensor not named": (edit_index(lambda m: m.pop("c")), f"{SECOND}: the index does not name its c; download"),
    "wrong place": (edit_index(lambda m: m.update(a=SECOND)), f"does not name its a; .*{SECOND}: lacks a, which"),
    "in two shards": (second_again_as_first, f"{SECOND}: c is also in {FIRST}; remove .*{SECOND}: d is also in"),
    "truncated": (lambda f: os.truncate(f / FIRST, 190), f"{FIRST}: 190 bytes where its header asks for 2..; download"),
    "too long": (lambda f: (f / FIRST).open("ab").write(b"x"), f"{FIRST}: 2.. bytes where its header asks for 2..;"),
    "truncated early": (lambda f: os.truncate(f / FIRST, 50), f"{FIRST}: truncated, or not a .* \\(50 bytes\\); down"),
    "empty": (lambda f: os.truncate(f / FIRST, 0), f"{FIRST}: truncated, or not a safetensors file \\(0 bytes\\)"),
    "header no JSON": (edit_header(b'{"__', b'x"__'), f"{FIRST}: its header is damaged"),
    "no dtype": (edit_header(b'"dtype":"F32"', b'"dtipe":"F32"'), f"{FIRST}: its header is damaged"),
    "wrong shape": (edit_header(b"[2,3]", b"[2,4]"), f"{FIRST}: its header is damaged"),
    "negative shape": (edit_header(b"[2,3]", b"[-2,-3]"), f"{FIRST}: its header is damaged"),
    "hole": (edit_header(b"[24,44]", b"[25,45]"), f"{FIRST}: its header is damaged"),
    "strange dtype": (edit_header(b'"F32"', b'"F4X"'), f"{FIRST}: dtypes that cannot be read: a is F4X; save"),
    "no file": (lambda f: [(f / FIRST).unlink(), (f / FIRST).mkdir()], f"{FIRST}: cannot be read \\(Is a directory\\)"),
    "git-lfs": (
        lambda f: (f / SECOND).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        f"{SECOND}: a git-lfs pointer, not the data; run `git lfs pull`",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found_at_opening(tmp_path: Path, name: str):
    fault, message = FAULTS[name]
    fault(write_shards(tmp_path / "checkpoint"))
    with pytest.raises(UserError, match=message) as error:
        TensorFolder(tmp_path / "checkpoint")
    assert "\n" not in str(error.value)


def test_all_faults_are_listed(tmp_path: Path):
    folder = hub_cache(tmp_path)
    (folder / SECOND).resolve().unlink()
    os.truncate(folder / FIRST, 100)
    with pytest.raises(UserError, match=f"{FIRST}: truncated.*; .*{SECOND}: missing, and with it 2 tensors"):
        TensorFolder(folder)


@pytest.mark.parametrize("layout", [one_file, one_bin])
@hypothesis.settings(deadline=None)
@hypothesis.given(st.data())
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, layout: Callable[[Path], Path], data: st.DataObject):
    folder = layout(tmp_path_factory.mktemp("damaged") / "checkpoint")
    file = folder / ("pytorch_model.bin" if layout is one_bin else "model.safetensors")
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        opened = TensorFolder(folder)
    except UserError as error:
        assert str(error).startswith(str(file))
    else:
        assert all(value.tobytes() is not None for value in opened.values())
