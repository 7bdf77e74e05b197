"""open_run: what a run reads (config, tokenizer, sources), found in one order of precedence by every command."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Protocol

from navil_jax.config import Config, validate
from navil_jax.config.continuing import with_model_of
from navil_jax.data.engine import Engine
from navil_jax.data.prompt import role_texts
from navil_jax.data.sample import Source
from navil_jax.data.sources import expand_sources, open_source
from navil_jax.data.tokenizers import Tokenizer, load_tokenizer
from navil_jax.data.tokenizers.sentencepiece import train_tokenizer
from navil_jax.errors import UserError


class Earlier(Protocol):
    """A checkpoint that a run goes on from or starts with, such as `convert.opened.OpenCheckpoint`."""

    @property
    def config(self) -> Config: ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """What a run reads.

    Attributes:
      config: complete: sources of kind "meta" taken apart, ids of special tokens filled in, the model of `init_from`
        taken over where `init_model` asks for it.
      tokenizer: of the run.
      sources: the training samples of each of `config.data.sources`.
      trained: whether the tokenizer was trained on them, just now.
    """

    config: Config
    tokenizer: Tokenizer
    sources: list[Source]
    trained: bool


def open_run(config: Config, earlier: Earlier | None, engine: Engine | None = None) -> OpenRun:
    """Opens what a run of `config` reads.

    1. Model, template and image settings: those of `earlier` if `config.init_model` says so, else the config's.
    2. Sources: the config's.
    3. Tokenizer: that of `earlier`; else of `config.data.tokenizer`; else one trained on the sources' text.

    Args:
      config: of the run.
      earlier: the run's newest checkpoint, or what `config.init_from` names; None for a fresh start.
      engine: as of `formats.open_format`.

    Raises:
      UserError: a source cannot be opened, or there is no tokenizer.
    """
    if earlier is not None and config.init_model:
        config = with_model_of(config, earlier.config)
    config = expand_sources(config)
    sources = [open_source(entry, "train", engine) for entry in config.data.sources]
    if earlier is None:
        tokenizer = make_tokenizer(config, sources)
    elif earlier.tokenizer is not None:
        tokenizer = earlier.tokenizer
    else:
        raise UserError("config.init_from: holds no tokenizer; copy the files of one into its folder")
    trained = earlier is None and not config.data.tokenizer
    return OpenRun(complete(config, tokenizer), tokenizer, sources, trained)


def make_tokenizer(config: Config, sources: Sequence[Source]) -> Tokenizer:
    """That of `config.data.tokenizer`, or one trained on the sources' texts, if only on those of the template."""
    if config.data.tokenizer:
        return load_tokenizer(config.data.tokenizer)
    around = role_texts(config.data.template)
    texts = (text for source in sources for text in source.texts())
    corpus = itertools.chain.from_iterable((text, *around) for text in itertools.chain((next(texts, ""),), texts))
    return train_tokenizer(corpus, config.data.tokenizer_size, None)


def complete(config: Config, tokenizer: Tokenizer) -> Config:
    """Takes the special tokens' ids from the tokenizer where the recipe of a model with vision leaves them out."""
    if config.model.vision is not None and not config.model.special_token_ids:
        model = dataclasses.replace(config.model, special_token_ids=tokenizer.special_token_ids)
        config = dataclasses.replace(config, model=model)
        validate(config)
    return config
