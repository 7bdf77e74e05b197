"""Qwen2 and Qwen2.5: queries, keys and values have biases, the output projection has none, heads have no norms."""

from collections.abc import Mapping
from typing import Any

from navil_jax.convert.families.qwen3 import QWEN, entries
from navil_jax.convert.family import Family
from navil_jax.convert.fields import NEEDED, Constant, field, size
from navil_jax.data.tokenizers.byte_level import ByteLevelTokenizer


def _width_per_head(values: Mapping[str, Any]) -> Any:
    """The size of a head where config.json has no `head_dim`."""
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    return width // heads if type(width) is int and type(heads) is int and heads > 0 else NEEDED


FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    navil_architecture="",
    fields=(
        *QWEN,
        field("head_dim", "decoder.head_dim", size, otherwise=_width_per_head),
        Constant("use_mrope", False, supported=(False,), written=False),
    ),
    implied={"qkv_bias": True, "out_bias": False, "qk_norm": False, "serial_visual_output": False},
    entries=entries,
    template="internlm2-chat",  # <s> only where the tokenizer has one, and no empty <think> block
    tokenizer=ByteLevelTokenizer,
)
