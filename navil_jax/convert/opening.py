"""One view of a checkpoint in either format: a PyTorch folder, or the workdir of a run."""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from navil_jax.config import SPECIAL_TOKENS, Config, DataConfig
from navil_jax.convert import hf_config as released_config
from navil_jax.convert.param_files import ParamsReader
from navil_jax.convert.params import TensorView, find_problems, iterate_params, tensor_info
from navil_jax.convert.reader import TensorFolder
from navil_jax.convert.stored import TensorInfo, listed
from navil_jax.data.tokenizers.base import JSON_FILE, Tokenizer, check_vocabulary
from navil_jax.errors import UserError
from navil_jax.model import params as model_params
from navil_jax.paths import local_path
from navil_jax.train.checkpoint import Checkpoints, find_checkpoints

TOKENIZER_FILES = ("tokenizer.model", JSON_FILE, "vocab.json")

ANY_IDS = tuple(range(len(SPECIAL_TOKENS)))  # shapes depend on their number alone


@dataclasses.dataclass(frozen=True)
class OpenCheckpoint:
    """What a checkpoint holds; its tensors are read when they are asked for.

    Attributes:
      path: as given.
      kind: orbax for the workdir of a run, pytorch for a folder of the Hugging Face layout.
      config: model, images, and the prompt's part of data are those of the checkpoint; without a tokenizer,
        `config.model.special_token_ids` is empty.
      tokenizer: None if the folder has none.
      tensors: in the names and layouts of PyTorch checkpoints, whatever the kind.
      info: shape and dtype of every tensor, in the order in which reading is fastest.
      problems: what keeps it from being the model of its config; empty for a whole one.
      warnings: fields of config.json that are not known here.
      origin: what is kept of an imported folder; see `checkpoint.Record`.
      step: finished training steps; 0 for a PyTorch folder.
      averaged: whether running averages stand in the place of the trained parameters.
      combined: whether the tensors are made of several parameters on disk: low-rank updates, running averages.
    """

    path: Path
    kind: Literal["orbax", "pytorch"]
    config: Config
    tokenizer: Tokenizer | None
    tensors: Mapping[str, np.ndarray]
    info: Mapping[str, TensorInfo]
    problems: list[str]
    warnings: list[str]
    origin: dict[str, Any]
    step: int = 0
    averaged: bool = False
    combined: bool = False

    def params(self) -> model_params.Params:
        """All parameters at once, in their dtype on disk. The checkpoint must have no problems."""
        return model_params.unflatten(dict(iterate_params(self.config.model, self.tensors)))

    @property
    def dtypes(self) -> dict[str, int]:
        """Name of a dtype -> bytes in it, the largest part first."""
        sizes = collections.Counter()
        for tensor in self.info.values():
            sizes[tensor.dtype.name] += tensor.nbytes
        return dict(sizes.most_common())


@contextlib.contextmanager
def open_checkpoint(path: str | Path, tokenizer: str = "", ema: bool | None = None) -> Iterator[OpenCheckpoint]:
    """Opens a checkpoint without reading its tensors; which format it has is told by its files.

    Args:
      path: a PyTorch folder, the workdir of a run, its `checkpoints` folder, or the newest checkpoint in there.
      tokenizer: folder of the tokenizer, for a PyTorch folder that has none.
      ema: running averages of the trained parameters in their place; None: where the run's evaluations use them.

    Raises:
      UserError: neither format, a damaged file, or an architecture that is not known.
    """
    path = local_path(path)
    if not path.exists():
        raise UserError(f"{path}: no such folder; give a PyTorch folder with config.json, or the workdir of a run")
    entries = {entry.name for entry in path.iterdir()} if path.is_dir() else {"config.json"}
    if not path.name.isdecimal() and not any(n.isdecimal() or n in ("config.json", "checkpoints") for n in entries):
        raise UserError(f"{path}: holds neither config.json, as a PyTorch folder does, nor checkpoints, as a run does")
    if path.is_dir() and (path / "config.json").exists():
        yield _open_pytorch(path, tokenizer)
        return
    with Checkpoints(find_checkpoints(path)) as checkpoints:
        record, step = checkpoints.record(), checkpoints.latest_step
        averaged = bool(checkpoints.averages) if ema is None else ema
    lora_scale, combined = record.config.model.lora_scale, averaged or record.config.model.lora_rank > 0
    with ParamsReader(Path(checkpoints.folder) / str(step), lora_scale, averaged) as reader:
        model = dataclasses.replace(record.config.model, lora_rank=0)
        config = dataclasses.replace(record.config, model=model)
        problems = reader.problems(model)
        info = {} if problems else tensor_info(model, reader.info)
        tensors = TensorView(model, reader.read)
        words = Tokenizer.from_files(record.tokenizer)
        found = (tensors, info, problems, [], record.origin, step, averaged, combined)
        yield OpenCheckpoint(path, "orbax", config, words, *found)


def _open_pytorch(path: Path, tokenizer: str) -> OpenCheckpoint:
    file = path / released_config.FILE
    released, folder = released_config.read_config(path), TensorFolder(path)
    has_words = any((path / name).is_file() for name in TOKENIZER_FILES)
    words = Tokenizer.load(tokenizer or path) if tokenizer or has_words else None
    special = words.special_token_ids if words and "llm_config" in released else ()
    bfloat16 = all(tensor.dtype.name == "bfloat16" for tensor in folder.tensors.values())
    model = released_config.model_config(released, special, file, param_dtype="bfloat16" if bfloat16 else "float32")
    if words:
        check_vocabulary(words, model.decoder.vocab_size, str(file))
    data = DataConfig(**released_config.prompt_config(released, file))
    config = Config(model=model, images=released_config.image_config(released, file), data=data)
    unknown = [f"{file}: {key} is not known here" for key in released_config.unknown_fields(released, file)]
    with_ids = (
        model if model.special_token_ids or not model.vision else dataclasses.replace(model, special_token_ids=ANY_IDS)
    )
    problems = find_problems(with_ids, folder.tensors)
    origin = {"config.json": released, "name": path.resolve().name}
    return OpenCheckpoint(path, "pytorch", config, words, folder, folder.tensors, problems, unknown, origin)


def require_whole(checkpoint: OpenCheckpoint) -> None:
    """Raises a `UserError` that lists the problems of a checkpoint, or says that its tokenizer is missing."""
    if checkpoint.problems:
        raise UserError(f"{checkpoint.path}: does not fit the model of its config: {listed(checkpoint.problems)}")
    if checkpoint.tokenizer is None:
        raise UserError(f"{checkpoint.path}: holds no tokenizer; give the folder of one with --tokenizer")
