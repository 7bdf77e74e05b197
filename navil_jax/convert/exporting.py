"""Export: a checkpoint -> a folder in the Hugging Face (hf) format of the release, which the released code loads."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from navil_jax.console import Progress
from navil_jax.convert.hf_config import to_hf_config
from navil_jax.convert.hf_files import write_companions
from navil_jax.convert.opened import OpenCheckpoint, open_checkpoint, require_whole
from navil_jax.convert.stored import SHARD_BYTES, TensorInfo
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
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: is not empty; give a new folder")
    with open_checkpoint(source, ema=ema) as checkpoint:
        if checkpoint.kind != "orbax":
            raise UserError(f"{source}: is a PyTorch folder already")
        tokenizer = require_whole(checkpoint)
        hf = to_hf_config(checkpoint.config, checkpoint.origin.get("config.json"), dtype or None)
        partial = target.with_name(f"{target.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        write_weights(checkpoint, partial, dtype, shard_bytes)
        base = checkpoint.origin.get("name", "")
        files = tokenizer.files()
        write_companions(partial, hf, checkpoint.config, files, str(source.resolve()), checkpoint.step, base)
    if target.exists():
        target.rmdir()
    partial.rename(target)
    return checkpoint.averaged


def write_weights(checkpoint: OpenCheckpoint, folder: Path, dtype: str, shard_bytes: int) -> None:
    """The weight files, tensor by tensor, with progress in bytes."""
    wanted = np.dtype(dtype) if dtype else None
    info: Mapping[str, TensorInfo] = {
        name: TensorInfo(tensor.shape, wanted or tensor.dtype) for name, tensor in checkpoint.info.items()
    }
    total = sum(tensor.nbytes for tensor in info.values())
    with Progress("tensors", total, "B") as progress:

        def value(name: str) -> np.ndarray:
            progress.update(info[name].nbytes)
            return checkpoint.tensors[name].astype(info[name].dtype, copy=False)

        metadata = {"source": f"{checkpoint.path.name} step {checkpoint.step}"}
        write_safetensors(folder, info, value, shard_bytes, metadata)
