"""Linear: a dense layer whose gradients over many tokens are float32 sums; and how exact matrix products are."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from navil_jax.model.int8 import Int8, int8_product
from navil_jax.sharding import jax_setting


class Linear(nnx.LinearGeneral):
    """x kernel + bias over the last axes of x; see `product` for what is rounded where."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # no out_sharding
        """[..., *inputs] -> [..., *outputs] in the layer's dtype."""
        x, kernel, inputs = x.astype(self.dtype), self.kernel.get_value(), len(self.in_features)
        y = int8_product(x, kernel, inputs) if isinstance(kernel, Int8) else product(x, kernel, inputs)
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


# The primals of a custom gradient, and what is kept of them: x where the kernel trains, the rounded kernel where x's
# gradient is asked for; None otherwise, so that what is frozen costs no product.
Kept = tuple[jax.Array | None, jax.Array | None, jax.Array]


def _kept(x: Any, kernel: Any) -> tuple[jax.Array, jax.Array, Kept]:
    rounded = kernel.value.astype(x.value.dtype)
    kept = (x.value if kernel.perturbed else None, rounded if x.perturbed else None, jnp.zeros(0, kernel.value.dtype))
    return x.value, rounded, kept


def _forward(x: Any, kernel: Any, inputs: int) -> tuple[jax.Array, Kept]:
    value, rounded, kept = _kept(x, kernel)
    return jnp.tensordot(value, rounded, axes=inputs), kept


def _backward(inputs: int, kept: Kept, gradient: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
    x, kernel, like = kept
    of_x = of_kernel = None
    gradient = _dense(gradient)
    if kernel is not None:
        outputs = tuple(range(inputs, kernel.ndim))
        last = tuple(range(gradient.ndim - len(outputs), gradient.ndim))
        of_x = jax.lax.dot_general(gradient, kernel, ((last, outputs), ((), ())))
    if x is not None:
        batch = tuple(range(x.ndim - inputs))
        of_kernel = jax.lax.dot_general(x, gradient, ((batch, batch), ((), ())), preferred_element_type=like.dtype)
    return of_x, of_kernel


def _dense(gradient: Any) -> jax.Array:
    """A gradient that is known to be zero as an array."""
    if isinstance(gradient, jax.custom_derivatives.SymbolicZero):
        return jnp.zeros(gradient.shape, gradient.dtype)
    return gradient


product.defvjp(_forward, _backward, symbolic_zeros=True)


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


def _to_turned_forward(x: Any, kernel: Any) -> tuple[jax.Array, Kept]:
    value, rounded, kept = _kept(x, kernel)
    return to_turned(value, rounded), kept


def _to_turned_backward(kept: Kept, gradient: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
    x, kernel, like = kept
    gradient = _dense(gradient)
    of_x = None if kernel is None else _dot(gradient, kernel, (0,), (1,))
    return of_x, None if x is None else _dot(x, gradient, (0, 1), (1, 2), like.dtype)


@jax.custom_vjp
def from_turned(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The way back: x [inputs, B, N], kernel [inputs, outputs] -> [B, N, outputs]."""
    return _dot(x, kernel.astype(x.dtype), (0,), (0,))


def _from_turned_forward(x: Any, kernel: Any) -> tuple[jax.Array, Kept]:
    value, rounded, kept = _kept(x, kernel)
    return from_turned(value, rounded), kept


def _from_turned_backward(kept: Kept, gradient: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
    x, kernel, like = kept
    gradient = _dense(gradient)
    of_x = None if kernel is None else _dot(kernel, gradient, (1,), (2,))
    return of_x, None if x is None else _dot(x, gradient, (1, 2), (0, 1), like.dtype)


def _dot(a: jax.Array, b: jax.Array, of_a: tuple[int, ...], of_b: tuple[int, ...], dtype: Any = None) -> jax.Array:
    return jax.lax.dot_general(a, b, ((of_a, of_b), ((), ())), preferred_element_type=dtype)


to_turned.defvjp(_to_turned_forward, _to_turned_backward, symbolic_zeros=True)
from_turned.defvjp(_from_turned_forward, _from_turned_backward, symbolic_zeros=True)
