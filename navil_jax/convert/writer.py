"""Sharded safetensors files, written one tensor after the other, so that an interrupted export can go on."""

import dataclasses
import errno
import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from navil_jax.convert.stored import DTYPES, TensorInfo, listed
from navil_jax.errors import UserError

_ORDER = {code: place for place, code in enumerate(DTYPES)}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A file to write: its name, its first bytes, and (name, offset in the file) of its tensors in writing order."""

    name: str
    header: bytes
    offsets: dict[str, int]
    size: int

    def is_in(self, folder: Path) -> bool:
        """Whether the file is there with this header; it got its name when it was complete."""
        file = folder / self.name
        if not file.is_file() or file.stat().st_size != self.size:
            return False
        with file.open("rb") as opened:
            return opened.read(len(self.header)) == self.header


def write_safetensors(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    value: Callable[[str], np.ndarray],
    shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes model.safetensors, or model-0000i-of-0000N.safetensors and model.safetensors.index.json.

    A shard gets its name once it is complete and on disk. A rerun keeps the shards whose header it would write again,
    and never asks for their values; so `metadata` should name what the values come from.

    Args:
      folder: exists; holds nothing but an interrupted run of the same export beside files that are no weights.
      tensors: what to write. They are put into shards in this order.
      value: gives a tensor by its name; called in the order of `tensors`; no value is kept while the next is asked for.
      shard_bytes: most bytes of tensors in a shard; a larger tensor has a shard of its own.
      metadata: goes into the header of every shard, beside {"format": "pt"}.

    Raises:
      UserError: the disk is or gets full, or the folder holds weight files of something else.
      ValueError: a value has not the shape or dtype that `tensors` gives, or safetensors lacks the dtype.
    """
    shards = _plan(tensors, shard_bytes, {"format": "pt", **(metadata or {})})
    index = "model.safetensors.index.json"
    expected = {shard.name for shard in shards} | ({index} if len(shards) > 1 else set())
    others = {file.name.removesuffix(".partial") for file in folder.glob("model*.safetensors*")} - expected
    if others:
        raise UserError(f"{folder}: holds other weight files ({listed(sorted(others), ', ', 5)}); give another folder")
    for name in expected:
        (folder / f"{name}.partial").unlink(missing_ok=True)
    missing = [shard for shard in shards if not shard.is_in(folder)]
    check_space(folder, sum(shard.size for shard in missing))
    for shard in missing:
        _write(folder / shard.name, shard.size, functools.partial(_fill, shard, tensors, value))
    if len(shards) > 1:
        weight_map = {name: shard.name for shard in shards for name in shard.offsets}
        content = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        text = (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
        _write(folder / index, len(text), lambda opened: opened.write(text))


def _plan(tensors: Mapping[str, TensorInfo], shard_bytes: int, metadata: Mapping[str, str]) -> list[_Shard]:
    groups: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and filled + tensor.nbytes > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += tensor.nbytes
    if len(groups) == 1:
        return [_shard("model.safetensors", groups[0], metadata)]
    count = len(groups)
    names = (f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))
    return [_shard(name, group, metadata) for name, group in zip(names, groups, strict=True)]


def _shard(name: str, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> _Shard:
    """The file's layout, byte for byte that of the safetensors library: by dtype, then by name."""
    codes = {tensor: _code(tensor, info.dtype) for tensor, info in tensors.items()}
    header: dict[str, dict] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: (_ORDER[codes[tensor]], tensor)):
        begin, end = end, end + tensors[tensor].nbytes
        shape = list(tensors[tensor].shape)
        header[tensor] = {"dtype": codes[tensor], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = len(text).to_bytes(8, "little") + text
    return _Shard(name, first, {t: len(first) + header[t]["data_offsets"][0] for t in tensors}, len(first) + end)


def _code(name: str, dtype: np.dtype) -> str:
    if dtype not in _CODES:
        raise ValueError(f"{name}: safetensors cannot hold {dtype}")
    return _CODES[dtype]


def _fill(
    shard: _Shard, tensors: Mapping[str, TensorInfo], value: Callable[[str], np.ndarray], opened: BinaryIO
) -> None:
    opened.write(shard.header)
    for name, offset in shard.offsets.items():
        array, expected = value(name), tensors[name]
        if array.shape != expected.shape or array.dtype != expected.dtype:
            raise ValueError(
                f"{name}: value is {array.dtype} {list(array.shape)}, not {expected.dtype} {list(expected.shape)}"
            )
        opened.seek(offset)
        opened.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        del array


def _write(file: Path, size: int, fill: Callable[[BinaryIO], object]) -> None:
    """Writes a file beside its name and gives it the name once it is on disk; leaves nothing behind on an error."""
    partial = file.with_name(f"{file.name}.partial")
    try:
        with partial.open("wb") as opened:
            fill(opened)
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(file)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(file.parent).free
            raise UserError(
                f"{file}: the disk got full; this file needs {size:,} bytes and {free:,} are free; make space and run "
                "the same command again, which keeps the files that are complete"
            ) from error
        raise


def check_space(folder: Path, size: int) -> None:
    """Raises UserError if the disk that holds `folder` has fewer than `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f"{folder}: {size:,} bytes are to be written and {free:,} are free; make space and run again")
