"""Entry: one tensor of a checkpoint in the Hugging Face (hf) format and the parameters that it holds, both ways."""

import dataclasses

import einops
import numpy as np


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


def vector(tensor: str, param: str, layer: int | None = None) -> Entry:
    """A tensor [e] that is a parameter as it is."""
    return Entry(tensor, (param,), layer, "e -> e")


def matrix(tensor: str, param: str, layer: int | None = None, pattern: str = "o i -> i o", **sizes: int) -> Entry:
    """A tensor that is one parameter in another layout; a plain matrix [out, in] is transposed."""
    return Entry(tensor, (param,), layer, pattern, tuple(sizes.items()))


def modalities(experts: bool) -> tuple[tuple[str, str], ...]:
    """(suffix of the tensor's name, part of the parameter's name) of the weight sets."""
    return (("", "text"), ("_ve", "visual")) if experts else (("", "text"),)
