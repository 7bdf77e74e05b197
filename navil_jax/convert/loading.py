"""load_pretrained and load_assistant: a checkpoint of any kind as a model in memory, or as one that answers."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh
from PIL import Image

from navil_jax.config import Config, ImageConfig, MeshConfig
from navil_jax.convert.exporting import export_checkpoint
from navil_jax.convert.opened import open_checkpoint
from navil_jax.data.tokenizers import Tokenizer
from navil_jax.data.tokenizers.base import check_vocabulary
from navil_jax.errors import UserError
from navil_jax.generate.assistant import Assistant, check_asked
from navil_jax.generate.engine import MAX_TOKENS, Engine
from navil_jax.generate.sampling import Sampler
from navil_jax.model import params as model_params
from navil_jax.model.navil import NaViL
from navil_jax.model.params import Params
from navil_jax.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model with what belongs to it.

    Attributes:
      path: the folder that it was read from.
      config: of the run, or what the folder's config.json says of model, images and prompt.
      tokenizer: of the checkpoint; None if it has none.
      params: nested dicts of arrays on the devices of `mesh`.
    """

    path: str
    config: Config
    tokenizer: Tokenizer | None
    params: Params
    mesh: Mesh

    @functools.cached_property
    def model(self) -> NaViL:
        """The Flax module with its parameters."""
        return model_params.bind(self.config.model, self.params)

    @property
    def images(self) -> ImageConfig:
        """How images are prepared for it: `data.images.image_patches(image, images, config.model.vision)`."""
        return self.config.images

    @functools.cached_property
    def assistant(self) -> Assistant:
        """What answers; programs that it has compiled are kept. Raises `UserError` where there is no tokenizer."""
        if self.tokenizer is None:
            raise UserError(f"{self.path}: holds no tokenizer; copy the files of one into the folder")
        return Assistant(self.config, self.tokenizer, Engine(self.config.model, self.params, self.mesh))

    def ask(
        self,
        question: str,
        images: Sequence[str | Path | bytes | Image.Image] = (),
        sampler: Sampler | None = None,
        max_new_tokens: int = 1024,
    ) -> str:
        """The answer to one question about some images; without a `sampler`, the likeliest tokens.

        Raises:
          UserError: an image cannot be read, the question is empty, or the prompt is too long.
          TypeError: says what to give instead.

        Example: loaded.ask("What animal is this?", ["cat.png"]) -> "A cat."
        """
        check_asked(question, images, sampler, max_new_tokens)
        patches = [self.assistant.read_image(image) for image in images]
        return "".join(self.assistant.answer((), question, patches, sampler or Sampler(), max_new_tokens))

    def export(self, folder: str | Path, dtype: str = "") -> None:
        """Writes the checkpoint it was read from in the release's format; see `exporting.export_checkpoint`."""
        export_checkpoint(Path(self.path), Path(folder), dtype)


def load_pretrained(path: str | Path, mesh: Mesh | None = None, tokenizer: str = "") -> Pretrained:
    """See `navil_jax.load_pretrained`."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: give the name of a folder, a str or a Path, not {type(path).__name__}")
    if not os.fspath(path):
        raise UserError("path: is empty; give a folder, or an id on the hub")
    mesh = mesh or make_mesh(MeshConfig())
    with open_checkpoint(path, tokenizer) as checkpoint:
        model = checkpoint.config.model
        params = checkpoint.restore(model, mesh)
        return Pretrained(str(checkpoint.path), checkpoint.config, checkpoint.tokenizer, params, mesh)


def load_assistant(
    path: str | Path,
    mesh: Mesh,
    slots: int = 1,
    max_tokens: int = MAX_TOKENS,
    reuse: bool = False,
    int8: bool = False,
) -> Assistant:
    """A checkpoint that answers, with its weights in the dtype they are computed in.

    They are those that the run's evaluations use: running averages, where they do, in float32.

    Args:
      path: as in `open_checkpoint`.
      mesh: devices to spread the parameters over.
      slots, max_tokens, reuse: as in `Engine`.
      int8: whether the matrices of the decoder's layers are rounded to 8 bits.

    Raises:
      UserError: missing, empty, incomplete or of another kind, or without its tokenizer.
    """
    with open_checkpoint(path) as checkpoint:
        config, tokenizer = checkpoint.config, checkpoint.tokenizer
        if checkpoint.record is not None:  # its updates stay apart, as its evaluations have them
            config = checkpoint.record.config
        if tokenizer is None:
            raise UserError(f"{path}: holds no tokenizer; copy the files of one into the folder")
        check_vocabulary(tokenizer, config.model.decoder.vocab_size, str(path))
        if config.model.special_token_ids and config.model.special_token_ids != tokenizer.special_token_ids:
            raise UserError(f"{path}: the ids of special tokens in its tokenizer and its config.model differ")
        params = checkpoint.restore(config.model, mesh, model_params.computed_dtypes(config.model))
        if int8:
            params = model_params.with_int8(config.model, params)
    engine = Engine(config.model, params, mesh, max_tokens, slots, reuse)
    return Assistant(config, tokenizer, engine, checkpoint.averaged)
