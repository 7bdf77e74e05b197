"""The whole model: vision encoder, connector and decoder on one packed batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from navil_jax.batch import Batch
from navil_jax.config import ModelConfig
from navil_jax.model.decoder import Decoder, LayerOutputs
from navil_jax.model.vision import Connector, VisionEncoder
from navil_jax.sharding import constrain


class NaViL(nnx.Module):
    """NaViL (arXiv 2510.08565), or a plain InternLM2 / Qwen3 where `config.vision` is None.

    Example:
      model = NaViL(config, nnx.Rngs(0))
      x, _ = model(batch)                                      # [B, L, H] in slot order
      logits = model.logits(x[:, batch.visual_slots :])        # [B, T, vocab], of the text slots
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        has_vision = config.vision is not None
        self.vision = VisionEncoder(config, rngs) if has_vision else None
        self.connector = Connector(config, rngs) if has_vision else None
        self.decoder = Decoder(config, rngs)

    def embed(self, batch: Batch) -> jax.Array:
        """Token embeddings with the picture features on their `<IMG_CONTEXT>` slots. [B, L, H]"""
        x = self.decoder.embed_prompt(batch.tokens)
        if self.vision is not None:
            features = self.connector(self.vision(batch.patches, batch.patch_coords, batch.patch_blocks))
            rows = jnp.arange(x.shape[0])[:, None]
            x = x.at[rows, batch.unit_slots].set(features.astype(x.dtype), mode="drop", unique_indices=False)
        return constrain(x, "batch", "slots", "features")

    def __call__(
        self, batch: Batch, keep: Callable[[jax.Array, LayerOutputs], Any] = lambda x, outputs: None
    ) -> tuple[jax.Array, Any]:
        """Runs the model.

        Returns:
          [B, L, H], the last layer's output before the final norm, in slot order; and what `keep` kept of every
          decoder layer, stacked (see Decoder).
        """
        return self.decoder(self.embed(batch), self.decoder.layout(batch), keep)

    def logits(self, x: jax.Array) -> jax.Array:
        """[B, N, H] -> [B, N, vocab] float32."""
        return self.decoder.logits(x)
