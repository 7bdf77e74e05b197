"""The whole model: vision encoder, connector and decoder on one packed batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from navil_jax.batch import Batch
from navil_jax.config import ModelConfig
from navil_jax.model.decoder import Decoder, LayerOutputs
from navil_jax.model.experts import device_order, split_slots
from navil_jax.model.layers import unsharded
from navil_jax.model.vision import Connector, VisionEncoder
from navil_jax.sharding import constrain, shards


class NaViL(nnx.Module):
    """NaViL (arXiv 2510.08565), or a plain InternLM2 / Qwen3 where `config.vision` is None.

    Example:
      model = NaViL(config, nnx.Rngs(0))
      x, _ = model(batch)                                      # [B, L, H] in slot order
      logits = model.logits(x[:, batch.visual_slots :])        # [B, T, vocab], of the text slots
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config, has_vision = config, config.vision is not None
        self.vision = VisionEncoder(config, rngs) if has_vision else None
        self.connector = Connector(config, rngs) if has_vision else None
        self.decoder = Decoder(config, rngs)

    def embed(self, batch: Batch) -> Float[Array, "B L H"]:
        """Token embeddings with the image features on their `<IMG_CONTEXT>` slots."""
        x = self.decoder.embed_prompt(batch.tokens)
        if self.vision is not None and self.connector is not None:
            features = self.vision(batch.patches, batch.patch_coords, batch.patch_blocks, batch.block_patches)
            features = unsharded(self.connector, self.config)(features)
            put = jax.vmap(lambda x, slots, new: x.at[slots].set(new, mode="drop"))
            features = constrain(features.astype(x.dtype), "batch", "positions", "features")
            x = put(constrain(x, "batch", "positions", "features"), batch.unit_slots, features)
        return constrain(x, "batch", "slots", "features")

    def __call__(
        self, batch: Batch, keep: Callable[[jax.Array, LayerOutputs], Any] = lambda x, outputs: None
    ) -> tuple[Float[Array, "B L H"], Any]:
        """Runs the model.

        Returns:
          The last layer's output before the final norm, in slot order; and what `keep` kept of every
          decoder layer, stacked (see Decoder).
        """
        batch = _in_device_order(batch)
        x, kept = self.decoder(self.embed(batch), self.decoder.layout(batch), keep)
        return jnp.concatenate(split_slots(x, batch.visual_slots), axis=1), kept

    def head_inputs(self, x: Float[Array, "B N H"]) -> tuple[Float[Array, "B N H"], Float[Array, "H vocab"]]:
        """What `train.loss.token_scores` takes: tokens after the final norm, and the head."""
        return self.decoder.final_norm(x), self.decoder.head_kernel()

    def logits(self, x: Float[Array, "B N H"]) -> Float32[Array, "B N vocab"]:
        """Scores of the next token."""
        return self.decoder.logits(x)


def _in_device_order(batch: Batch) -> Batch:
    """The slots in the order in which the decoder keeps them on this mesh, see `experts.device_order`."""
    if shards("slots") == 1:
        return batch
    slots = batch.tokens.shape[1]
    order = device_order(slots, batch.visual_slots)
    slot = np.append(np.argsort(order), slots)  # the last one: of units that fill no slot
    names = ("tokens", "targets", "loss_weights", "positions", "segment_ids", "source_ids", "sample_ids")
    return dataclasses.replace(
        batch,
        reading_order=jnp.asarray(slot)[batch.reading_order].astype(jnp.int32),
        unit_slots=jnp.asarray(slot)[batch.unit_slots].astype(jnp.int32),
        **{name: getattr(batch, name)[:, order] for name in names},
    )
