"""How the next token of every row is chosen from its logits: the likeliest, or drawn with the row's own settings."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from navil_jax.errors import UserError

MOST_LOGPROBS = 20  # alternatives of a token whose log probabilities can be asked for


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Settings of one answer; seed, step and logits of a row give the same token, whatever the other rows are.

    Args:
      temperature: divides the logits; 0 takes the likeliest token and ignores top_k, top_p and seed.
      top_k: draw from the k likeliest tokens only; 0: from all.
      top_p: draw from the smallest set of likeliest tokens that together have at least this probability.
      seed: of the random numbers.
      repetition_penalty: logits of tokens of the prompt and of the answer so far are divided by it where they are
        positive, and multiplied where they are negative; 1 changes nothing.

    Raises:
      UserError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature}: must be 0 (likeliest token) or a positive number")
        if not 0 <= self.top_k < 2**31:
            raise UserError(f"top-k {self.top_k}: must be 0 (all tokens) or a positive number below 2**31")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p}: must be above 0 and at most 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed {self.seed}: must be at least 0 and below 2**32")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise UserError(
                f"repetition-penalty {self.repetition_penalty}: must be from 0.01 to 100; 1 changes nothing"
            )


class Settings(NamedTuple):
    """Samplers of all rows."""

    temperature: Float32[Array, " B"]
    top_k: Int32[Array, " B"]
    top_p: Float32[Array, " B"]
    seed: UInt32[Array, " B"]
    repetition_penalty: Float32[Array, " B"]

    @classmethod
    def of(cls, samplers: list[Sampler]) -> "Settings":
        """Example: two samplers -> arrays of two."""
        kinds = {"temperature": jnp.float32, "top_k": jnp.int32, "top_p": jnp.float32, "seed": jnp.uint32}
        return cls(
            *(
                jnp.array([getattr(sampler, name) for sampler in samplers], kinds.get(name, jnp.float32))
                for name in cls._fields
            )
        )


class Chosen(NamedTuple):
    """The new token of every row, its log probability, and the likeliest ones; zeros where nobody asks for them."""

    tokens: Int32[Array, " B"]
    logprobs: Float32[Array, " B"]
    top_tokens: Int32[Array, "B n"]  # n: MOST_LOGPROBS, or the whole vocabulary
    top_logprobs: Float32[Array, "B n"]


def choose(
    logits: Float32[Array, "B vocab"],
    settings: Settings,
    seen: Bool[Array, "B vocab"],
    step: Int32[Array, " B"],
    logprobs: Bool[Array, ""],
) -> Chosen:
    """Chooses a token for every row.

    Args:
      seen: tokens that the repetition penalty is for.
      step: number of each row's new token, from 0.
      logprobs: whether some row asks for log probabilities; they are the model's own, before all settings.
    """
    penalty = settings.repetition_penalty[:, None]
    penalised = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    likeliest = jnp.argmax(penalised, axis=-1).astype(jnp.int32)
    drawn = settings.temperature > 0
    tokens = jax.lax.cond(jnp.any(drawn), lambda: _draw(penalised, settings, step), lambda: likeliest)
    tokens = jnp.where(drawn, tokens, likeliest)
    count = min(MOST_LOGPROBS, logits.shape[-1])

    def measured() -> Chosen:
        scores = jax.nn.log_softmax(logits, axis=-1)
        own = jnp.take_along_axis(scores, tokens[:, None], axis=-1)[:, 0]
        top, top_tokens = jax.lax.top_k(scores, count)
        return Chosen(tokens, own, top_tokens, top)

    def bare() -> Chosen:
        zeros = jnp.zeros((len(tokens), count), jnp.float32)
        return Chosen(tokens, zeros[:, 0], zeros.astype(jnp.int32), zeros)

    return jax.lax.cond(logprobs, measured, bare)


def _draw(logits: jax.Array, settings: Settings, step: jax.Array) -> jax.Array:
    below = logits - jnp.max(logits, axis=-1, keepdims=True)  # a tiny temperature makes these -inf, and none nan or inf
    below = below / jnp.maximum(settings.temperature, jnp.finfo(jnp.float32).tiny)[:, None]
    kept = keep_top_p(keep_top_k(below, settings.top_k), settings.top_p)

    def one(seed: jax.Array, step: jax.Array, logits: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), 0)
        return jax.random.categorical(key, logits)

    return jax.vmap(one)(settings.seed, step, kept).astype(jnp.int32)


def keep_top_k(logits: Float32[Array, "B vocab"], k: Int32[Array, " B"]) -> Float32[Array, "B vocab"]:
    """-inf for all but the k largest of each row, and those equal to the k-th; all stay if k is 0.

    Example: logits 3 1 2, k = 2 -> 3 -inf 2
    """
    vocabulary = logits.shape[-1]
    descending = -jnp.sort(-logits, axis=-1)
    last = jnp.where(k == 0, vocabulary, jnp.minimum(k, vocabulary)) - 1
    smallest = jnp.take_along_axis(descending, last[:, None], axis=-1)
    return jnp.where(logits < smallest, -jnp.inf, logits)


def keep_top_p(logits: Float32[Array, "B vocab"], p: Float32[Array, " B"]) -> Float32[Array, "B vocab"]:
    """-inf for all but the fewest largest of each row whose probabilities sum to at least p, and those equal to them.

    Example: probabilities 0.5 0.2 0.3, p = 0.6 -> the second goes
    """
    descending = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (mass_before < p[:, None]).at[..., 0].set(True)  # float32 has no smaller p than 1e-38
    smallest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where((logits < smallest) & (p < 1)[:, None], -jnp.inf, logits)
