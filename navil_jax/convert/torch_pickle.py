"""The tensors of a PyTorch `.bin` file, found without PyTorch and without running anything that the file asks for.

Such a file is a zip archive: `data.pkl`, a pickle of names and descriptions of tensors, and one uncompressed entry for
each storage. The pickle may name tensors, storages, dtypes and OrderedDict; any other name in it is refused.
"""

import collections
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from navil_jax.convert.stored import DTYPES, StoredTensor, are_counts, listed
from navil_jax.errors import UserError

_OLD_FORMAT = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled magic number that torch.save wrote until 1.5
_LOCAL_HEADER = struct.Struct("<4s22x2H")  # signature, lengths of the entry's name and of its extra field


# Immutable, and built by nothing but the functions below: a hostile pickle can neither change nor forge a file name.
class _Storage(NamedTuple):
    dtype: str
    entry: str


class _Tensor(NamedTuple):
    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks) -> _Tensor:
    return _Tensor(storage, storage.dtype, offset, shape, strides)


def _rebuild_tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype) -> _Tensor:
    return _Tensor(storage, dtype, offset, shape, strides)


def _rebuild_parameter(tensor, requires_grad, hooks) -> _Tensor:
    return tensor


_NUMPY = {dtype.name: dtype for dtype in DTYPES.values()}  # PyTorch and NumPy name them alike
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
}
_ALLOWED: dict[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.storage.UntypedStorage": "uint8",
    **{f"torch.{storage}": dtype for storage, dtype in _STORAGES.items()},
    **{f"torch.{name}": name for name in _NUMPY},
}


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _ALLOWED:
            raise UserError(f"its pickle asks for {module}.{name}, which is no tensor; it was not run")
        return _ALLOWED[f"{module}.{name}"]

    def persistent_load(self, description: Any) -> _Storage:
        _, dtype, entry, _, _ = description  # ("storage", type, name of the entry, device, number of elements)
        return _Storage(dtype, entry)


def pickled_tensors(file: Path) -> dict[str, StoredTensor]:
    """Where the tensors of a `.bin` file are, by name. Reads the directory of the archive and its pickle, no data.

    Raises:
      UserError: no archive of torch.save (1.6 or newer), truncated, or with anything in it that is no tensor.
    """
    with file.open("rb") as opened:
        start = opened.read(len(_OLD_FORMAT))
        if start == _OLD_FORMAT:
            raise UserError(f"{file}: written by PyTorch before 1.6; load and save it again with a newer PyTorch")
        try:
            with zipfile.ZipFile(opened) as archive:
                root = _root(archive)
                named = _unpickle(archive, root)
                return {name: _locate(archive, opened, file, root, name, tensor) for name, tensor in named.items()}
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        except Exception as error:  # zipfile and pickle raise many kinds for damaged files
            what = "truncated or damaged" if start.startswith(b"PK") else "not a file of torch.save"
            raise UserError(f"{file}: {what} ({error}); download it again") from error


def _root(archive: zipfile.ZipFile) -> str:
    """The folder inside the archive that everything lies in."""
    names = archive.namelist()
    root = next((name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")), None)
    if root is None:
        raise UserError("an archive without data.pkl, so not a file of torch.save; download it again")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise UserError("its numbers are big-endian; save it again on a little-endian machine")
    return root


def _unpickle(archive: zipfile.ZipFile, root: str) -> dict[str, _Tensor]:
    with archive.open(f"{root}data.pkl") as pickled:
        named = _TensorUnpickler(pickled).load()
    if not isinstance(named, dict):
        raise UserError(f"holds a {type(named).__name__}, not tensors by name; save the model's state_dict() alone")
    others = [str(name) for name, value in named.items() if not (isinstance(name, str) and isinstance(value, _Tensor))]
    if others:
        raise UserError(f"holds what is no tensor: {listed(others, ', ', 5)}; save the model's state_dict() alone")
    return named


def _locate(
    archive: zipfile.ZipFile, opened: BinaryIO, file: Path, root: str, name: str, tensor: _Tensor
) -> StoredTensor:
    storage, dtype, offset, shape, strides = tensor
    if not (isinstance(storage, _Storage) and dtype in _NUMPY and are_counts(offset, *shape, *strides)):
        raise UserError(f"{name}: its description is malformed; download the file again")
    try:
        entry = archive.getinfo(f"{root}data/{storage.entry}")
    except KeyError as error:
        raise UserError(f"{name}: the archive lacks its data; download the file again") from error
    if entry.compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{name}: its data is compressed, which torch.save never does; save it again")
    opened.seek(entry.header_offset)
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(opened.read(_LOCAL_HEADER.size))
    data = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    bytes_each = _NUMPY[dtype].itemsize
    start, steps = offset * bytes_each, tuple(stride * bytes_each for stride in strides)
    stored = StoredTensor(tuple(shape), _NUMPY[dtype], file, data + start, steps)
    if signature != b"PK\3\4" or start + stored.span > entry.file_size:
        raise UserError(f"{name}: reaches past its data; download the file again")
    return stored
