"""Import: a folder in the Hugging Face (hf) format -> a checkpoint to start from, to continue or to talk with."""

import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path

import numpy as np

from navil_jax.console import Progress
from navil_jax.convert.opened import OpenCheckpoint, open_checkpoint, require_whole
from navil_jax.convert.param_files import ParamsWriter
from navil_jax.convert.params import iterate_layers, param_info
from navil_jax.convert.partial import partial_folder
from navil_jax.convert.stored import PARAM_DTYPES, ParamDtype, TensorInfo
from navil_jax.convert.writer import check_space
from navil_jax.errors import UserError
from navil_jax.train.checkpoint import Record


def import_checkpoint(source: Path, target: Path, tokenizer: str = "", dtype: ParamDtype | None = None) -> None:
    """Converts the folder of a NaViL or of a language model of a known family, layer by layer.

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
            raise UserError(
                f"{source}: parameters in {', '.join(sorted(others))}, which cannot be trained; choose --dtype float32 "
                "(holds every float16 value) or --dtype bfloat16 (holds their range, rounds them to 8 bits)"
            )
        config = checkpoint.config
        info = param_info(config.model, checkpoint.info, dtype)
        with partial_folder(target, {"import": fingerprint(checkpoint), "dtype": dtype}) as partial:
            with ParamsWriter(partial, info) as writer:
                write_params(writer, info, lambda done: iterate_layers(config.model, checkpoint.tensors, done))
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


def write_params(
    writer: ParamsWriter,
    info: Mapping[str, TensorInfo],
    layers: Callable[[Container[str]], Iterable[tuple[str, int | None, np.ndarray]]],
) -> None:
    """Writes the parameters that are not written yet, layer by layer, with progress in bytes.

    Args:
      writer: of these parameters.
      info: their shapes and dtypes.
      layers: gives name, layer and value of all but those that are done.

    Raises:
      UserError: the disk is too small, or a value is beyond the range of its dtype.
    """
    total, done = sum(x.nbytes for x in info.values()), writer.bytes_written
    check_space(writer.folder, total - done)
    with Progress("parameters", total, "B", done=done) as progress:
        for name, layer, value in layers(frozenset(writer.written)):
            writer.write(name, layer, value)
            progress.update(value.size * info[name].dtype.itemsize if name not in writer.written else 0)
