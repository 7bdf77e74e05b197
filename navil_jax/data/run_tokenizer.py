"""The tokenizer of a run: one that is given, or one trained on the text of its sources."""

import dataclasses
import itertools
import os

from navil_jax.config import Config, validate
from navil_jax.data.prompt import role_texts
from navil_jax.data.sources import open_source
from navil_jax.data.tokenizers.base import Tokenizer
from navil_jax.data.tokenizers.sentencepiece import train_tokenizer


def new_tokenizer(config: Config, folder: os.PathLike[str] | None) -> Tokenizer:
    """That of `config.data.tokenizer`, or one trained on the sources' texts and written to `folder` (None: nowhere)."""
    if config.data.tokenizer:
        return Tokenizer.load(config.data.tokenizer)
    around = role_texts(config.data.template)
    texts = (text for source in config.data.sources for text in open_source(source, "train").texts())
    corpus = itertools.chain.from_iterable((text, *around) for text in texts)
    return train_tokenizer(corpus, config.data.tokenizer_size, folder)


def complete(config: Config, tokenizer: Tokenizer) -> Config:
    """Takes the special tokens' ids from the tokenizer where the recipe of a model with vision leaves them out."""
    if config.model.vision is not None and not config.model.special_token_ids:
        model = dataclasses.replace(config.model, special_token_ids=tokenizer.special_token_ids)
        config = dataclasses.replace(config, model=model)
        validate(config)
    return config
