"""Attention of the vision encoder: rotation, then every patch sees those of its segment, by the backend of the device.

On TPUs, models that compute in bfloat16 with heads of 32 or 64 take the kernels of `model/kernels/encoder`; elsewhere
queries and keys are rotated and given to `model/attention`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from navil_jax.batch import AnyArray
from navil_jax.config import ModelConfig
from navil_jax.model import rope
from navil_jax.model.attention import attention, cores, vmem_bytes
from navil_jax.model.kernels import encoder
from navil_jax.model.kernels.flash import block_size
from navil_jax.model.linear import from_turned, product, to_turned
from navil_jax.model.lora import A, B
from navil_jax.sharding import constrain, partition_spec, shards

Weights = dict[str, Array]  # of a projection: kernel, bias and factors of an update where it has them


class Segments(NamedTuple):
    """Which patches see each other, and what the kernels read of it."""

    ids: Int32[Array, "B P"]  # 0 = empty
    inputs: encoder.Inputs | None  # a leading axis: of the devices that split the batch; None: not for kernels


def make_segments(
    ids: Int32[AnyArray, "B P"], rotation: rope.Rotation, config: ModelConfig, longest: int | None
) -> Segments:
    """What every layer with these segments reads, made once.

    Args:
      longest: the most patches from the first to the last of one segment; None: a whole row.
    """
    ids, shape = jnp.asarray(ids), kernel_shape(config, ids.shape[1])
    if shape is None:
        return Segments(ids, None)

    def local(ids: jax.Array, cos: jax.Array, sin: jax.Array) -> encoder.Inputs:
        ids, cos, sin = (_padded(x, shape.row) for x in (ids, cos, sin))
        inputs = encoder.make_inputs(ids, (cos, sin), shape.block, jnp.dtype(config.compute_dtype), longest)
        return jax.tree.map(lambda x: x[None], inputs)

    rows, features = partition_spec(("batch", "positions")), partition_spec(("batch", "positions", None))
    make = _on_devices(local, (rows, features, features), partition_spec(("batch",)))
    empty = jax.eval_shape(make, ids, *rotation)
    inputs = jax.lax.platform_dependent(
        ids, *rotation, tpu=make, default=lambda *_: jax.tree.map(jnp.zeros_like, empty)
    )
    return Segments(ids, inputs)


def choose(first: Bool[Array, ""] | bool, one: Segments, other: Segments) -> Segments:
    """One of two, as data of the program."""
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(first, a, b), one, other)


def encoder_attention(
    x: Float[Array, "B P W"],
    qkv: nnx.LinearGeneral,
    proj: nnx.LinearGeneral,
    rotation: rope.Rotation,
    segments: Segments,
    config: ModelConfig,
    longest: int | None,
) -> Float[Array, "B P W"]:
    """Projects to queries, keys and values, rotates, attends inside segments, and projects back.

    Args:
      qkv, proj: kernels [W, 3, H, D] and [H, D, W].
      longest: as `make_segments` got it.
    """

    def plain(x: jax.Array, *_: Any) -> jax.Array:
        q, k, v = jnp.moveaxis(qkv(x), 2, 0)
        q, k = rope.rotate(q, rotation), rope.rotate(k, rotation)
        out = attention(q, k, v, segments.ids, causal=False, backend=config.attention, longest=longest)
        return proj(constrain(out, "batch", "patches", "vision_heads", "head_dim"))

    shape = kernel_shape(config, x.shape[1])
    if shape is None or segments.inputs is None:
        return plain(x)
    weights = (nnx.to_pure_dict(nnx.state(layer)) for layer in (qkv, proj))
    packed = functools.partial(packed_attention, config=config, shape=shape)
    return jax.lax.platform_dependent(x, *weights, segments.inputs, tpu=packed, default=plain)


def packed_attention(
    x: Float[Array, "B P W"],
    qkv: Weights,
    proj: Weights,
    inputs: encoder.Inputs,
    config: ModelConfig,
    shape: encoder.Shape,
) -> Float[Array, "B P W"]:
    """The kernels' road: features before positions, and every device on its own rows and heads.

    Heads get empty ones beside them, so that registers are full on every device and core (23 of 64 -> 24).
    """
    length, heads = x.shape[1], config.encoder.num_heads
    empty = -heads % _multiple(shape)
    turned, spec = (names := ("attention_heads", "batch", "positions")), partition_spec(names)

    def of_part(part: int, weights: jax.Array) -> jax.Array:
        """[..., 3, H, D] -> [..., rows]."""
        own = weights[..., part, :, :]
        own = jnp.pad(own, (*((0, 0),) * (own.ndim - 2), (0, empty), (0, 0)))
        return jax.lax.optimization_barrier(own.reshape(*own.shape[:-2], -1))  # else XLA folds it into a gradient

    def projected(part: int) -> jax.Array:
        y = to_turned(x, of_part(part, qkv["kernel"]))
        if "bias" in qkv:
            y = (y.astype(jnp.float32) + of_part(part, qkv["bias"])[:, None, None]).astype(y.dtype)
        if A in qkv:
            low = product(x, qkv[A], 1)
            y = y + config.lora_scale * to_turned(low, of_part(part, qkv[B]))
        return constrain(y, *turned)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, inputs: encoder.Inputs) -> jax.Array:
        own = (jnp.pad(y, ((0, 0), (0, 0), (0, shape.row - length))).reshape(len(y), -1) for y in (q, k, v))
        out = encoder.attend(*own, jax.tree.map(lambda x: x[0], inputs), shape)
        return out.reshape(-1, q.shape[1], shape.row)[:, :, :length]

    def of_heads(weights: jax.Array) -> jax.Array:
        """[H, D, ...] -> [rows, ...]."""
        own = jnp.pad(weights, ((0, empty), *((0, 0),) * (weights.ndim - 1)))
        return jax.lax.optimization_barrier(own.reshape(-1, *own.shape[2:]))

    run = _on_devices(local, (spec, spec, spec, partition_spec(("batch",))), spec)
    out = constrain(run(*map(projected, range(3)), inputs), *turned)
    y = from_turned(out, of_heads(proj["kernel"]))
    y = (y.astype(jnp.float32) + proj["bias"].astype(jnp.float32)).astype(y.dtype)
    if A in proj:
        y = y + config.lora_scale * product(from_turned(out, of_heads(proj[A])), proj[B], 1)
    return y


def kernel_shape(config: ModelConfig, length: int) -> encoder.Shape | None:
    """How the kernels divide rows of `length` patches on the mesh in scope; None where they do not serve."""
    vision = config.encoder
    if config.attention != "auto" or config.compute_dtype != "bfloat16" or vision.head_dim not in encoder.WIDTHS:
        return None
    block = block_size(length)
    shape = encoder.Shape(vision.head_dim, -(-length // block) * block, block, cores(), vmem_bytes())
    multiple = _multiple(shape)
    heads = -(-vision.num_heads // multiple) * multiple // shards("attention_heads")
    return shape if encoder.heads_per_step(shape, heads, backward=True) else None


def _multiple(shape: encoder.Shape) -> int:
    """Heads are filled up to a multiple of this: whole registers on every device and core."""
    return shards("attention_heads") * shape.cores * encoder.LANES // shape.width


def _padded(x: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), *((0, 0),) * (x.ndim - 2)))


def _on_devices(local: Any, in_specs: Any, out_specs: Any) -> Any:
    if jax.sharding.get_abstract_mesh().empty:
        return local
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)
