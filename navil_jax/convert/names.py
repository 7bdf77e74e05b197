"""The two-way name table: tensors of a folder in the Hugging Face (hf) format <-> parameters of this project.

It covers a NaViL of the release and a language model alone; the tensors of a decoder are its family's (`families`), and
every shape is from the config.
"""

import dataclasses
import functools
from collections.abc import Iterator

from navil_jax.config import ModelConfig, VisionConfig
from navil_jax.convert import families
from navil_jax.convert.entries import Entry, matrix, vector


@functools.cache
def name_table(config: ModelConfig) -> tuple[Entry, ...]:
    """Every tensor of a checkpoint of this model. Each parameter stands in it once per layer."""
    decoder = families.find(config.decoder.family).entries(config.decoder)
    if config.vision is None:
        return tuple(decoder)
    language = [dataclasses.replace(entry, tensor=f"language_model.{entry.tensor}") for entry in decoder]
    special = Entry("special_token_embedding.weight", ("decoder/special_embed/embedding",), None, "v e -> v e")
    return (*language, special, *_connector(), *_vision(config.vision))


def _connector() -> Iterator[Entry]:
    yield vector("mlp1.0.weight", "connector/norm/scale")
    yield vector("mlp1.0.bias", "connector/norm/bias")
    for torch, ours in (("mlp1.1", "fc1"), ("mlp1.3", "fc2")):
        yield matrix(f"{torch}.weight", f"connector/{ours}/kernel")
        yield vector(f"{torch}.bias", f"connector/{ours}/bias")


def _vision(config: VisionConfig) -> Iterator[Entry]:
    """Tensors of the vision encoder: a convolution embeds the patches, qkv is laid out (3, heads, head_dim)."""
    embedding, side = "vision_model.embeddings.patch_embedding", config.patch_size
    yield matrix(f"{embedding}.weight", "vision/patch_embed/kernel", None, "o c h w -> (c h w) o", c=3, h=side, w=side)
    yield vector(f"{embedding}.bias", "vision/patch_embed/bias")
    for i in range(config.depth):
        torch, ours = f"vision_model.encoder.layers.{i}", "vision/layers"
        for norm in ("norm1", "norm2"):
            yield vector(f"{torch}.{norm}.weight", f"{ours}/{norm}/scale", i)
            if config.norm == "layer_norm":
                yield vector(f"{torch}.{norm}.bias", f"{ours}/{norm}/bias", i)
        qkv = {"t": 3, "h": config.num_heads}
        yield matrix(f"{torch}.attn.qkv.weight", f"{ours}/qkv/kernel", i, "(t h d) i -> i t h d", **qkv)
        if config.qkv_bias:
            yield matrix(f"{torch}.attn.qkv.bias", f"{ours}/qkv/bias", i, "(t h d) -> t h d", **qkv)
        proj = {"h": config.num_heads}
        yield matrix(f"{torch}.attn.proj.weight", f"{ours}/proj/kernel", i, "o (h d) -> h d o", **proj)
        yield vector(f"{torch}.attn.proj.bias", f"{ours}/proj/bias", i)
        for layer in ("fc1", "fc2"):
            yield matrix(f"{torch}.mlp.{layer}.weight", f"{ours}/{layer}/kernel", i)
            yield vector(f"{torch}.mlp.{layer}.bias", f"{ours}/{layer}/bias", i)
        for scale in ("ls1", "ls2"):
            yield vector(f"{torch}.{scale}", f"{ours}/{scale}", i)
