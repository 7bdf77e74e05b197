"""`.bin` files as torch.save writes them, made without PyTorch."""

import pickle
import zipfile
from collections import OrderedDict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

_STORAGES = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage", "bool": "BoolStorage"}


class Global:
    """Something that a pickle names: `module.name`."""

    def __init__(self, module: str, name: str) -> None:
        self.opcode = pickle.GLOBAL + f"{module}\n{name}\n".encode()

    def __call__(self) -> None:
        """Only things that can be called may stand where a pickle calls something."""


class Call:
    """Something that a pickle makes by calling a global."""

    def __init__(self, function: Global, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


class Storage:
    """Numbers in a file of the archive. PyTorch has one kind for each dtype, and one of bytes for float8."""

    def __init__(self, key: str, values: np.ndarray) -> None:
        self.key, self.data = key, values.tobytes()
        kind = _STORAGES.get(values.dtype.name)
        self.kind = Global("torch", kind) if kind else Global("torch.storage", "UntypedStorage")
        self.numel = values.size


class _Pickler(pickle._Pickler):
    def __init__(self, file: BytesIO) -> None:
        super().__init__(file, 2)
        self.storages: dict[str, bytes] = {}

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Global):
            self.write(obj.opcode)
        else:
            super().save(obj, save_persistent_id)

    def persistent_id(self, obj: Any) -> tuple | None:
        if not isinstance(obj, Storage):
            return None
        self.storages[obj.key] = obj.data
        return "storage", obj.kind, obj.key, "cpu", obj.numel


def tensor(storage: Storage, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> Call:
    """A tensor of a storage; strides and offset in elements."""
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, storage, offset, shape, strides, False, OrderedDict())


def whole(key: str, values: np.ndarray) -> Call:
    """A tensor with a storage of its own."""
    strides = tuple(step // values.itemsize for step in values.strides)
    return tensor(Storage(key, values), values.shape, strides)


def write_bin(
    file: Path, content: Any, byteorder: bytes = b"little", compression: int = zipfile.ZIP_STORED, lost: str = ""
) -> None:
    """An archive of `content` and its storages but `lost`, each on a multiple of 64 bytes."""
    pickled = BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(content)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled.getvalue())
        archive.writestr("archive/byteorder", byteorder)
        for key, data in pickler.storages.items():
            entry = zipfile.ZipInfo(f"archive/data/{key}")
            padding = -(archive.fp.tell() + 30 + len(entry.filename) + 4) % 64
            entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            entry.compress_type = compression
            if key != lost:
                archive.writestr(entry, data)
