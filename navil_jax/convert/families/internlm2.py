"""InternLM2, alone and with visual experts: queries, keys and values are one matrix, wo_ve comes after wo."""

from collections.abc import Iterator

from navil_jax.config import DecoderConfig
from navil_jax.convert.entries import Entry, matrix, modalities, vector
from navil_jax.convert.family import Family, Limits, one_bias_only
from navil_jax.convert.fields import DECODER, Constant, one_bias
from navil_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer


def _entries(config: DecoderConfig) -> Iterator[Entry]:
    """The tensors; `wqkv` groups its rows by key/value head."""
    queries = config.num_heads // config.num_kv_heads
    grouped = (("kv", config.num_kv_heads), ("group", queries + 2), ("d", config.head_dim))
    yield matrix("model.tok_embeddings.weight", "decoder/embed/embedding", pattern="v e -> v e")
    for i in range(config.depth):
        torch, ours = f"model.layers.{i}", "decoder/layers"
        yield vector(f"{torch}.attention_norm.weight", f"{ours}/attention_norm/scale", i)
        yield vector(f"{torch}.ffn_norm.weight", f"{ours}/ffn_norm/scale", i)
        for suffix, kind in modalities(config.attention_experts):
            for leaf, name, pattern in (
                ("weight", "kernel", "(kv group d) i -> i kv group d"),
                ("bias", "bias", "(kv group d) -> kv group d"),
            )[: 2 if config.qkv_bias else 1]:
                params = tuple(f"{ours}/qkv/{kind}/{part}/{name}" for part in "qkv")
                yield Entry(f"{torch}.attention.wqkv{suffix}.{leaf}", params, i, pattern, grouped, (queries, 1, 1))
            serial = kind == "visual" and config.serial_visual_output
            pattern = "o i -> i o" if serial else "o (h d) -> h d o"
            sizes = {} if serial else {"h": config.num_heads}
            yield matrix(f"{torch}.attention.wo{suffix}.weight", f"{ours}/out/{kind}/kernel", i, pattern, **sizes)
            if config.out_bias:
                yield vector(f"{torch}.attention.wo{suffix}.bias", f"{ours}/out/{kind}/bias", i)
        for suffix, kind in modalities(config.ffn_experts):
            for leaf, part in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
                yield matrix(f"{torch}.feed_forward{suffix}.{leaf}.weight", f"{ours}/ffn/{kind}/{part}/kernel", i)
    yield vector("model.norm.weight", "decoder/final_norm/scale")
    if not config.tie_embeddings:
        yield matrix("output.weight", "decoder/head/kernel")


def _limits(decoder: DecoderConfig) -> Limits:
    if decoder.num_heads * decoder.head_dim != decoder.width:
        yield "head_dim", f"internlm2 needs width / num_heads (width {decoder.width})"
    yield from one_bias_only(decoder)


FAMILY = Family(
    name="internlm2",
    architecture="InternLM2ForCausalLM",
    navil_architecture="InternLM2VEForCausalLM",
    fields=(
        *DECODER,
        one_bias("bias"),
        Constant("attn_implementation", "eager"),
        Constant("bos_token_id", 1),
        Constant("eos_token_id", 2),
    ),
    implied={"qk_norm": False, "serial_visual_output": True},
    entries=_entries,
    template="internlm2-chat",
    tokenizer=SentencePieceTokenizer,
    limits=_limits,
    released={"attn_implementation": "flash_attention_2"},
    auto_map={
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
    },
)
