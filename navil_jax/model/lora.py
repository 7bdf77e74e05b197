"""Low-rank updates of frozen matrices, to fine-tune with little memory (LoRA, arXiv 2106.09685)."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from navil_jax.model.linear import Linear, product

A, B = "lora_a", "lora_b"  # names of the two factors beside `kernel`


class LoraLinear(Linear):
    """A dense layer with an update: x kernel + scale * (x a) b. Starts as the layer alone, as b starts at zero.

    The factors are float32, whatever the kernel's dtype: a [*inputs, rank], b [rank, *outputs].
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        rank: int,
        scale: float,
        a_metadata: Mapping[str, Any],
        b_metadata: Mapping[str, Any],
        rngs: nnx.Rngs,
        **settings: Any,
    ):
        super().__init__(inputs, outputs, rngs=rngs, **settings)
        start = nnx.initializers.normal(1 / math.sqrt(math.prod(inputs)))
        self.scale, self.inputs = scale, len(inputs)
        self.lora_a = nnx.Param(start(rngs.params(), (*inputs, rank), jnp.float32), **a_metadata)
        self.lora_b = nnx.Param(jnp.zeros((rank, *outputs), jnp.float32), **b_metadata)

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # as Linear
        """[..., *inputs] -> [..., *outputs]."""
        y = super().__call__(x)
        low = product(x.astype(y.dtype), self.lora_a[...], self.inputs)
        return y + self.scale * product(low, self.lora_b[...], 1)


def update_of(kernel: Any, a: Any, b: Any, scale: float, stacked: bool) -> Any:
    """The kernel with its update, in its own dtype; arrays of NumPy or JAX.

    Args:
      kernel: [*inputs, *outputs], after a leading axis of layers where `stacked`.
      a, b: [*inputs, rank] and [rank, *outputs], after the same axis.
    """
    layers, rank = (kernel.shape[0] if stacked else 1), a.shape[-1]
    update = a.reshape(layers, -1, rank) @ b.reshape(layers, rank, -1)
    return (kernel.astype(a.dtype) + scale * update.reshape(kernel.shape)).astype(kernel.dtype)


def merged(params: dict[str, Any], scale: float) -> dict[str, Any]:
    """Nested parameters with every update in its kernel and without factors.

    Example: {"q": {"kernel": w, "lora_a": a, "lora_b": b}} -> {"q": {"kernel": w + scale * a b}}
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    for name in [name for name in flat if name.endswith(f"/{A}")]:
        module = name.removesuffix(f"/{A}")
        a, b = flat.pop(name), flat.pop(f"{module}/{B}")
        flat[f"{module}/kernel"] = update_of(flat[f"{module}/kernel"], a, b, scale, "/layers/" in name)
    return traverse_util.unflatten_dict(flat, sep="/")
