"""navil_jax: NaViL native multimodal language models in JAX."""

from __future__ import annotations

import typing

if typing.TYPE_CHECKING:
    from pathlib import Path

    from jax.sharding import Mesh

    from navil_jax.convert.loading import Pretrained


def load_pretrained(path: str | Path, mesh: Mesh | None = None, tokenizer: str = "") -> Pretrained:
    """A model with its config, tokenizer and preprocessing, from a run's workdir or a PyTorch folder.

    Args:
      path: workdir of a run (or its newest checkpoint), or a released NaViL, InternLM2 or Qwen3 folder.
      mesh: devices to spread the parameters over; None: all.
      tokenizer: folder of the tokenizer, for a PyTorch folder that has none.

    Raises:
      UserError: the checkpoint is not whole, or of an architecture that is not known.

    Example:
      loaded = navil_jax.load_pretrained("NaViL-2B")
      x, _ = loaded.model(batch)  # [B, L, H]
    """
    from navil_jax.convert.__main__ import (
        loading as pretrained,  # JAX starts when a model is loaded, not when the package is imported
    )

    return pretrained.load_pretrained(path, mesh, tokenizer)
