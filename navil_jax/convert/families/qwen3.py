"""Qwen3, alone and with visual experts: query and key heads have norms, and in most models nothing has a bias."""

from collections.abc import Iterator
from typing import Any

from navil_jax.config import DecoderConfig
from navil_jax.convert.entries import Entry, matrix, modalities, vector
from navil_jax.convert.family import Family, one_bias_only
from navil_jax.convert.fields import DECODER, Constant, field, one_bias, size
from navil_jax.data.tokenizers.byte_level import ByteLevelTokenizer

FULL = "full_attention"


def entries(config: DecoderConfig) -> Iterator[Entry]:
    """The tensors; `qwen2` has the same names."""
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    yield matrix("model.embed_tokens.weight", "decoder/embed/embedding", pattern="v e -> v e")
    for i in range(config.depth):
        torch, ours = f"model.layers.{i}", "decoder/layers"
        yield vector(f"{torch}.input_layernorm.weight", f"{ours}/attention_norm/scale", i)
        yield vector(f"{torch}.post_attention_layernorm.weight", f"{ours}/ffn_norm/scale", i)
        for suffix, kind in modalities(config.attention_experts):
            attention = f"{torch}.self_attn"
            for part, count in heads.items():
                name, target = f"{attention}.{part}_proj{suffix}", f"{ours}/qkv/{kind}/{part}"
                yield matrix(f"{name}.weight", f"{target}/kernel", i, "(h d) i -> i h d", h=count)
                if config.qkv_bias:
                    yield matrix(f"{name}.bias", f"{target}/bias", i, "(h d) -> h d", h=count)
            for part in ("q_norm", "k_norm") if config.qk_norm else ():
                yield vector(f"{attention}.{part}{suffix}.weight", f"{ours}/qkv/{kind}/{part}/scale", i)
            name, pattern = f"{attention}.o_proj{suffix}", "o (h d) -> h d o"
            yield matrix(f"{name}.weight", f"{ours}/out/{kind}/kernel", i, pattern, h=config.num_heads)
            if config.out_bias:
                yield vector(f"{name}.bias", f"{ours}/out/{kind}/bias", i)
        for suffix, kind in modalities(config.ffn_experts):
            for part in ("gate", "up", "down"):
                yield matrix(f"{torch}.mlp{suffix}.{part}_proj.weight", f"{ours}/ffn/{kind}/{part}/kernel", i)
    yield vector("model.norm.weight", "decoder/final_norm/scale")
    if not config.tie_embeddings:
        yield matrix("lm_head.weight", "decoder/head/kernel")


def _all_full(value: Any) -> None:
    if value is not None and (type(value) is not list or set(value) - {FULL}):
        raise ValueError(f'null, or "{FULL}" for every layer, as windows are not supported')


# Keys of both; a model whose layers attend to a sliding window is refused.
QWEN = (
    *DECODER,
    Constant("attention_dropout", 0.0),
    Constant("use_sliding_window", False, supported=(False,)),
    Constant("sliding_window", None),
    Constant("layer_types", None, check=_all_full, written=False),
)

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    navil_architecture="Qwen3VEForCausalLM",
    fields=(*QWEN, field("head_dim", "decoder.head_dim", size), one_bias("attention_bias", missing=False)),
    implied={"qk_norm": True, "serial_visual_output": False},
    entries=entries,
    template="qwen3-chat",
    tokenizer=ByteLevelTokenizer,
    limits=one_bias_only,
)
