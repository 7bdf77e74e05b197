"""A trained model that answers questions about images: checkpoint -> prompts, tokens and streamed text."""

import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from navil_jax.batch import SampleFeatures
from navil_jax.config import Config, ModelConfig
from navil_jax.data.features import patch_features
from navil_jax.data.images import ImagePatches, image_patches, load_image
from navil_jax.data.prompt import END, Turns, encode_prompt, response_text
from navil_jax.data.tokenizers.base import Tokenizer
from navil_jax.errors import UserError
from navil_jax.generate.engine import Chooser, Engine
from navil_jax.model import params as model_params
from navil_jax.model.params import Params
from navil_jax.train.checkpoint import Checkpoints, find_checkpoints

# The released decoding joins at most that many characters anew when more text comes (the length of "<|im_end|>").
UNSETTLED = len(END)


@dataclasses.dataclass(frozen=True)
class Assistant:
    """A model with what it takes to talk to it.

    Example:
      assistant = load("runs/x", mesh)
      image = assistant.read_image("cat.png")
      "".join(assistant.answer((), "What is this?", [image], Sampler(), max_new_tokens=64)) -> "A cat."
    """

    config: Config
    tokenizer: Tokenizer
    engine: Engine
    averaged: bool = False  # whether the parameters are running averages

    @property
    def stop_id(self) -> int:
        return self.tokenizer.token_id(END)

    def read_image(self, source: str | Path | bytes | Image.Image) -> ImagePatches:
        """An image's patches. Raises `UserError` if it cannot be read, or the model has no vision part."""
        if self.config.model.vision is None:
            raise UserError("the model has no vision part; ask without images")
        return image_patches(load_image(source), self.config.images, self.config.model.vision)

    def prompt(self, history: Turns, question: str, images: Sequence[ImagePatches]) -> SampleFeatures:
        """All features of the conversation up to where the next answer starts.

        Args:
          history: earlier questions, with their `<image>`, and answers.
          images: of the whole conversation; the i-th `<image>` of all questions stands for the i-th one. If no
            question has one, they go in front of the first.

        Raises:
          UserError: another number of `<image>` than of images.
        """
        data, vision = self.config.data, self.config.model.vision
        grids = [image.grids for image in images]
        merge_size = vision.merge_size if vision else 2
        tokens = encode_prompt(self.tokenizer, data.template, data.system_message, history, question, grids, merge_size)
        numbers = dict.fromkeys(("text_source_ids", "text_sample_ids"), np.zeros(len(tokens["text_tokens"]), np.int32))
        return {**tokens, **numbers, **patch_features(images, self.config)}

    def answer(
        self,
        history: Turns,
        question: str,
        images: Sequence[ImagePatches],
        choose: Chooser,
        max_new_tokens: int,
    ) -> Iterator[str]:
        """Pieces of the answer as they become final; arguments and errors as in `prompt` and `Engine.stream`."""
        prompt = self.prompt(history, question, images)
        tokens = (row[0] for row in self.engine.stream([prompt], choose, max_new_tokens, self.stop_id))
        return stream_text(self.tokenizer, tokens)


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Pieces that join to `response_text` of all tokens, each as soon as later tokens cannot change it.

    Incomplete UTF-8, blanks that punctuation may draw in, and the start of what may be a marker are held back.

    Example: tokens of "a", "b", " ", ".", first byte of "é", second byte -> "ab", ".", "é"
    """
    ids: list[int] = []
    shown, text = 0, ""
    for token in tokens:
        ids.append(token)
        text = response_text(tokenizer, ids)
        if "<" in tokenizer.decode(ids, skip_special=True)[-UNSETTLED:]:
            continue
        tail = max(0, len(text) - UNSETTLED)
        unsettled = re.search(r"[\s\ufffd]", text[tail:])
        settled = tail + unsettled.start() if unsettled else len(text)
        if settled > shown:
            yield text[shown:settled]
            shown = settled
    if len(text) > shown:
        yield text[shown:]


def load(folder: str | Path, mesh: Mesh) -> Assistant:
    """The newest checkpoint of a training run, with its weights in the dtype they are computed in.

    They are those that the run's evaluations use: running averages, where they do.

    Args:
      folder: workdir of a run, its `checkpoints` folder, or the newest checkpoint in there; local or gs://.
      mesh: devices to spread the parameters over.

    Raises:
      UserError: missing, empty, incomplete or of another kind, or without its tokenizer.
    """
    with Checkpoints(find_checkpoints(folder)) as checkpoints:
        record = checkpoints.record()
        tokenizer = Tokenizer.from_files(record.tokenizer)
        _check_tokenizer(tokenizer, record.config.model, folder)
        averages = checkpoints.averages
        params = checkpoints.restore_params(_wanted(record.config.model, mesh, averages))
    return Assistant(record.config, tokenizer, Engine(record.config.model, params, mesh), bool(averages))


def _check_tokenizer(tokenizer: Tokenizer, model: ModelConfig, path: str | Path) -> None:
    if tokenizer.vocab_size > model.decoder.vocab_size:
        raise UserError(f"{path}: its tokenizer has {tokenizer.vocab_size} ids, its model {model.decoder.vocab_size}")
    if model.special_token_ids and model.special_token_ids != tokenizer.special_token_ids:
        raise UserError(f"{path}: the ids of special tokens in its tokenizer and its config.model differ")


def _wanted(config: ModelConfig, mesh: Mesh, averages: Collection[str]) -> Params:
    """What to restore. Every product casts its matrix anyway, so reading it in that dtype changes nothing.

    Everything else keeps its dtype; `averages` are float32, as evaluations have them.
    """

    def leaf(name: str, shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        own = jnp.float32 if name in averages else shape.dtype
        dtype = config.compute_dtype if name.endswith(("kernel", "embedding")) else own
        return jax.ShapeDtypeStruct(shape.shape, dtype, sharding=sharding)

    shapes = model_params.flatten(model_params.shapes(config))
    shardings = model_params.flatten(model_params.shardings(config, mesh))
    return model_params.unflatten({name: leaf(name, shape, shardings[name]) for name, shape in shapes.items()})
