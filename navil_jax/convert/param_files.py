"""The parameters of a checkpoint, written a layer at a time and read one after the other, so that memory holds few."""

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from navil_jax.config import ModelConfig
from navil_jax.convert.params import assign
from navil_jax.convert.stored import TensorInfo, cast
from navil_jax.errors import UserError
from navil_jax.model import lora
from navil_jax.model.params import flatten, shapes, unflatten
from navil_jax.train.checkpoint import Checkpoints, Record
from navil_jax.train.checksums import CODECS, array_handler, reading

CHUNK_BYTES = 32 << 20  # what a reader of one shard has to read at least
SMALL_BYTES = 4 << 20  # a parameter up to this size is written as one
WRITE_BYTES = 64 << 20  # what is written at once


class ParamsWriter:
    """Writes `<folder>/checkpoints/0`, a checkpoint to start from, a layer of a parameter at a time; use it in `with`.

    A new writer of the same folder goes on where another was interrupted, with the parameters that are not `written`.

    Args:
      folder: exists; see `partial.partial_folder`.
      info: name -> shape and dtype of every parameter.
    """

    def __init__(self, folder: Path, info: Mapping[str, TensorInfo]) -> None:
        self.folder, self._info = folder, info
        self._params, self._journal = folder / "params", folder / "written.txt"
        lines = self._journal.read_text().split("\n")[:-1] if self._journal.exists() else []
        self.written = set(lines)
        if not (self._params.exists() or (folder / "checkpoints").exists()):
            self._save_outline()
        base = {"driver": "ocdbt", "base": f"file://{self._params.absolute()}/"}
        self._base, self._context = base, ts.Context()
        self._arrays: dict[str, ts.TensorStore] = {}
        self._small: dict[str, np.ndarray] = {}
        self._left: dict[str, int] = {}
        self._waiting: list[str] = []
        self._writes: list[ts.WriteFutures] = []
        self._bytes = 0

    def _save_outline(self) -> None:
        """The tree of the parameters as Orbax describes it, with one number for each; `write` makes the arrays anew."""
        outline = unflatten({name: np.zeros(1, info.dtype) for name, info in self._info.items()})
        with ocp.Checkpointer(array_handler()) as checkpointer:
            checkpointer.save(self._params.absolute(), args=ocp.args.PyTreeSave(outline))

    def __enter__(self) -> "ParamsWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._commit()

    @property
    def bytes_written(self) -> int:
        return sum(self._info[name].nbytes for name in self.written)

    def write(self, name: str, layer: int | None, value: np.ndarray) -> None:
        """Takes a layer of a parameter, or the whole, in any floating dtype; what is `written` is passed over.

        A parameter is `written` some time after its last layer came.

        Raises:
          UserError: a value is beyond the range of the parameter's dtype.
        """
        if name in self.written:
            return
        info = self._info[name]
        if name not in self._left:
            self._left[name] = int(np.prod(info.shape))
            self._open(name)
        at = () if layer is None else (layer,)
        for block, part in _blocks(value, self._chunk(name)[len(at) :]):
            whole = np.empty(part.shape, part.dtype)
            assign(whole, part)
            self._put(name, (*at, *block), cast(name, whole, info.dtype))
            if self._bytes >= WRITE_BYTES:
                self._commit()
        self._left[name] -= value.size
        if not self._left[name]:
            self._complete(name)

    def _chunk(self, name: str) -> tuple[int, ...]:
        info = self._info[name]
        if info.nbytes <= SMALL_BYTES:
            return info.shape
        chunk, size = [1] if "/layers/" in name else [], info.nbytes
        for axis, length in enumerate(info.shape):
            size //= length  # of one index of this axis
            if axis == len(chunk):
                chunk.append(min(length, max(1, CHUNK_BYTES // size)))
                if size <= CHUNK_BYTES:
                    break
        return (*chunk, *info.shape[len(chunk) :])

    def _open(self, name: str) -> None:
        info, chunk = self._info[name], self._chunk(name)
        grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
        metadata = {"shape": info.shape, "data_type": info.dtype.name, "chunk_grid": grid, "codecs": [*CODECS]}
        path = f"{name.replace('/', '.')}/"
        spec: dict[str, Any] = {"driver": "zarr3", "kvstore": {**self._base, "path": path}, "metadata": metadata}
        spec["store_data_equal_to_fill_value"] = True
        opened = ts.open(spec, create=True, delete_existing=True, context=self._context).result()
        self._arrays[name] = opened
        if chunk == info.shape:
            self._small[name] = np.empty(info.shape, info.dtype)

    def _put(self, name: str, block: tuple, value: np.ndarray) -> None:
        if name in self._small:
            self._small[name][block] = value
        else:
            self._stage(self._arrays[name], block, value)

    def _stage(self, array: ts.TensorStore, block: tuple, value: np.ndarray) -> None:
        self._writes.append(array[block].write(value))
        self._bytes += value.nbytes

    def _complete(self, name: str) -> None:
        if name in self._small:
            self._stage(self._arrays[name], (), self._small.pop(name))
        del self._arrays[name], self._left[name]
        self._waiting.append(name)

    def _commit(self) -> None:
        for write in self._writes:
            write.result()
        self._writes.clear()
        self._bytes = 0
        if self._waiting:
            with self._journal.open("a") as journal:
                journal.writelines(f"{name}\n" for name in self._waiting)
                journal.flush()
                os.fsync(journal.fileno())
            self.written |= set(self._waiting)
            self._waiting.clear()

    def finish(self, record: Record) -> None:
        """Adds the record. Interrupted anywhere, it can be called again by a new writer."""
        self._commit()
        step = self.folder / "checkpoints" / "0"
        with Checkpoints(epath.Path(self.folder / "checkpoints"), keep=1) as checkpoints:
            checkpoints.save(0, None, record)
        if not (step / "params").exists():
            self._params.rename(step / "params")
        self._journal.unlink(missing_ok=True)


def _blocks(value: np.ndarray, chunk: tuple[int, ...]) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """The chunks of an array, each with its place."""
    steps = (range(0, length, size) for length, size in zip(value.shape, chunk, strict=True))
    for start in itertools.product(*steps):
        ends = (min(i + size, length) for i, size, length in zip(start, chunk, value.shape, strict=True))
        block = tuple(slice(first, end) for first, end in zip(start, ends, strict=True))
        yield block, value[block]


class ParamsReader:
    """The parameters of `<checkpoints folder>/<step>`, read one at a time; use it in `with`.

    Low-rank updates are added to their kernels, in whose dtype they come out.

    Args:
      step_folder: of the checkpoint.
      lora_scale: factor of low-rank updates, if there are some.
      ema: gives the running averages of the trained parameters in their place, which are on disk less these.

    Attributes:
      info: name -> shape and dtype.

    Raises:
      UserError: there are no running averages.
    """

    def __init__(self, step_folder: Path, lora_scale: float = 0.0, ema: bool = False) -> None:
        folder, averages = step_folder.resolve() / "params", step_folder.resolve() / "ema"
        if ema and not averages.is_dir():
            raise UserError(f"{step_folder}: holds no running average (config.optimizer.ema_decay)")
        self._checkpointer, self._scale = ocp.Checkpointer(array_handler()), lora_scale
        self.info = self._stored(folder)
        self._folder, self._averages = folder, averages
        self._averaged = frozenset(self._stored(averages)) if ema else frozenset()
        self._updates = [name.removesuffix(f"/{lora.A}") for name in self.info if name.endswith(f"/{lora.A}")]
        for module in self._updates:
            del self.info[f"{module}/{lora.A}"], self.info[f"{module}/{lora.B}"]

    def _stored(self, folder: Path) -> dict[str, TensorInfo]:
        with reading(epath.Path(folder.parent), folder.name):
            leaves = jax.tree_util.tree_leaves_with_path(self._checkpointer.metadata(folder).item_metadata.tree)
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): TensorInfo(tuple(leaf.shape), np.dtype(leaf.dtype))
            for path, leaf in leaves
        }

    def __enter__(self) -> "ParamsReader":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._checkpointer.close()

    def problems(self, config: ModelConfig) -> list[str]:
        """What keeps the parameters from being those of a model."""
        wanted = {name: leaf.shape for name, leaf in flatten(shapes(config)).items()}
        have = {name: info.shape for name, info in self.info.items()}
        return [
            f"{name} is {have.get(name, 'missing')}, the config asks for {wanted.get(name, 'no such parameter')}"
            for name in sorted(wanted | have)
            if wanted.get(name) != have.get(name)
        ]

    def read(self, name: str) -> np.ndarray:
        """One whole parameter, in the dtype on disk of the parameter itself."""
        value = self._read(name).astype(self.info[name].dtype, copy=False)
        module = name.removesuffix("/kernel")
        if module not in self._updates:
            return value
        a, b = self._read(f"{module}/{lora.A}"), self._read(f"{module}/{lora.B}")
        return lora.update_of(value, a, b, self._scale, "/layers/" in name)

    def _read(self, name: str) -> np.ndarray:
        if name not in self._averaged:
            return self._stored_value(self._folder, name)
        return self._stored_value(self._folder, name).astype(np.float32) + self._stored_value(self._averages, name)

    def _stored_value(self, folder: Path, name: str) -> np.ndarray:
        item = unflatten({name: 0})
        restore_args = unflatten({name: ocp.RestoreArgs(restore_type=np.ndarray)})
        args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
        with reading(epath.Path(folder.parent), folder.name):
            (value,) = jax.tree.leaves(self._checkpointer.restore(folder, args=args))
        return value
