"""Modality-specific experts: two weight sets over the two blocks of slots (paper section 3.3).

Which weights serve a token is known from its slot before the step runs, so that no weight set is ever applied to a
token of the other kind: a row [V visual slots | T text slots] is cut at V, each part meets its own dense weights, and
the results are joined. Nothing is computed twice and nothing is sorted.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx


class Experts(nnx.Module):
    """One module for text tokens, and a second one of the same form for visual tokens.

    Args:
      make: builds one weight set.
      visual: whether visual tokens have a weight set of their own; else the text weights serve both.
    """

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], visual: bool, rngs: nnx.Rngs):
        self.text = make(rngs)
        self.visual = make(rngs) if visual else None

    def __call__(self, x: jax.Array, visual_slots: int):
        """Each block of slots through its own weights.

        Args:
          x: [B, L, ...]; places 0..V-1 are visual slots, the rest text slots.
          visual_slots: V.

        Returns:
          What the modules return: an array or a pytree of arrays, each [B, L, ...].

        Example: V = 2, rows [v v t t t] -> [visual(v v) | text(t t t)]
        """
        return by_slots(self.text, self.visual, x, visual_slots)


def by_slots(
    text: Callable[[jax.Array], jax.Array], visual: Callable | None, x: jax.Array, visual_slots: int
) -> jax.Array:
    """`visual` on places 0..V-1 of axis 1, `text` on the others, joined. Without `visual`, `text` serves all."""
    if visual is None or visual_slots == 0:
        return text(x)
    parts = visual(x[:, :visual_slots]), text(x[:, visual_slots:])
    return jax.tree.map(lambda v, t: jnp.concatenate([v, t], axis=1), *parts)
