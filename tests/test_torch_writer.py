"""Writing safetensors: the library's own layout, any shapes and dtypes back again, interruptions, full disks."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from navil_jax.convert import writer as torch_writer
from navil_jax.convert.reader import TensorFolder
from navil_jax.convert.stored import DTYPES, TensorInfo
from navil_jax.convert.writer import write_safetensors
from navil_jax.errors import UserError

VALUES = {f"layers.{i}.weight": np.full((4, 8), i, ml_dtypes.bfloat16) for i in range(5)}  # 64 bytes each
THREE_SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def infos(values: dict[str, np.ndarray]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(value.shape, value.dtype) for name, value in values.items()}


def write(folder: Path, values: dict[str, np.ndarray] = VALUES, value: Callable | None = None, **options) -> None:
    write_safetensors(folder, infos(values), value or values.__getitem__, **options)


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@st.composite
def named_tensors(draw: st.DrawFn) -> dict[str, np.ndarray]:
    names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda name: name != "__metadata__")
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    values = {}
    for name in draw(st.lists(names, max_size=6, unique=True)):
        tensor = TensorInfo(draw(shapes), draw(st.sampled_from(list(DTYPES.values()))))
        data = draw(st.binary(min_size=tensor.nbytes, max_size=tensor.nbytes))
        values[name] = np.frombuffer(bytearray(data), tensor.dtype).reshape(tensor.shape)
    return values


@hypothesis.settings(deadline=None)
@hypothesis.given(named_tensors(), st.integers(1, 200))
def test_any_tensors_come_back_byte_for_byte(tmp_path_factory, values: dict[str, np.ndarray], shard_bytes: int):
    folder = tmp_path_factory.mktemp("any")
    write(folder, values, shard_bytes=shard_bytes)
    back = TensorFolder(folder)
    assert infos(values) == {name: TensorInfo(t.shape, t.dtype) for name, t in back.tensors.items()}
    assert all(back.read(name).tobytes() == value.tobytes() for name, value in values.items())
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "numpy") as opened:
            held = set(opened.keys())
        assert len(held) <= 1 or sum(values[name].nbytes for name in held) <= shard_bytes


@hypothesis.settings(deadline=None)
@hypothesis.given(named_tensors())
def test_a_file_is_that_of_the_library(tmp_path_factory, values: dict[str, np.ndarray]):
    folder = tmp_path_factory.mktemp("same")
    write(folder, values)
    save_file(values, folder / "library", metadata={"format": "pt"})
    assert (folder / "model.safetensors").read_bytes() == (folder / "library").read_bytes()


def test_shards_and_index(tmp_path: Path):
    write(tmp_path, shard_bytes=128, metadata={"source": "step 7"})
    assert files(tmp_path) == [*THREE_SHARDS, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 5 * 64}
    assert [index["weight_map"][name] for name in VALUES] == [THREE_SHARDS[i] for i in (0, 0, 1, 1, 2)]
    for shard in THREE_SHARDS:
        with safe_open(tmp_path / shard, "numpy") as opened:
            assert opened.metadata() == {"format": "pt", "source": "step 7"}
        for name, value in load_file(tmp_path / shard).items():
            assert index["weight_map"][name] == shard
            np.testing.assert_array_equal(value, VALUES[name])


def test_strided_values_are_written_in_c_order(tmp_path: Path):
    values = {"w": np.arange(12, dtype=np.float32).reshape(3, 4).T, "v": np.arange(6, dtype=np.int8)[::2]}
    write(tmp_path, values)
    for name, value in TensorFolder(tmp_path).items():
        np.testing.assert_array_equal(value, values[name])


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(errno.ENOSPC, "no space"), ValueError("bad")])
def test_an_interrupted_export_goes_on(tmp_path: Path, interruption: BaseException):
    def breaks_at_3(name: str) -> np.ndarray:
        if name == "layers.3.weight":
            raise interruption
        return VALUES[name]

    with pytest.raises(UserError if isinstance(interruption, OSError) else type(interruption)):
        write(tmp_path, value=breaks_at_3, shard_bytes=128)
    assert files(tmp_path) == THREE_SHARDS[:1]
    (tmp_path / f"{THREE_SHARDS[1]}.partial").write_text("left by a killed run")

    asked = []
    write(tmp_path, value=lambda name: asked.append(name) or VALUES[name], shard_bytes=128)
    assert asked == ["layers.2.weight", "layers.3.weight", "layers.4.weight"]
    assert files(tmp_path) == [*THREE_SHARDS, "model.safetensors.index.json"]
    assert all(np.array_equal(value, VALUES[name]) for name, value in TensorFolder(tmp_path).items())


def test_shards_of_another_source_are_written_again(tmp_path: Path):
    write(tmp_path, shard_bytes=128, metadata={"source": "step 1"})
    newer = {name: value + 1 for name, value in VALUES.items()}
    write(tmp_path, newer, shard_bytes=128, metadata={"source": "step 2"})
    assert all(np.array_equal(value, newer[name]) for name, value in TensorFolder(tmp_path).items())


def test_a_truncated_shard_is_written_again(tmp_path: Path):
    write(tmp_path, shard_bytes=128)
    os.truncate(tmp_path / THREE_SHARDS[1], 300)
    write(tmp_path, shard_bytes=128)
    assert len(TensorFolder(tmp_path)) == 5


def test_other_weight_files_are_never_mixed_in(tmp_path: Path):
    write(tmp_path, shard_bytes=128)
    with pytest.raises(UserError, match=r"holds other weight files \(model-00001-of-00003.* give another folder"):
        write(tmp_path)


def test_too_little_space_is_known_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch_writer.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(UserError, match=r"[\d,]+ bytes are to be written and 100 are free; make space"):
        write(tmp_path)
    assert files(tmp_path) == []


def test_a_disk_that_gets_full_at_the_end_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch_writer.os, "fsync", full)
    with pytest.raises(UserError, match=r"model.safetensors: the disk got full; .* needs [\d,]+ bytes and [\d,]+ are"):
        write(tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((8, 4), ml_dtypes.bfloat16), r"layers.0.weight: value is bfloat16 \[8, 4\], not bfloat16 \[4, 8\]"),
        (np.zeros((4, 8), np.float16), r"layers.0.weight: value is float16 \[4, 8\], not bfloat16"),
    ],
)
def test_a_value_that_is_not_as_declared(tmp_path: Path, wrong: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, value=lambda name: wrong)
    assert files(tmp_path) == []


def test_a_dtype_that_safetensors_lacks(tmp_path: Path):
    with pytest.raises(ValueError, match="x: safetensors cannot hold complex128"):
        write(tmp_path, {"x": np.zeros(1, np.complex128)})
