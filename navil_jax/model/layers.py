"""What both towers share: parameter metadata, norms, and the scan over a stack of layers."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from navil_jax.config import ModelConfig


def axes(*names: str) -> dict[str, Any]:
    """Metadata of a parameter: the logical axis of every dimension (see sharding.RULES)."""
    return {"out_sharding": names, "eager_sharding": False}


def linear(
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    names: tuple[str, ...],
    config: ModelConfig,
    rngs: nnx.Rngs,
    use_bias: bool = False,
    kernel_init: nnx.Initializer | None = None,
) -> nnx.LinearGeneral:
    """A dense layer over the last `len(inputs)` dimensions; kernel [*inputs, *outputs] with logical axes `names`."""
    return nnx.LinearGeneral(
        inputs,
        outputs,
        axis=tuple(range(-len(inputs), 0)),
        use_bias=use_bias,
        dtype=jnp.dtype(config.compute_dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=kernel_init or nnx.initializers.normal(1 / math.sqrt(math.prod(inputs))),
        kernel_metadata=axes(*names),
        bias_metadata=axes(*names[len(inputs) :]),
        rngs=rngs,
    )


def rms_norm(size: int, eps: float, config: ModelConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMSNorm over the last dimension, statistics in float32."""
    return nnx.RMSNorm(
        size,
        epsilon=eps,
        dtype=jnp.dtype(config.compute_dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        scale_metadata=axes("norm"),
        rngs=rngs,
    )


def layer_norm(size: int, eps: float, config: ModelConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over the last dimension, statistics in float32."""
    return nnx.LayerNorm(
        size,
        epsilon=eps,
        dtype=jnp.dtype(config.compute_dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        use_fast_variance=False,
        scale_metadata=axes("norm"),
        bias_metadata=axes("norm"),
        rngs=rngs,
    )


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` layers in one module: every parameter gets a leading `layers` axis of that length."""
    create = nnx.vmap(make, in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    return nnx.split_rngs(splits=depth)(create)(rngs)


def scan_layers(
    layers: nnx.Module,
    body: Callable[[nnx.Module, jax.Array, Any], tuple[jax.Array, Any]],
    x: jax.Array,
    inputs: Any = None,
    remat: str = "none",
) -> tuple[jax.Array, Any]:
    """Runs a stack of layers one after the other, compiled once.

    Args:
      layers: a module made by `stack`.
      body: (layer, x, input of this layer) -> (x, output of this layer).
      x: what goes from layer to layer.
      inputs: pytree whose leaves have a leading axis of length depth, or None.
      remat: config.ModelConfig.remat.

    Returns:
      The last x, and the layers' outputs stacked along a leading axis.
    """
    graph, state = nnx.split(layers)

    def step(x: jax.Array, layer_inputs: tuple[nnx.State, Any]) -> tuple[jax.Array, Any]:
        layer_state, layer_input = layer_inputs
        return body(nnx.merge(graph, layer_state), x, layer_input)

    if remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
        step = jax.checkpoint(step, policy=policy, prevent_cse=False)
    return jax.lax.scan(step, x, (state, inputs))
