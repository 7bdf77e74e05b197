"""What a slot of the cache holds, token by token, and how much of it begins another prompt."""

import hashlib

import numpy as np
from jaxtyping import Int64

from navil_jax.batch import SampleFeatures
from navil_jax.config import ModelConfig
from navil_jax.generate.programs import length_of, tokens_of

Content = Int64[np.ndarray, "n 2"]  # of tokens in reading order; equal beginnings have equal keys and values
NOTHING: Content = np.zeros((0, 2), np.int64)


def content_of(prompt: SampleFeatures, config: ModelConfig) -> Content:
    """A token of text is its id; one that stands for an image is a hash of all pixels of its scale."""
    content = np.zeros((length_of(prompt), 2), np.int64)
    content[:, 0] = tokens_of(prompt)
    if config.vision is not None and len(prompt["patches"]):
        scales = prompt["patch_blocks"][:: config.vision.unit_patches]  # of every merged unit
        hashes = np.stack([_hash(prompt, scale) for scale in range(1, scales[-1] + 1)])
        content[content[:, 0] == config.special_id("<IMG_CONTEXT>")] = hashes[scales - 1]
    return content


def _hash(prompt: SampleFeatures, scale: int) -> np.ndarray:
    of_scale = prompt["patch_blocks"] == scale
    found = hashlib.blake2b(prompt["patches"][of_scale].tobytes(), digest_size=16)
    found.update(prompt["patch_coords"][of_scale].tobytes())
    return np.frombuffer(found.digest(), np.int64)


def with_produced(content: Content, tokens: list[int], config: ModelConfig) -> Content:
    """With tokens of an answer behind it. Special ones are like no prompt's, which have embeddings of their own."""
    produced = np.zeros((len(tokens), 2), np.int64)
    produced[:, 0] = tokens
    produced[np.isin(tokens, config.special_token_ids), 0] = -1
    return np.concatenate([content, produced])


def shared(content: Content, others: Content) -> int:
    """How many tokens both begin with.

    Example: a b c d and a b x -> 2
    """
    count = min(len(content), len(others))
    differ = np.any(content[:count] != others[:count], axis=1)
    return int(np.argmax(differ)) if differ.any() else count


def readable(prompt: SampleFeatures, content: Content, held: Content, config: ModelConfig) -> int:
    """How many tokens of the prompt need not be read, as they are the first of those that a slot holds.

    0, so that the prompt is read as a whole, where the others are not text alone, or where nothing but text is known
    and it is less than half of the prompt.
    """
    decoder, length = config.decoder, len(content)
    if decoder.rope_scaling == "dynamic" and length > decoder.max_positions:
        return 0  # its tokens are turned otherwise than those of a shorter text
    count = min(shared(content, held), length - 1)  # the last token's logits are needed
    images = prompt["visual_positions"]
    worth = images[-1] < count if len(images) else 2 * count >= length
    return count if worth else 0
