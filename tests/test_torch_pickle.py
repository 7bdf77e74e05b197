"""`.bin` files: what PyTorch writes is read, anything else is refused, nothing is run."""

import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from torch_bin import Call, Global, Storage, tensor, whole, write_bin

from navil_jax.convert.reader import TensorFolder
from navil_jax.errors import UserError

SIX = np.arange(6, dtype=np.float32).reshape(2, 3)
TEN = np.arange(10).astype(ml_dtypes.bfloat16)


def open_bin(folder: Path, content: object, **options) -> TensorFolder:
    write_bin(folder / "pytorch_model.bin", content, **options)
    return TensorFolder(folder)


def test_strides_offsets_and_shared_storages(tmp_path: Path):
    storage = Storage("0", np.arange(24, dtype=np.float32))
    content = {
        "all": tensor(storage, (24,), (1,)),
        "transposed": tensor(storage, (4, 6), (1, 4)),
        "part": tensor(storage, (2, 3), (6, 2), offset=13),
        "repeated": tensor(storage, (5, 2), (0, 1), offset=3),
        "empty": tensor(storage, (0, 3), (3, 1), offset=24),
    }
    read = open_bin(tmp_path, content)
    numbers = np.arange(24, dtype=np.float32)
    np.testing.assert_array_equal(read["all"], numbers)
    np.testing.assert_array_equal(read["transposed"], numbers.reshape(6, 4).T)
    np.testing.assert_array_equal(read["part"], [[13, 15, 17], [19, 21, 23]])
    np.testing.assert_array_equal(read["repeated"], [[3, 4]] * 5)
    assert read["empty"].shape == (0, 3)


def test_parameters_metadata_and_float8(tmp_path: Path):
    values = np.arange(6).astype(ml_dtypes.float8_e4m3fn)
    content = OrderedDict()
    content["parameter"] = Call(Global("torch._utils", "_rebuild_parameter"), whole("0", TEN), True, OrderedDict())
    content["float8"] = Call(
        Global("torch._utils", "_rebuild_tensor_v3"),
        *(Storage("1", values), 2, (2, 2), (2, 1), False, OrderedDict(), Global("torch", "float8_e4m3fn")),
    )
    content._metadata = OrderedDict({"": {"version": 1}})
    read = open_bin(tmp_path, content)
    assert read["parameter"].tobytes() == TEN.tobytes()
    assert (read["float8"].dtype, read["float8"].tolist()) == (values.dtype, [[2, 3], [4, 5]])


@pytest.mark.parametrize(
    ("module", "name"),
    [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("navil_jax.convert.stored", "StoredTensor")],
)
def test_nothing_is_run(tmp_path: Path, module: str, name: str):
    marker = tmp_path / "marker"
    content = {"a": whole("0", SIX), "b": Call(Global(module, name), f"touch {marker}")}
    with pytest.raises(UserError, match=f"pytorch_model.bin: its pickle asks for {module}.{name}, which is no tenso"):
        open_bin(tmp_path, content)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not tensors by name; save"),
        ({"model": {"a": 1}, "epoch": 3}, "holds what is no tensor: model, epoch; save"),
        ({"x": tensor(Storage("0", SIX), (7,), (1,))}, "x: reaches past its data"),
        ({"x": tensor(Storage("0", SIX), (2,), (1,), offset=5)}, "x: reaches past its data"),
        ({"x": tensor(Storage("0", SIX), (2,), (-1,), offset=5)}, "x: its description is malformed"),
        ({"x": tensor(Storage("0", SIX), ("2",), (1,))}, "x: its description is malformed"),
        ({"x": Call(Global("torch._utils", "_rebuild_parameter"), 1)}, "truncated or damaged .*missing 2 required"),
    ],
)
def test_contents_that_are_no_tensors(tmp_path: Path, content: object, message: str):
    with pytest.raises(UserError, match=f"pytorch_model.bin: {message}"):
        open_bin(tmp_path, content)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"byteorder": b"big"}, "its numbers are big-endian"),
        ({"compression": zipfile.ZIP_DEFLATED}, "b: its data is compressed"),
        ({"lost": "0"}, "b: the archive lacks its data"),
    ],
)
def test_odd_archives(tmp_path: Path, options: dict, message: str):
    with pytest.raises(UserError, match=f"pytorch_model.bin: {message}"):
        open_bin(tmp_path, {"b": whole("0", TEN)}, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\3\4 cut here", "truncated or damaged .*; download"),
        (b"<html>not found</html>", "not a file of torch.save .*; download"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M", "written by PyTorch before 1.6; load and save"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
    ],
)
def test_no_archive(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UserError, match=f"pytorch_model.bin: {message}"):
        TensorFolder(tmp_path)


def test_an_archive_of_something_else(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(UserError, match=r"an archive without data\.pkl"):
        TensorFolder(tmp_path)


def test_files_of_pytorch_itself(tmp_path: Path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    values = {
        "base": base,
        "transposed": base.T,
        "part": base[1:, ::2],
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "scalar": torch.tensor(7),
        "float8": torch.arange(4).to(torch.float8_e4m3fn),
        **torch.nn.Linear(3, 2).state_dict(),
    }
    torch.save(OrderedDict(values), tmp_path / "pytorch_model.bin")
    read = TensorFolder(tmp_path)
    assert set(read) == set(values)
    for name, value in values.items():
        assert read[name].dtype.name == str(value.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(read[name].astype(np.float32), value.detach().float().numpy())
    torch.save(values, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"before 1\.6"):
        TensorFolder(tmp_path)
