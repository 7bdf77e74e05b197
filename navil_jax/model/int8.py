"""Int8: a matrix as 8-bit numbers with a scale for each output: half of bfloat16, a quarter of float32."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

LARGEST = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A kernel, values x scale."""

    values: jax.Array  # [..., *inputs, *outputs] int8
    scale: jax.Array  # [..., 1, *outputs] float32: inputs have length 1


def rounded(kernel: jax.Array, inputs: int, stacked: bool) -> Int8:
    """A kernel in the nearest 8-bit numbers; the largest of each output's is 127.

    Args:
      kernel: [*inputs, *outputs], after a leading axis of layers where `stacked`.
      inputs: how many axes they are.
    """
    axes = tuple(range(stacked, stacked + inputs))
    exact = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(exact), axis=axes, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1) / LARGEST
    return Int8(jnp.round(exact / scale).astype(jnp.int8), scale)


def int8_product(x: jax.Array, kernel: Int8, inputs: int) -> jax.Array:
    """As `linear.product`, x [..., *inputs] -> [..., *outputs] in x's dtype; activations are not rounded."""
    y = jnp.tensordot(x, kernel.values.astype(x.dtype), axes=inputs)
    return (y.astype(jnp.float32) * kernel.scale.reshape(kernel.scale.shape[inputs:])).astype(x.dtype)


def put(kernel: Int8, sharding: NamedSharding) -> Int8:
    """On the devices as the kernel itself would be; the scale of outputs goes with them."""
    names = (*sharding.spec, *(None,) * (kernel.values.ndim - len(sharding.spec)))
    kept = (name if size > 1 else None for name, size in zip(names, kernel.scale.shape, strict=True))
    of_scale = NamedSharding(sharding.mesh, PartitionSpec(*kept))
    return Int8(jax.device_put(kernel.values, sharding), jax.device_put(kernel.scale, of_scale))
