"""Family: all that is particular to one kind of language model in the Hugging Face (hf) format."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from navil_jax.config import DecoderConfig
from navil_jax.convert.entries import Entry
from navil_jax.convert.fields import Constant, Field
from navil_jax.data.prompt import TemplateName
from navil_jax.data.tokenizers import Tokenizer

Limits = Iterator[tuple[str, str]]


def one_bias_only(decoder: DecoderConfig) -> Limits:
    """The limit of a family with the key `fields.one_bias`."""
    if decoder.qkv_bias != decoder.out_bias:
        yield "out_bias", f"{decoder.family} says of all attention projections at once whether they have a bias"


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of language model, as its folders have it. What it computes is said by the fields of `DecoderConfig`.

    Attributes:
      name: `DecoderConfig.family`, and model_type in config.json.
      architecture: class of the language model alone, in config.json.
      navil_architecture: class of the decoder of a NaViL; empty: the release has no NaViL with this decoder.
      fields: config.json of the language model, or the section llm_config of a NaViL, but for the rotation's keys.
      implied: fields of `DecoderConfig` that config.json does not say, as every model of the family has them the same.
      entries: the tensors of a decoder.
      template: the chat template that a language model alone is asked with, as its config.json names none.
      tokenizer: the kind that its folders hold.
      limits: (field of `DecoderConfig`, why) for every value that config.json cannot say.
      auto_map: of the config.json of a language model alone, whose classes are not in the transformers library.
      released: keys of a NaViL's section llm_config that the release has otherwise than a language model alone.
    """

    name: str
    architecture: str
    navil_architecture: str
    fields: tuple[Field | Constant, ...]
    implied: Mapping[str, Any]
    entries: Callable[[DecoderConfig], Iterator[Entry]]
    template: TemplateName
    tokenizer: type[Tokenizer]
    limits: Callable[[DecoderConfig], Limits] = lambda decoder: iter(())
    auto_map: Mapping[str, str] = dataclasses.field(default_factory=dict)
    released: Mapping[str, Any] = dataclasses.field(default_factory=dict)
