"""open_checkpoint: one view of every kind of folder with weights, to be asked, trained on, exported and verified."""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jax.typing import DTypeLike

from navil_jax.config import SPECIAL_TOKENS, Config, DataConfig, ModelConfig
from navil_jax.convert import hf_config
from navil_jax.convert.accepted import drop_what_is_no_parameter
from navil_jax.convert.families import find
from navil_jax.convert.hf_files import other_preprocessing
from navil_jax.convert.hub import folder_of
from navil_jax.convert.kept import kept_files, license_lines
from navil_jax.convert.param_files import ParamsReader
from navil_jax.convert.params import TensorView, find_problems, iterate_params, tensor_info
from navil_jax.convert.reader import TensorFolder
from navil_jax.convert.stored import TensorInfo, cast, check_finite, listed
from navil_jax.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_from_files
from navil_jax.data.tokenizers.base import JSON_FILE, check_vocabulary
from navil_jax.errors import UserError
from navil_jax.model import lora
from navil_jax.model import params as model_params
from navil_jax.model.params import Params, flatten, unflatten
from navil_jax.paths import is_remote, local_path, path_of
from navil_jax.train.checkpoint import Checkpoints, Record, find_checkpoints, has_steps

TOKENIZER_FILES = ("tokenizer.model", JSON_FILE, "vocab.json")
ANY_IDS = tuple(range(len(SPECIAL_TOKENS)))  # shapes depend on their number alone


class Contents(NamedTuple):
    """The tensors of a checkpoint, by the names and in the layouts of Hugging Face folders; read when asked for.

    Attributes:
      tensors: name -> value.
      info: shape and dtype of every tensor, in the order in which reading is fastest.
      problems: what keeps it from being the model of its config; empty for a whole one.
    """

    tensors: Mapping[str, np.ndarray]
    info: Mapping[str, TensorInfo]
    problems: list[str]


@dataclasses.dataclass(frozen=True)
class OpenCheckpoint:
    """What a checkpoint holds. Nothing but its config and tokenizer is read before it is asked for.

    Attributes:
      path: the folder; of a hub id, where it was downloaded to.
      kind: orbax for the workdir of a run, pytorch for a folder of the Hugging Face layout.
      config: model, images, and the prompt's part of data are those of the checkpoint; without a tokenizer,
        `config.model.special_token_ids` is empty. Low-rank updates count as part of their kernels.
      tokenizer: None if the folder has none.
      open_contents: gives `contents`.
      record: of the run; None for a Hugging Face folder.
      warnings: fields of config.json that are not known here, and tensors that are not read.
      origin: what is kept of an imported folder; see `checkpoint.Record`.
      step: finished training steps; 0 for a Hugging Face folder.
      averaged: whether running averages stand in the place of the trained parameters.
    """

    path: epath.Path
    kind: Literal["orbax", "pytorch"]
    config: Config
    tokenizer: Tokenizer | None
    open_contents: Callable[[], Contents]
    record: Record | None = None
    warnings: tuple[str, ...] = ()
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    step: int = 0
    averaged: bool = False

    @functools.cached_property
    def contents(self) -> Contents:
        """The headers of all tensors. Raises `UserError` for a run that is not on a local disk."""
        return self.open_contents()

    tensors = property(lambda self: self.contents.tensors)
    info = property(lambda self: self.contents.info)
    problems = property(lambda self: self.contents.problems)

    def params(self) -> Params:
        """All parameters at once on the host, in their dtype on disk. The checkpoint must have no problems."""
        return unflatten(dict(iterate_params(self.config.model, self.tensors)))

    @property
    def dtypes(self) -> dict[str, int]:
        """Name of a dtype -> bytes in it, the largest share first."""
        sizes: collections.Counter[str] = collections.Counter()
        for tensor in self.info.values():
            sizes[tensor.dtype.name] += tensor.nbytes
        return dict(sizes.most_common())

    def restore(
        self,
        model: ModelConfig,
        mesh: Mesh,
        dtypes: Mapping[str, DTypeLike] | None = None,
        seed: int = 0,
        averaged: bool = True,
    ) -> Params:
        """The parameters on the devices that hold them, each process reading its own shards where the format can.

        Low-rank updates that the checkpoint has and `model` has not, or of another rank or scale, go into their
        kernels; new ones start at zero.

        Args:
          model: that of the checkpoint, but for how it is computed and for low-rank updates.
          mesh: devices to spread the parameters over.
          dtypes: name of a parameter -> the dtype to read it in; others stay as they are on disk.
          seed: of new low-rank updates.
          averaged: whether running averages are read where the run's evaluations use them.

        Raises:
          UserError: the checkpoint is not whole, holds other parameters, or values that are infinite or no numbers.
        """
        if self.record is None:
            require_whole(self)
            theirs = dataclasses.replace(model, lora_rank=0)
            params = self._put(theirs, flatten(model_params.abstract_on(theirs, mesh, dtypes)))
        else:
            saved = self.record.config.model
            theirs = dataclasses.replace(model, lora_rank=saved.lora_rank, lora_scale=saved.lora_scale)
            with Checkpoints(find_checkpoints(self.path)) as checkpoints:
                wanted = model_params.abstract_on(theirs, mesh, {**checkpoints.param_dtypes, **(dtypes or {})})
                params = checkpoints.restore_params(wanted, averaged)
        return params if theirs == model else _with_updates(model, mesh, params, theirs, seed)

    def _put(self, model: ModelConfig, wanted: dict[str, jax.ShapeDtypeStruct]) -> Params:
        """One parameter after the other, so that the host never holds all."""
        params = {}
        for name, value in iterate_params(model, self.tensors):
            check_finite(f"{self.path}: {name}", value)
            shape, sharding = value.shape, wanted[name].sharding
            shard = lambda index, name=name, value=value: cast(name, value[index], wanted[name].dtype)  # noqa: E731
            params[name] = jax.make_array_from_callback(shape, sharding, shard)
        return unflatten(params)


