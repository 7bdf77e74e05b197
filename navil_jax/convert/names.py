"""The one two-way name table: tensors of PyTorch checkpoints <-> parameters of this project.

It covers released NaViL checkpoints and plain InternLM2 and Qwen3, both families, with every shape from the config.
"""

import dataclasses
import functools
from collections.abc import Iterator

import einops
import numpy as np

from navil_jax.config import DecoderConfig, ModelConfig, VisionConfig


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint, and the parameters that it holds.

    Attributes:
      tensor: its name in the checkpoint.
      params: names of the parameters that it holds, one or several.
      layer: index into the parameters' leading `layers` axis, or None.
      pattern: einops pattern from the tensor to the parameter, or to all of its parameters joined along `join_axis`.
      sizes: what einops needs to know of axes inside brackets; (name, size) pairs.
      split: sizes of the parameters along `join_axis`; empty where there is one.

    Example: tensor wqkv.weight [(kv group) head_dim, width] of InternLM2, with group = queries of a kv head + k + v,
    becomes [width, kv, group, head_dim], cut along `group` into q, k and v.
    """

    tensor: str
    params: tuple[str, ...]
    layer: int | None
    pattern: str
    sizes: tuple[tuple[str, int], ...] = ()
    split: tuple[int, ...] = ()
    join_axis: int = -2

    def to_params(self, tensor: np.ndarray) -> tuple[np.ndarray, ...]:
        """The tensor in the parameters' layout, without the layers axis.

        Raises:
          einops.EinopsError: the tensor does not have the shape that the config asks for.
        """
        x = einops.rearrange(tensor, self.pattern, **dict(self.sizes))
        if not self.split:
            return (x,)
        parts = np.split(x, np.cumsum(self.split)[:-1], axis=self.join_axis)
        return tuple(part.reshape(*part.shape[:-3], -1, part.shape[-1]) for part in parts)

    def to_tensor(self, params: tuple[np.ndarray, ...]) -> np.ndarray:
        """The inverse of `to_params`."""
        before, after = self.pattern.split("->")
        sizes = dict(self.sizes)
        if not self.split:
            return einops.rearrange(params[0], f"{after} -> {before}", **sizes)
        heads = sizes["kv"]
        parts = [p.reshape(*p.shape[:-2], heads, p.shape[-2] // heads, p.shape[-1]) for p in params]
        return einops.rearrange(np.concatenate(parts, axis=self.join_axis), f"{after} -> {before}", **sizes)


@functools.cache
def name_table(config: ModelConfig) -> tuple[Entry, ...]:
    """Every tensor of a checkpoint of this model. Each parameter stands in it once per layer."""
    decoder = _internlm2(config.decoder) if config.decoder.family == "internlm2" else _qwen3(config.decoder)
    if config.vision is None:
        return tuple(decoder)
    language = [dataclasses.replace(entry, tensor=f"language_model.{entry.tensor}") for entry in decoder]
    special = Entry("special_token_embedding.weight", ("decoder/special_embed/embedding",), None, "v e -> v e")
    return (*language, special, *_connector(), *_vision(config.vision))


def _vector(tensor: str, param: str, layer: int | None = None) -> Entry:
    return Entry(tensor, (param,), layer, "e -> e")


def _matrix(tensor: str, param: str, layer: int | None = None, pattern: str = "o i -> i o", **sizes: int) -> Entry:
    return Entry(tensor, (param,), layer, pattern, tuple(sizes.items()))


def _modalities(experts: bool) -> tuple[tuple[str, str], ...]:
    """(suffix of the tensor's name, part of the parameter's name) of the weight sets."""
    return (("", "text"), ("_ve", "visual")) if experts else (("", "text"),)


def _internlm2(config: DecoderConfig) -> Iterator[Entry]:
    """Tensors of InternLM2 with visual experts; `wqkv` groups its rows by key/value head."""
    queries = config.num_heads // config.num_kv_heads
    grouped = (("kv", config.num_kv_heads), ("group", queries + 2), ("d", config.head_dim))
    yield _matrix("model.tok_embeddings.weight", "decoder/embed/embedding", pattern="v e -> v e")
    for i in range(config.depth):
        torch, ours = f"model.layers.{i}", "decoder/layers"
        yield _vector(f"{torch}.attention_norm.weight", f"{ours}/attention_norm/scale", i)
        yield _vector(f"{torch}.ffn_norm.weight", f"{ours}/ffn_norm/scale", i)
        for suffix, kind in _modalities(config.attention_experts):
            for leaf, name, pattern in (
                ("weight", "kernel", "(kv group d) i -> i kv group d"),
                ("bias", "bias", "(kv group d) -> kv group d"),
            )[: 2 if config.attention_bias else 1]:
                params = tuple(f"{ours}/qkv/{kind}/{part}/{name}" for part in "qkv")
                yield Entry(f"{torch}.attention.wqkv{suffix}.{leaf}", params, i, pattern, grouped, (queries, 1, 1))
            serial = kind == "visual" and config.serial_visual_output
            pattern = "o i -> i o" if serial else "o (h d) -> h d o"
            sizes = {} if serial else {"h": config.num_heads}
            yield _matrix(f"{torch}.attention.wo{suffix}.weight", f"{ours}/out/{kind}/kernel", i, pattern, **sizes)
            if config.attention_bias:
                yield _vector(f"{torch}.attention.wo{suffix}.bias", f"{ours}/out/{kind}/bias", i)
        for suffix, kind in _modalities(config.ffn_experts):
            for leaf, part in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
                yield _matrix(f"{torch}.feed_forward{suffix}.{leaf}.weight", f"{ours}/ffn/{kind}/{part}/kernel", i)
    yield _vector("model.norm.weight", "decoder/final_norm/scale")
    if not config.tie_embeddings:
        yield _matrix("output.weight", "decoder/head/kernel")


def _qwen3(config: DecoderConfig) -> Iterator[Entry]:
    """Tensors of Qwen3 with visual experts."""
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    yield _matrix("model.embed_tokens.weight", "decoder/embed/embedding", pattern="v e -> v e")
    for i in range(config.depth):
        torch, ours = f"model.layers.{i}", "decoder/layers"
        yield _vector(f"{torch}.input_layernorm.weight", f"{ours}/attention_norm/scale", i)
        yield _vector(f"{torch}.post_attention_layernorm.weight", f"{ours}/ffn_norm/scale", i)
        for suffix, kind in _modalities(config.attention_experts):
            attention = f"{torch}.self_attn"
            for part, count in heads.items():
                target = f"{ours}/qkv/{kind}/{part}"
                pattern = "(h d) i -> i h d"
                yield _matrix(f"{attention}.{part}_proj{suffix}.weight", f"{target}/kernel", i, pattern, h=count)
                if config.attention_bias:
                    name = f"{attention}.{part}_proj{suffix}.bias"
                    yield _matrix(name, f"{target}/bias", i, "(h d) -> h d", h=count)
            for part in ("q_norm", "k_norm") if config.qk_norm else ():
                yield _vector(f"{attention}.{part}{suffix}.weight", f"{ours}/qkv/{kind}/{part}/scale", i)
            name, pattern = f"{attention}.o_proj{suffix}", "o (h d) -> h d o"
            yield _matrix(f"{name}.weight", f"{ours}/out/{kind}/kernel", i, pattern, h=config.num_heads)
            if config.attention_bias:
                yield _vector(f"{name}.bias", f"{ours}/out/{kind}/bias", i)
        for suffix, kind in _modalities(config.ffn_experts):
            for part in ("gate", "up", "down"):
                yield _matrix(f"{torch}.mlp{suffix}.{part}_proj.weight", f"{ours}/ffn/{kind}/{part}/kernel", i)
    yield _vector("model.norm.weight", "decoder/final_norm/scale")
    if not config.tie_embeddings:
        yield _matrix("lm_head.weight", "decoder/head/kernel")


def _connector() -> Iterator[Entry]:
    yield _vector("mlp1.0.weight", "connector/norm/scale")
    yield _vector("mlp1.0.bias", "connector/norm/bias")
    for torch, ours in (("mlp1.1", "fc1"), ("mlp1.3", "fc2")):
        yield _matrix(f"{torch}.weight", f"connector/{ours}/kernel")
        yield _vector(f"{torch}.bias", f"connector/{ours}/bias")


def _vision(config: VisionConfig) -> Iterator[Entry]:
    """Tensors of the vision encoder: a convolution embeds the patches, qkv is laid out (3, heads, head_dim)."""
    embedding, side = "vision_model.embeddings.patch_embedding", config.patch_size
    yield _matrix(f"{embedding}.weight", "vision/patch_embed/kernel", None, "o c h w -> (c h w) o", c=3, h=side, w=side)
    yield _vector(f"{embedding}.bias", "vision/patch_embed/bias")
    for i in range(config.depth):
        torch, ours = f"vision_model.encoder.layers.{i}", "vision/layers"
        for norm in ("norm1", "norm2"):
            yield _vector(f"{torch}.{norm}.weight", f"{ours}/{norm}/scale", i)
            if config.norm == "layer_norm":
                yield _vector(f"{torch}.{norm}.bias", f"{ours}/{norm}/bias", i)
        qkv = {"t": 3, "h": config.num_heads}
        yield _matrix(f"{torch}.attn.qkv.weight", f"{ours}/qkv/kernel", i, "(t h d) i -> i t h d", **qkv)
        if config.qkv_bias:
            yield _matrix(f"{torch}.attn.qkv.bias", f"{ours}/qkv/bias", i, "(t h d) -> t h d", **qkv)
        proj = {"h": config.num_heads}
        yield _matrix(f"{torch}.attn.proj.weight", f"{ours}/proj/kernel", i, "o (h d) -> h d o", **proj)
        yield _vector(f"{torch}.attn.proj.bias", f"{ours}/proj/bias", i)
        for layer in ("fc1", "fc2"):
            yield _matrix(f"{torch}.mlp.{layer}.weight", f"{ours}/{layer}/kernel", i)
            yield _vector(f"{torch}.mlp.{layer}.bias", f"{ours}/{layer}/bias", i)
        for scale in ("ls1", "ls2"):
            yield _vector(f"{torch}.{scale}", f"{ours}/{scale}", i)
