"""Import: a folder in the Hugging Face (hf) format -> a checkpoint to start from, to continue or to talk with."""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from navil_jax.console import Progress
from navil_jax.convert.opened import OpenCheckpoint, open_checkpoint, require_whole
from navil_jax.convert.param_files import ParamsWriter
from navil_jax.convert.params import iterate_params
from navil_jax.convert.stored import PARAM_DTYPES, ParamDtype
from navil_jax.convert.writer import check_space
from navil_jax.errors import UserError
from navil_jax.train.checkpoint import Record

WRITE_BYTES = 64 << 20  # small parameters are written together


def import_checkpoint(source: Path, target: Path, tokenizer: str = "", dtype: ParamDtype | None = None) -> None:
    """Converts the folder of a NaViL or of a language model of a known family, parameter by parameter.

    A rerun after an interruption goes on with the parameters that are not written yet.

    Args:
      source: folder with config.json, weight files and tokenizer.
      target: new workdir; the checkpoint is its `checkpoints/0`.
      tokenizer: folder of the tokenizer, if the source has none.
      dtype: of all parameters; None: every parameter keeps its own.

    Raises:
      UserError: the source is not whole, holds a dtype that parameters cannot have, or the target is not empty.
    """
    with open_checkpoint(source, tokenizer) as checkpoint:
        if checkpoint.kind != "pytorch":
            raise UserError(f"{source}: is a checkpoint of this program already; start from it with config.init_from")
        words = require_whole(checkpoint)
        for warning in checkpoint.warnings:
            print(f"warning: {warning}")
        if not dtype and (others := checkpoint.dtypes.keys() - set(PARAM_DTYPES)):
            raise UserError(f"{source}: parameters in {', '.join(sorted(others))}; choose --dtype float32 or bfloat16")
        total = sum(
            math.prod(info.shape) * (np.dtype(dtype) if dtype else info.dtype).itemsize
            for info in checkpoint.info.values()
        )
        writer = ParamsWriter(target, {"import": fingerprint(checkpoint), "dtype": dtype})
        check_space(target.absolute().parent, total - writer.bytes_written)
        config = checkpoint.config
        params = iterate_params(config.model, checkpoint.tensors, skip=writer.written)
        write_params(writer, params, dtype, total)
        if dtype:
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, param_dtype=dtype))
        writer.finish(Record(config, words.files(), {}, checkpoint.origin))


def fingerprint(checkpoint: OpenCheckpoint) -> dict[str, list[int]]:
    """File -> size and time of change of every weight file, to tell whether an interrupted run can go on.

    Of a run's checkpoint: its folder -> step.
    """
    if checkpoint.kind == "orbax":
        return {str(checkpoint.path): [checkpoint.step]}
    files = {info.file for info in checkpoint.info.values()}
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}


def write_params(writer: ParamsWriter, params: Iterable[tuple[str, np.ndarray]], dtype: str | None, total: int) -> None:
    """Writes those parameters that are not written yet, in `dtype` if given, with progress in bytes of `total`."""
    done = writer.written
    waiting: dict[str, np.ndarray] = {}
    with Progress("parameters", total, "B", done=writer.bytes_written) as progress:

        def write() -> None:
            if waiting:
                writer.write(waiting)
            progress.update(sum(value.nbytes for value in waiting.values()))
            waiting.clear()

        for name, value in params:
            if name in done:
                continue
            waiting[name] = np.ascontiguousarray(value, dtype or value.dtype)
            del value
            if sum(value.nbytes for value in waiting.values()) >= WRITE_BYTES:
                write()
        write()
