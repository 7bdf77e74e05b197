"""How the next token is chosen from logits: the likeliest, or drawn with temperature, top-k and top-p."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from navil_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Chooses tokens; the same seed, step and logits of a row give the same token, whatever the other rows are.

    Args:
      temperature: divides the logits; 0 takes the likeliest token and ignores the rest.
      top_k: draw from the k likeliest tokens only; 0: from all.
      top_p: draw from the smallest set of likeliest tokens that together have at least this probability.
      seed: of the random numbers.

    Raises:
      UserError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature}: must be 0 (likeliest token) or a positive number")
        if self.top_k < 0:
            raise UserError(f"top-k {self.top_k}: must be 0 (all tokens) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p}: must be above 0 and at most 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed {self.seed}: must be at least 0 and below 2**32")

    def __call__(self, logits: jax.Array, step: int) -> jax.Array:
        """Logits [B, vocab] float32 of the step-th new token -> tokens [B] int32."""
        if self.temperature == 0:
            return _likeliest(logits)
        return _draw(logits, jnp.uint32(self.seed), step, self.temperature, self.top_k, self.top_p)


@jax.jit
def _likeliest(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("temperature", "top_k", "top_p"))
def _draw(
    logits: jax.Array, seed: jax.Array, step: jax.Array, temperature: float, top_k: int, top_p: float
) -> jax.Array:
    below = logits - jnp.max(logits, axis=-1, keepdims=True)  # a tiny temperature makes these -inf, and none nan or inf
    below = below / max(temperature, float(jnp.finfo(jnp.float32).tiny))
    logits = keep_top_p(keep_top_k(below, top_k), top_p)
    key = jax.random.fold_in(jax.random.key(seed), step)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(len(logits)))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """-inf for all but the k largest of [B, vocab], and those equal to the k-th; all stay if k is 0.

    Example: logits 3 1 2, k = 2 -> 3 -inf 2
    """
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < smallest, -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """-inf for all of [B, vocab] but the fewest largest whose probabilities sum to at least p, and those equal to them.

    Example: probabilities 0.5 0.2 0.3, p = 0.6 -> the second goes
    """
    if p == 1:
        return logits
    descending = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (mass_before < p).at[..., 0].set(True)  # float32 has no smaller p than 1e-38
    smallest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < smallest, -jnp.inf, logits)