@contextlib.contextmanager
def open_checkpoint(path: str | Path, tokenizer: str = "", ema: bool | None = None) -> Iterator[OpenCheckpoint]:
    """Opens a checkpoint without reading its tensors; which format it has is told by its files.

    Args:
      path: a Hugging Face folder, the workdir of a run, its `checkpoints` folder, the newest checkpoint in there, or
        an id on the Hugging Face hub (`hub.folder_of`).
      tokenizer: folder of the tokenizer, for a Hugging Face folder that has none.
      ema: running averages of the trained parameters in their place; None: where the run's evaluations use them.

    Raises:
      UserError: neither format, a damaged file, or an architecture that is not known.
    """
    folder = folder_of(path)
    if not folder.exists():
        raise UserError(
            f"{path}: no such folder; give a Hugging Face folder with config.json, the workdir of a run, or an id on "
            "the hub such as OpenGVLab/NaViL-2B"
        )
    entries = {entry.name for entry in folder.iterdir()} if folder.is_dir() else {"config.json"}
    if not folder.name.isdecimal() and not any(n.isdecimal() or n in ("config.json", "checkpoints") for n in entries):
        raise UserError(
            f"{path}: holds neither config.json, as a Hugging Face folder does, nor checkpoints, as a run does"
        )
    if folder.is_dir() and (folder / "config.json").exists():
        yield _open_pytorch(local_path(folder), tokenizer)
        return
    with contextlib.ExitStack() as stack:
        yield _open_orbax(folder, ema, stack)


@contextlib.contextmanager
def open_start(config: Config, planned: bool = False) -> Iterator[OpenCheckpoint | None]:
    """What a run goes on from: the newest checkpoint of its workdir, else what `config.init_from` names, else None.

    Args:
      planned: whether `init_from` need not exist yet, as in a look at the second stage before the first one has run.

    Raises:
      UserError: what it names cannot be opened, or the model is of no family that could be exported.
    """
    find(config.model.decoder.family)
    workdir = path_of(config.workdir) if config.workdir else None
    begun = workdir is not None and (workdir / "checkpoints").is_dir() and has_steps(workdir / "checkpoints")
    name = config.workdir if begun else config.init_from
    if not name or (not begun and planned and not path_of(name).exists()):
        yield None
        return
    with open_checkpoint(name) as opened:
        yield opened


