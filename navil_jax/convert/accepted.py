"""What a folder may hold beside the tensors of its model, as the transformers library accepts it, and what not."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np

from navil_jax.config import ModelConfig
from navil_jax.convert.names import name_table
from navil_jax.convert.reader import TensorFolder
from navil_jax.errors import UserError

COMPUTED = re.compile(r".*\.rotary_emb\.inv_freq")  # a buffer that old versions of that library saved
PREFIXES = ("model.", "language_model.", "base_model.model.", "module.", "_orig_mod.", "transformer.")
CHUNK = 2**22  # elements that are compared at a time


def drop_what_is_no_parameter(folder: TensorFolder, model: ModelConfig, place: str) -> list[str]:
    """Takes tensors out of `folder` that the model does not need, and returns what was taken out and why.

    - The head of a model whose config says that it is the embedding; the two must be equal.
    - Frequencies of the rotation, which are computed.

    Args:
      place: what errors call the folder.

    Raises:
      UserError: a head that is not the embedding; a number that is no floating one; names with a prefix of a wrapper.
    """
    said = []
    for name in [name for name in folder if COMPUTED.fullmatch(name)]:
        del folder.tensors[name]
        said.append(f"{place}: {name} is not read, it is computed")
    entries = {entry.params[0]: entry.tensor for entry in name_table(_untied(model))}
    head, embedding = entries["decoder/head/kernel"], entries["decoder/embed/embedding"]
    if model.decoder.tie_embeddings and head in folder and embedding in folder:
        if not _equal(folder[head], folder[embedding]):
            raise UserError(
                f"{place}: tie_word_embeddings says that the output head is the embedding, but {head} and {embedding} "
                f"differ; set tie_word_embeddings to false in config.json, or remove {head}"
            )
        del folder.tensors[head]
        said.append(f"{place}: {head} is not read, it is the embedding (tie_word_embeddings)")
    others = [f"{name} is {info.dtype}" for name, info in folder.tensors.items() if not _floating(info.dtype)]
    if others:
        raise UserError(f"{place}: {others[0]}, and weights are floating-point numbers; {len(others)} such tensors")
    _check_prefix(folder, {entry.tensor for entry in name_table(model)}, place)
    return said


def _check_prefix(folder: TensorFolder, wanted: set[str], place: str) -> None:
    """Names of a wrapper of the model, which would be listed as missing and foreign, all of them."""
    if any("lora_" in name for name in folder):
        raise UserError(f"{place}: an adapter (lora_A, lora_B), not a model; merge it into its model and save that")
    if not folder or wanted & set(folder):
        return
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in folder) and wanted & {name.removeprefix(prefix) for name in folder}:
            raise UserError(f"{place}: all names of tensors begin with {prefix}; save the model itself, without it")
        if wanted & {prefix + name for name in folder}:
            raise UserError(f"{place}: its tensors are named without {prefix}; save the whole model, with its head")


def _untied(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, tie_embeddings=False))


def _floating(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    rows = max(1, CHUNK // max(1, a.size // len(a)))
    return all(a[i : i + rows].tobytes() == b[i : i + rows].tobytes() for i in range(0, len(a), rows))
