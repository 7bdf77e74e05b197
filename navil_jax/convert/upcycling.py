"""Upcycling: a pre-trained language model and a recipe -> a NaViL to train from (paper, finding 1; section 3.3)."""

import dataclasses
from collections.abc import Container, Iterator
from pathlib import Path

import jax
import numpy as np

from navil_jax.config import Config, ModelConfig, validate
from navil_jax.convert.importing import fingerprint, write_params
from navil_jax.convert.opened import OpenCheckpoint, open_checkpoint, require_whole
from navil_jax.convert.param_files import ParamsWriter
from navil_jax.convert.params import iterate_layers
from navil_jax.convert.partial import partial_folder
from navil_jax.convert.stored import TensorInfo
from navil_jax.data.tokenizers import Tokenizer
from navil_jax.data.tokenizers.base import with_special_tokens
from navil_jax.errors import UserError
from navil_jax.model import params as model_params
from navil_jax.sharding import check_jax_settings
from navil_jax.train.checkpoint import Record

VOCABULARY = ("decoder/embed/embedding", "decoder/head/kernel")  # [V, H] and [H, V]
# Fields of the decoder in which the recipe may differ from the pre-trained model: what NaViL adds to it.
ADDED = ("vocab_size", "attention_experts", "ffn_experts", "serial_visual_output", "pad_token_id")


def initialise_from(language_model: Path, recipe: Config, target: Path, tokenizer: str = "") -> None:
    """Writes a checkpoint whose text path is the pre-trained model, ready for the first stage.

    - Text weights and norms are taken over, in `recipe.model.param_dtype`.
    - Visual experts are copies of the text experts. Where a visual token's output passes wo_ve after wo (InternLM2),
      wo_ve is the identity. So at step 0 every token, visual ones too, is computed as the pre-trained model does.
    - The vocabulary grows by the special tokens: their rows of the embedding and columns of the head are the mean of
      those that the tokenizer used before.
    - Vision encoder, connector and special token embedding are fresh, from `recipe.seed`.

    Args:
      language_model: folder of a known family in the Hugging Face layout, or the workdir of a run that trained one.
      recipe: its model is built; its decoder must be the language model's, but for what NaViL adds.
      target: new workdir, for `config.init_from` of the first stage.
      tokenizer: folder of the tokenizer, if the language model's has none.

    Raises:
      UserError: the folder is not whole, is a NaViL already, or is another model than the recipe's decoder.
    """
    check_jax_settings()
    with open_checkpoint(language_model, tokenizer) as checkpoint:
        words = require_whole(checkpoint)
        if checkpoint.config.model.vision is not None:
            raise UserError(f"{language_model}: is a whole NaViL; use `import` and start from that")
        grown = with_special_tokens(words)
        config = _recipe_for(recipe, checkpoint, grown)
        dtype = np.dtype(config.model.param_dtype)
        wanted = model_params.flatten(model_params.shapes(config.model))
        info = {name: TensorInfo(leaf.shape, dtype) for name, leaf in wanted.items()}
        purpose = {"init": fingerprint(checkpoint), "model": repr(config.model), "seed": config.seed}
        with partial_folder(target, purpose) as partial:
            with ParamsWriter(partial, info) as writer:
                write_params(writer, info, lambda done: _layers(config, checkpoint, words.vocab_size, done))
            origin = {"name": checkpoint.origin.get("name", language_model.name)}
            writer.finish(Record(config, grown.files(), {}, origin))


def _recipe_for(recipe: Config, checkpoint: OpenCheckpoint, grown: Tokenizer) -> Config:
    """The recipe with the special tokens' ids of the grown tokenizer, checked against the language model."""
    ours, theirs = recipe.model.decoder, checkpoint.config.model.decoder
    if recipe.model.vision is None:
        raise UserError("config.model.vision: the recipe has no vision part; use `import` for a plain language model")
    names = [field.name for field in dataclasses.fields(ours) if field.name not in ADDED]
    differing = [
        f"{name} is {getattr(theirs, name)} there and {getattr(ours, name)} in the recipe"
        for name in names
        if getattr(theirs, name) != getattr(ours, name)
    ]
    if differing:
        raise UserError(f"{checkpoint.path}: is another model than config.model.decoder: {'; '.join(differing)}")
    if grown.vocab_size > ours.vocab_size:
        raise UserError(
            f"config.model.decoder.vocab_size: {ours.vocab_size}, but the tokenizer with the special tokens has "
            f"{grown.vocab_size}; set it to that or more"
        )
    model = dataclasses.replace(recipe.model, special_token_ids=grown.special_token_ids)
    config = dataclasses.replace(recipe, model=model, workdir="", init_from="")
    validate(config)
    return config


def _layers(
    config: Config, checkpoint: OpenCheckpoint, words: int, done: Container[str]
) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """Every parameter that is not done, layer by layer; the checkpoint's tokenizer has so many words."""
    wanted = model_params.flatten(model_params.shapes(config.model))
    language = checkpoint.config.model
    copies = {name.replace("/text/", "/visual/"): name for name in wanted if "/text/" in name}
    twins = {text: visual for visual, text in copies.items() if visual in wanted}
    taken = model_params.flatten(model_params.shapes(language)).keys()
    finished = {name for name in taken if name in done and twins.get(name, name) in done}
    used = min(words, language.decoder.vocab_size)
    serial = config.model.decoder.serial_visual_output
    for name, layer, value in iterate_layers(language, checkpoint.tensors, skip=finished):
        if name in VOCABULARY:
            value = _grow(value, used, config.model, axis=VOCABULARY.index(name))
        yield name, layer, value
        if name in twins:
            is_serial = serial and "/out/" in name
            yield twins[name], layer, _identity(wanted[twins[name]].shape[1:], value.dtype) if is_serial else value
    for name in wanted.keys() - taken - {twins.get(name, name) for name in taken}:
        if name not in done:
            yield name, None, np.asarray(_fresh(config, name))


def _grow(value: np.ndarray, used: int, model: ModelConfig, axis: int) -> np.ndarray:
    """Cuts or pads the vocabulary axis to the model's size; every entry from `used` on is the mean of those before.

    Example: value [[1, 3], [3, 5], [0, 0]] along axis 0, used = 2, 4 entries wanted -> [[1, 3], [3, 5], [2, 4], [2, 4]]
    """
    rows = np.moveaxis(value, axis, 0)
    grown = np.empty((model.decoder.vocab_size, *rows.shape[1:]), value.dtype)
    grown[:used] = rows[:used]
    grown[used:] = rows[:used].mean(axis=0, dtype=np.float64).astype(value.dtype)
    return np.moveaxis(grown, 0, axis)


def _identity(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The identity matrix [H, H] of a layer, or zeros for its bias [H]."""
    return np.eye(shape[0], dtype=dtype) if len(shape) == 2 else np.zeros(shape, dtype)


def _fresh(config: Config, name: str) -> jax.Array:
    """One parameter as `initialise` makes it; the others are never computed."""
    create = lambda: model_params.flatten(model_params.initialise(config.model, config.seed))[name]  # noqa: E731
    return jax.jit(create)()
