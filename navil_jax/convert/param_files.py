"""The parameters of a checkpoint, written and read one after the other, so that memory holds one of them at a time."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import v1 as ocp_v1

from navil_jax.config import ModelConfig
from navil_jax.convert.stored import TensorInfo
from navil_jax.errors import UserError
from navil_jax.model import lora
from navil_jax.model.params import flatten, shapes, unflatten
from navil_jax.train.checkpoint import Checkpoints, Record, reading
from navil_jax.train.checksums import array_handler

CHUNK_BYTES = 32 << 20  # what a reader of one shard has to read at least


class ParamsWriter:
    """Writes `<workdir>/checkpoints/0`, a checkpoint to start from, some parameters at a time.

    Everything stands in `<workdir>.partial` until `finish`, which renames it. A new writer of the same workdir and the
    same `purpose` goes on where another was interrupted: `written` names what is there already.

    Args:
      workdir: must not exist or be empty; local.
      purpose: says what is written, such as where from and with which settings; anything that JSON can hold.

    Raises:
      UserError: the workdir holds something.
    """

    def __init__(self, workdir: Path, purpose: dict) -> None:
        if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
            raise UserError(f"{workdir}: is not empty; give a new folder")
        self.workdir = workdir
        self._partial = workdir.with_name(f"{workdir.name}.partial").resolve()
        self._purpose = self._partial / "purpose.json"
        if not (self._purpose.exists() and json.loads(self._purpose.read_text()) == purpose):
            epath.Path(self._partial).rmtree(missing_ok=True)
            self._partial.mkdir(parents=True)
            self._purpose.write_text(json.dumps(purpose))
        self._context = ocp_v1.Context()
        saving = self._context.array.saving
        saving.storage_options.chunk_byte_size = CHUNK_BYTES
        saving.storage_options.shard_axes = (0,)
        saving.use_compression = False  # trained weights shrink by little, and compressing them is slower than the disk
        self._context.memory.deepcopy_host_arrays = False

    @property
    def written(self) -> frozenset[str]:
        """Names of the parameters that are on disk."""
        files = self._partial.glob("**/_METADATA")
        keys = (key for file in files for key in json.loads(file.read_text())["tree_metadata"].values())
        return frozenset("/".join(part["key"] for part in key["key_metadata"]) for key in keys)

    @property
    def bytes_written(self) -> int:
        return sum(file.stat().st_size for file in self._partial.rglob("*") if file.is_file())

    def write(self, values: dict[str, np.ndarray]) -> None:
        """Returns when these parameters, by name, are on disk. Raises `UserError` if it is full."""
        with self._context, _full_disk_named(self._partial):
            ocp_v1.partial.save(self._partial / "params", unflatten(values))

    def finish(self, record: Record) -> None:
        """Adds the record and moves all into place. Interrupted anywhere, it can be called again by a new writer."""
        params, step = self._partial / "params", self._partial / "checkpoints" / "0"
        with _full_disk_named(self._partial):
            if not params.exists() and not (step / "params").exists():
                with self._context:
                    ocp_v1.partial.finalize(params)
            with Checkpoints(self._partial / "checkpoints", keep=1) as checkpoints:
                checkpoints.save(0, None, record)
        if not (step / "params").exists():
            (params / "state").rename(step / "params")
        epath.Path(params).rmtree(missing_ok=True)
        self._purpose.unlink()
        if self.workdir.exists():
            self.workdir.rmdir()
        self._partial.rename(self.workdir)


@contextlib.contextmanager
def _full_disk_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # the storage library has only words for it
        if "No space left" not in str(error):
            raise
        raise UserError(f"{folder}: the disk is full; make space and run the same command, it goes on") from error


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