def _open_orbax(path: epath.Path, ema: bool | None, stack: contextlib.ExitStack) -> OpenCheckpoint:
    with Checkpoints(find_checkpoints(path)) as checkpoints:
        record, step = checkpoints.record(), checkpoints.latest_step or 0
        averaged = bool(checkpoints.averages) if ema is None else ema
    model = dataclasses.replace(record.config.model, lora_rank=0)

    def contents() -> Contents:
        folder = local_path(checkpoints.folder) / str(step)
        reader = stack.enter_context(ParamsReader(folder, record.config.model.lora_scale, averaged))
        problems = reader.problems(model)
        info = {} if problems else tensor_info(model, reader.info)
        return Contents(TensorView(model, reader.read), info, problems)

    if ema and not is_remote(path):
        contents()  # says now that there are no running averages
    tokenizer = tokenizer_from_files(record.tokenizer, str(path))
    config = dataclasses.replace(record.config, model=model)
    return OpenCheckpoint(
        path,
        "orbax",
        config,
        tokenizer,
        contents,
        record=record,
        origin=record.origin,
        step=step,
        averaged=averaged,
    )


def _open_pytorch(path: Path, tokenizer: str) -> OpenCheckpoint:
    file = path / hf_config.FILE
    said, folder = hf_config.read_config(path), TensorFolder(path)
    has_words = any((path / name).is_file() for name in TOKENIZER_FILES)
    words = load_tokenizer(tokenizer or path) if tokenizer or has_words else None
    special = words.special_token_ids if words and "llm_config" in said else ()
    bfloat16 = all(tensor.dtype.name == "bfloat16" for tensor in folder.tensors.values())
    model = hf_config.model_config(said, special, file, param_dtype="bfloat16" if bfloat16 else "float32")
    if words:
        check_vocabulary(words, model.decoder.vocab_size, str(file))
    data = DataConfig(**hf_config.prompt_config(said, file))
    config = Config(model=model, images=hf_config.image_config(said, file), data=data)
    unknown = tuple(f"{file}: {key} is not known here" for key in hf_config.unknown_fields(said, file))
    unknown += tuple(other_preprocessing(path, config))
    lacks_ids = model.vision and not model.special_token_ids
    with_ids = dataclasses.replace(model, special_token_ids=ANY_IDS) if lacks_ids else model
    unknown += tuple(drop_what_is_no_parameter(folder, with_ids, str(path)))
    problems = find_problems(with_ids, folder.tensors)
    origin = {"config.json": said, "name": path.resolve().name}
    kept, left = kept_files(path)
    origin |= {"files": kept, "license": license_lines(path)}
    contents = Contents(folder, folder.tensors, problems)
    said_of_it = (*unknown, *left)
    return OpenCheckpoint(path_of(path), "pytorch", config, words, lambda: contents, warnings=said_of_it, origin=origin)


def require_whole(checkpoint: OpenCheckpoint) -> Tokenizer:
    """The tokenizer; a `UserError` lists the problems of a checkpoint, or says that its tokenizer is missing."""
    if checkpoint.problems:
        raise UserError(f"{checkpoint.path}: does not fit the model of its config: {listed(checkpoint.problems)}")
    if checkpoint.tokenizer is None:
        file = find(checkpoint.config.model.decoder.family).tokenizer.FILES[0]
        raise UserError(f"{checkpoint.path}: holds no tokenizer; give the folder of one ({file}) with --tokenizer")
    return checkpoint.tokenizer


def _with_updates(model: ModelConfig, mesh: Mesh, params: Params, theirs: ModelConfig, seed: int) -> Params:
    """Merges the updates in `params`, and adds fresh ones where `model` has some."""

    def adapt(matrices: dict[str, jax.Array], updates: dict[str, jax.Array]) -> Params:
        known = flatten(lora.merged(unflatten(matrices | updates), theirs.lora_scale))
        return unflatten(flatten(model_params.initialise(model, seed)) | known if model.lora_rank else known)

    updates = {name: x for name, x in flatten(params).items() if name.endswith((f"/{lora.A}", f"/{lora.B}"))}
    matrices = {name: x for name, x in flatten(params).items() if name not in updates}
    return jax.jit(adapt, out_shardings=model_params.shardings(model, mesh), donate_argnums=0)(matrices, updates)
