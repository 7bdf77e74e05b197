"""The parts of a model that reports speak of, and which tensors of a checkpoint belong to each."""

import re

from navil_jax.config import ModelConfig
from navil_jax.convert.names import name_table

# Group -> names of its parameters. The norms of query and key heads belong to the attention of their modality.
GROUPS = {
    "vision": r"vision/.*",
    "connector": r"connector/.*",
    "special tokens": r"decoder/special_embed/.*",
    "embedding": r"decoder/embed/.*",
    "head": r"decoder/head/.*",
    "text attention": r"decoder/layers/(qkv|out)/text/.*",
    "visual attention": r"decoder/layers/(qkv|out)/visual/.*",
    "text ffn": r"decoder/layers/ffn/text/.*",
    "visual ffn": r"decoder/layers/ffn/visual/.*",
    "norms": r"decoder/(layers/(attention_norm|ffn_norm)|final_norm)/.*",
}
UNKNOWN = "not of this model"


def group_of(param: str) -> str:
    """The group of a parameter by its name. Example: decoder/layers/ffn/visual/up/kernel -> visual ffn"""
    (group,) = (group for group, pattern in GROUPS.items() if re.fullmatch(pattern, param))
    return group


def tensor_groups(config: ModelConfig) -> dict[str, str]:
    """Every tensor of a checkpoint of this model -> its group."""
    return {entry.tensor: group_of(entry.params[0]) for entry in name_table(config)}
