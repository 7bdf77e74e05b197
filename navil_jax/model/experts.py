"""Modality-specific experts: two weight sets over the two blocks of slots (paper section 3.3).

Which weights serve a token is known from its slot before the step runs, so that no weight set is ever applied to a
token of the other kind: a row [V visual slots | T text slots] is cut at V once, before the first layer, and each stream
meets its own dense weights in all of them. Nothing is computed twice and nothing is sorted.

Where the mesh splits rows (context axis), every device must own visual and text slots, or cutting would move them
between devices. So inside the decoder slots stand in device order: V/c visual and T/c text slots of the first of c
devices, then those of the second, and so on (`device_order`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from navil_jax.sharding import partition_spec, shards

Streams = tuple[jax.Array, ...]  # visual slots [B, V, ...] and text slots [B, T, ...], each in slot order; or all slots


class Experts(nnx.Module):
    """One module for text tokens, and a second one of the same form for visual tokens.

    Args:
      make: builds one weight set.
      visual: whether visual tokens have a weight set of their own; else the text weights serve both.
    """

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], visual: bool, rngs: nnx.Rngs):
        self.text = make(rngs)
        self.visual = make(rngs) if visual else None

    def __call__(self, streams: Streams) -> tuple[Any, ...]:
        """Each stream through its own weights, and what the modules return for each; one stream alone meets the text's.

        Example: (v v, t t t) -> (visual(v v), text(t t t))
        """
        if len(streams) == 1 or self.visual is None:
            return tuple(map(self.text, streams))
        return self.visual(streams[0]), self.text(streams[1])


def device_order(slots: int, visual_slots: int) -> np.ndarray:
    """The slot that stands at each position of the device order. [L]

    Example: L = 6, V = 2, two devices: 0 2 3 | 1 4 5
    """
    devices = shards("slots")
    blocks = np.arange(visual_slots).reshape(devices, -1), np.arange(visual_slots, slots).reshape(devices, -1)
    return np.concatenate(blocks, axis=1).reshape(-1)


def split_slots(
    x: Shaped[Array, "B L ..."], visual_slots: int
) -> tuple[Shaped[Array, "B V ..."], Shaped[Array, "B T ..."]]:
    """Visual and text slots, each in slot order, of all slots in device order."""
    devices = shards("slots")
    if devices == 1:
        return x[:, :visual_slots], x[:, visual_slots:]
    rows = x.reshape(x.shape[0], devices, -1, *x.shape[2:])
    cut = visual_slots // devices
    visual, text = (block.reshape(x.shape[0], -1, *x.shape[2:]) for block in (rows[:, :, :cut], rows[:, :, cut:]))
    return _split(visual), _split(text)


def join_slots(streams: Streams) -> Shaped[Array, "B L ..."]:
    """The inverse of `split_slots`; one stream alone is returned as it is."""
    if len(streams) == 1:
        return streams[0]
    devices = shards("slots")
    if devices == 1:
        return jnp.concatenate(streams, axis=1)
    rows = [x.reshape(x.shape[0], devices, -1, *x.shape[2:]) for x in streams]
    joined = jnp.concatenate(rows, axis=2)
    return _split(joined.reshape(joined.shape[0], -1, *joined.shape[3:]))


def _split(x: jax.Array) -> jax.Array:
    """Rows and slots split over the mesh, other dimensions as they are."""
    others = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 2)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*partition_spec(("batch", "slots")), *others))
