"""What both towers share: parameter metadata, norms, and the scan over a stack of layers."""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from navil_jax.batch import AnyArray
from navil_jax.config import ModelConfig
from navil_jax.model.int8 import Int8
from navil_jax.model.linear import Linear
from navil_jax.model.lora import LoraLinear
from navil_jax.sharding import constrain


def axes(*names: str | None) -> dict[str, Any]:
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
    """A `Linear` over the last `len(inputs)` dimensions; kernel [*inputs, *outputs] with logical axes `names`.

    With `config.lora_rank`, all but the vocabulary head have an update of that rank.
    """
    make: Callable[..., nnx.LinearGeneral] = Linear
    if config.lora_rank and "vocab" not in names:
        make = functools.partial(
            LoraLinear,
            rank=config.lora_rank,
            scale=config.lora_scale,
            a_metadata=axes(*names[: len(inputs)], None),
            b_metadata=axes(None, *names[len(inputs) :]),
        )
    return make(
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


def _statistics_dtype(arrays: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
    """Activations in the compute dtype; scale and bias as they are, so that their gradients are float32 sums."""
    return (arrays[0].astype(dtype), *arrays[1:])


def rms_norm(size: int, eps: float, config: ModelConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMSNorm over the last dimension, statistics in float32."""
    return nnx.RMSNorm(
        size,
        epsilon=eps,
        dtype=jnp.dtype(config.compute_dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        promote_dtype=_statistics_dtype,
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
        promote_dtype=_statistics_dtype,
        scale_metadata=axes("norm"),
        bias_metadata=axes("norm"),
        rngs=rngs,
    )


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x/2 (1 + erf(x / sqrt 2)), in float32; `jax.nn.gelu` takes erfc, which is much slower on TPU.

    Its derivative is made beside the value, of the same erf, and kept in x's dtype in the place of x.
    """
    return _gelu_forward(x)[0]


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    exact = x.astype(jnp.float32)
    cumulative = 0.5 * (1 + jax.lax.erf(exact * math.sqrt(0.5)))
    slope = cumulative + exact * jnp.exp(-0.5 * exact * exact) * (1 / math.sqrt(2 * math.pi))
    return (exact * cumulative).astype(x.dtype), slope.astype(x.dtype)


gelu.defvjp(_gelu_forward, lambda slope, gradient: (gradient * slope,))


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` layers in one module: every parameter gets a leading `layers` axis of that length."""
    create = nnx.vmap(make, in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    return nnx.split_rngs(splits=depth)(create)(rngs)


@jax.named_scope("unshard")
def unsharded(module: nnx.Module, config: ModelConfig) -> nnx.Module:
    """The module with its matrices in the compute dtype and whole along the axis that FSDP splits, see `unshard`.

    Said inside a scan over layers, so that one layer's matrices at a time are whole. Left to itself, XLA gathers
    float32, or turns each product into a chain of partial ones (three times slower by the TPU compiler's estimate).
    """

    def whole(variable: nnx.Variable) -> nnx.Variable:
        if isinstance(variable.get_value(), Int8):
            return variable
        names = variable.get_metadata()["out_sharding"][-variable.ndim :]
        if variable.ndim == 1 or "embed" not in names:  # biases and norms are small, and added up in float32
            return variable
        return variable.replace(unshard(variable[...], names, config.compute_dtype, config.sum_dtype))

    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(whole, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def unshard(x: AnyArray, names: tuple[str | None, ...], dtype: DTypeLike, sum_dtype: DTypeLike) -> jax.Array:
    """A parameter with logical axes `names`, rounded to `dtype`, on every device the whole of its `embed` axis.

    The result has `sum_dtype`, and so has the gradient, which is summed over the devices in it; each then keeps its own
    part. What travels on the way forward is of `dtype`.
    """
    whole = constrain(jnp.asarray(x, dtype), *(None if name == "embed" else name for name in names))
    return whole.astype(sum_dtype)


def _unshard_gradient(
    names: tuple[str | None, ...], dtype: DTypeLike, sum_dtype: DTypeLike, like: jax.Array, gradient: jax.Array
) -> tuple[jax.Array]:
    return (constrain(gradient, *names).astype(like.dtype),)


unshard.defvjp(lambda x, *static: (unshard(x, *static), jnp.zeros(0, x.dtype)), _unshard_gradient)


_policies = jax.checkpoint_policies
_keep_attention = _policies.save_only_these_names("attention")  # the name that splash attention gives its results
_REMAT_POLICIES = {
    "full": None,
    "attention": _keep_attention,
    "dots": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _keep_attention),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


Carry = TypeVar("Carry")


def scan_layers(
    layers: nnx.Module,
    body: Callable[[Any, Carry, Any], tuple[Carry, Any]],
    x: Carry,
    inputs: Any = None,
    remat: str = "none",
) -> tuple[Carry, Any]:
    """Runs a stack of layers one after the other, compiled once.

    Args:
      layers: a module made by `stack`.
      body: (layer, x, input of this layer) -> (x, output of this layer).
      x: what goes from layer to layer, an array or a pytree of some.
      inputs: pytree whose leaves have a leading axis of length depth, or None.
      remat: config.ModelConfig.remat.

    Returns:
      The last x, and the layers' outputs stacked along a leading axis.
    """
    graph, state = nnx.split(layers)

    def step(x: Carry, layer_inputs: tuple[nnx.State, Any]) -> tuple[Carry, Any]:
        layer_state, layer_input = layer_inputs
        x = jax.tree.map(lambda leaf: checkpoint_name(leaf, "layer_input"), x)
        return body(nnx.merge(graph, layer_state), x, layer_input)

    if remat != "none":
        step = jax.checkpoint(step, policy=_REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(step, x, (state, inputs))
