"""Linear: a dense layer whose gradients over many tokens are float32 sums; and how exact matrix products are."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from navil_jax.sharding import jax_setting


class Linear(nnx.LinearGeneral):
    """x kernel + bias over the last axes of x; see `product` for what is rounded where."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # no out_sharding
        """[..., *inputs] -> [..., *outputs] in the layer's dtype."""
        y = product(x.astype(self.dtype), self.kernel[...], len(self.in_features))
        if self.bias is None:
            return y
        return (y.astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(y.dtype)


def exact_products(compute_dtype: str) -> contextlib.AbstractContextManager:
    """Inside it, a model that computes in float32 multiplies matrices in float32, also on TPUs and GPUs.

    These round float32 factors to bfloat16 or TF32 otherwise. Gradients must be taken inside, too. Other compute dtypes
    stay as they are, and so does a precision that JAX_DEFAULT_MATMUL_PRECISION names.
    """
    if compute_dtype != "float32" or jax_setting("jax_default_matmul_precision") is not None:
        return contextlib.nullcontext()
    return jax.default_matmul_precision("highest")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, kernel: jax.Array, inputs: int) -> jax.Array:
    """The product of the last `inputs` axes of x and the first ones of the kernel, in x's dtype.

    The kernel's gradient is one product over all tokens, summed in float32 and rounded to the kernel's dtype: a float32
    kernel gets it unrounded, also where x is bfloat16. JAX's own is the transposed kernel's, for which XLA transposes
    the gradient of what follows, element by element on CPUs.

    Args:
      x: [..., *inputs].
      kernel: [*inputs, *outputs], rounded to x's dtype first.

    Example: x [B, N, heads, D], kernel [heads, D, H], inputs 2 -> [B, N, H]
    """
    return jnp.tensordot(x, kernel.astype(x.dtype), axes=inputs)


def _forward(x: jax.Array, kernel: jax.Array, inputs: int) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    rounded = kernel.astype(x.dtype)
    return jnp.tensordot(x, rounded, axes=inputs), (x, rounded, jnp.zeros(0, kernel.dtype))


def _backward(inputs: int, kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel, like = kept
    batch, outputs = tuple(range(x.ndim - inputs)), tuple(range(x.ndim - inputs, gradient.ndim))
    of_x = jax.lax.dot_general(gradient, kernel, ((outputs, tuple(range(inputs, kernel.ndim))), ((), ())))
    of_kernel = jax.lax.dot_general(x, gradient, ((batch, batch), ((), ())), preferred_element_type=like.dtype)
    return of_x, of_kernel


product.defvjp(_forward, _backward)


@jax.custom_vjp
def to_turned(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The product of tokens and a kernel, features first; rounded and summed as `product` does.

    Args:
      x: [B, N, inputs].
      kernel: [inputs, outputs].

    Returns:
      [outputs, B, N].
    """
    return _dot(kernel.astype(x.dtype), x, (0,), (2,))


def _to_turned_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    rounded = kernel.astype(x.dtype)
    return to_turned(x, rounded), (x, rounded, jnp.zeros(0, kernel.dtype))


def _to_turned_backward(kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel, like = kept
    return _dot(gradient, kernel, (0,), (1,)), _dot(x, gradient, (0, 1), (1, 2), like.dtype)


@jax.custom_vjp
def from_turned(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The way back: x [inputs, B, N], kernel [inputs, outputs] -> [B, N, outputs]."""
    return _dot(x, kernel.astype(x.dtype), (0,), (0,))


def _from_turned_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    rounded = kernel.astype(x.dtype)
    return from_turned(x, rounded), (x, rounded, jnp.zeros(0, kernel.dtype))


def _from_turned_backward(kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel, like = kept
    return _dot(kernel, gradient, (1,), (2,)), _dot(x, gradient, (1, 2), (0, 1), like.dtype)


def _dot(a: jax.Array, b: jax.Array, of_a: tuple[int, ...], of_b: tuple[int, ...], dtype: Any = None) -> jax.Array:
    return jax.lax.dot_general(a, b, ((of_a, of_b), ((), ())), preferred_element_type=dtype)


to_turned.defvjp(_to_turned_forward, _to_turned_backward)
from_turned.defvjp(_from_turned_forward, _from_turned_backward)
