"""Export: a checkpoint -> a folder in the Hugging Face (hf) format of the release, which the released code loads."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from navil_jax.console import Progress
from navil_jax.convert.hf_config import to_hf_config
from navil_jax.convert.hf_files import write_companions
from navil_jax.convert.opened import OpenCheckpoint, open_checkpoint, require_whole
from navil_jax.convert.partial import partial_folder
from navil_jax.convert.stored import SHARD_BYTES, TensorInfo, cast
from navil_jax.convert.writer import write_safetensors
from navil_jax.errors import UserError


def export_checkpoint(
    source: Path, target: Path, dtype: str = "", shard_bytes: int = SHARD_BYTES, ema: bool | None = None
) -> bool:
    """Writes config.json, sharded safetensors with their index, tokenizer, preprocessing and a model card.

    All stands in `<target>.partial` until it is complete. A rerun after an interruption keeps the shards that are
    complete.

    Args:
      source: workdir of a run, its `checkpoints` folder, or the newest checkpoint in there.
      target: new folder.
      dtype: float32 or bfloat16; empty: every parameter keeps its own.
      shard_bytes: most bytes of one weight file.
      ema: running averages of the trained parameters in their place; None: where the run's evaluations use them.

    Returns:
      Whether running averages were written.

    Raises:
      UserError: the source is not whole, its model has no place in the Hugging Face format (see
        `hf_config.check_exportable`), or the target is not empty.
    """
    with open_checkpoint(source, ema=ema) as checkpoint:
        if checkpoint.kind != "orbax":
            raise UserError(f"{source}: is a PyTorch folder already")
        tokenizer = require_whole(checkpoint)
        info = _written(checkpoint, dtype)
        hf = to_hf_config(checkpoint.config, checkpoint.origin.get("config.json"), _dtype_of(info))
        whose = str(source.resolve()), checkpoint.path.stat().mtime, checkpoint.step, checkpoint.averaged
        with partial_folder(target, {"export": whose, "dtype": dtype, "shard_bytes": shard_bytes}) as partial:
            write_weights(checkpoint, partial, info, shard_bytes)
            files, where = tokenizer.files(), str(source.resolve())
            write_companions(partial, hf, checkpoint.config, files, where, checkpoint.step, checkpoint.origin)
    return checkpoint.averaged


def _written(checkpoint: OpenCheckpoint, dtype: str) -> dict[str, TensorInfo]:
    """Shape and dtype of every tensor that is written."""
    wanted = np.dtype(dtype) if dtype else None
    return {name: TensorInfo(tensor.shape, wanted or tensor.dtype) for name, tensor in checkpoint.info.items()}


def _dtype_of(info: Mapping[str, TensorInfo]) -> str:
    """The one dtype that loses nothing of these tensors: what the transformers library is to load them in."""
    names = {tensor.dtype.name for tensor in info.values()}
    return names.pop() if len(names) == 1 else "float32"


def write_weights(
    checkpoint: OpenCheckpoint, folder: Path, info: Mapping[str, TensorInfo], shard_bytes: int = SHARD_BYTES
) -> None:
    """The weight files, tensor by tensor, with progress in bytes. Errors as in `stored.cast`."""
    total = sum(tensor.nbytes for tensor in info.values())
    with Progress("tensors", total, "B") as progress:

        def value(name: str) -> np.ndarray:
            progress.update(info[name].nbytes)
            return cast(name, checkpoint.tensors[name], info[name].dtype)

        metadata = {"source": f"{checkpoint.path.name} step {checkpoint.step}"}
        write_safetensors(folder, info, value, shard_bytes, metadata)
