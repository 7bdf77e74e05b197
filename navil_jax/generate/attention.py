"""What a prompt's tokens look at: exact attention weights of chosen tokens, shares and feature scales of all layers.

The model runs layer by layer, with its own attention. Beside it, weights are computed anew of the layer's queries and
keys, softmax(q k / sqrt(D)) in float32 with the causal mask, for the chosen tokens and then, for sums alone, for
`CHUNK` queries at a time; so memory grows with the prompt, not with its square.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from navil_jax.batch import Batch, SampleFeatures
from navil_jax.generate.programs import Programs, length_of
from navil_jax.model import layers
from navil_jax.model import params as model_params
from navil_jax.model.decoder import Decoder, Layout
from navil_jax.model.experts import Streams, join_slots
from navil_jax.model.linear import exact_products
from navil_jax.model.params import Params

CHUNK = 256  # queries whose weights are held at a time


@dataclasses.dataclass(frozen=True)
class Looks:
    """What was found of a prompt of S tokens in a model with N layers of H heads.

    Attributes:
      weights: layer -> [H, n, S] float32, attention of the n chosen tokens on every token, in reading order.
      shares: [N, 2] attention on visual and on text tokens, mean over heads and the text tokens behind the first visual
        one; None without images.
      norms: [N + 1, 2] mean L2 norm of visual and of text tokens in front of each layer and behind the last one; NaN
        where there are none.
    """

    weights: dict[int, np.ndarray]
    shares: np.ndarray | None
    norms: np.ndarray


class _Seen(NamedTuple):
    """What a layer shows, of the first row."""

    weights: jax.Array  # [H, n, L]
    shares: jax.Array  # [2]


def look(programs: Programs, prompt: SampleFeatures, layer_numbers: Sequence[int], tokens: Sequence[int]) -> Looks:
    """Runs a prompt.

    Args:
      layer_numbers: of which weights are kept, from 0.
      tokens: chosen ones, by their place in the prompt, from 0.
    """
    batch, config, params = programs.batch([prompt]), programs.config, programs.params
    depth, length = config.decoder.depth, length_of(prompt)

    @jax.jit
    def begin(params: Params, batch: Batch) -> Streams:
        with programs.sharded(), exact_products(config.compute_dtype):
            model = model_params.bind(config, params)
            return model.decoder.streams(model.embed(batch), model.decoder.layout(batch))

    @jax.jit
    def step(params: Params, number: Int32[Array, ""], streams: Streams, batch: Batch) -> tuple[Streams, _Seen]:
        with programs.sharded(), exact_products(config.compute_dtype):
            decoder = model_params.bind(config, params).decoder
            layer, layout = _layer(decoder, number), decoder.layout(batch)
            seen = _seen(layer, streams, layout, jnp.asarray(tokens, jnp.int32))
            return layer(streams, layout)[0], seen

    streams = begin(params, batch)
    weights, shares, norms = {}, [], []
    for number in range(depth):
        norms.append(_norms(streams, batch))
        streams, seen = step(params, jnp.int32(number), streams, batch)
        shares.append(seen.shares)
        if number in layer_numbers:
            weights[number] = np.asarray(seen.weights)[:, :, :length]
    norms.append(_norms(streams, batch))
    images = len(prompt["visual_tokens"]) > 0
    return Looks(weights, np.stack(jax.device_get(shares)) if images else None, np.stack(norms))


def _layer(decoder: Decoder, number: Int32[Array, ""]) -> Any:
    """One layer of the stack, with its matrices as in training."""
    graph, state = nnx.split(decoder.layers)
    own = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), state)
    return layers.unsharded(nnx.merge(graph, own), decoder.model_config)


def _seen(layer: Any, streams: Streams, layout: Layout, tokens: Int32[Array, " n"]) -> _Seen:
    q, k, _ = (x[0] for x in layer.heads(streams, layout))
    segments, order = layout.segment_ids[0], layout.reading_order[0]
    real, visual = segments > 0, (order < layout.visual_slots) & (segments > 0)
    weights = attention_weights(q[tokens], k, tokens, real)
    asking = real & ~visual & (jnp.cumsum(visual) > 0)
    return _Seen(weights, _shares(q, k, real, visual, asking))


def attention_weights(
    q: Float[Array, "n H D"], k: Float[Array, "L K D"], positions: Int32[Array, " n"], real: Bool[Array, " L"]
) -> Float32[Array, "H n L"]:
    """The weights with which queries at `positions` of one sample attend to its tokens: float32, causal, exact.

    Args:
      k: query head h reads key head h // (H / K).
      real: which positions hold tokens of the sample.
    """
    keys = jnp.repeat(k, q.shape[1] // k.shape[1], axis=1).astype(jnp.float32)
    scores = jnp.einsum("nhd,lhd->hnl", q.astype(jnp.float32), keys, precision=jax.lax.Precision.HIGHEST)
    mask = (positions[:, None] >= jnp.arange(len(k))) & real
    return jax.nn.softmax(jnp.where(mask, scores * q.shape[2] ** -0.5, -jnp.inf), axis=-1)


def _shares(q: jax.Array, k: jax.Array, real: jax.Array, visual: jax.Array, asking: jax.Array) -> jax.Array:
    """Attention on visual and on text tokens, mean over heads and the queries that are `asking`; [2]."""
    length = q.shape[0]
    chunks = -(-length // CHUNK)
    padded = jnp.pad(q, ((0, chunks * CHUNK - length), (0, 0), (0, 0))).reshape(chunks, CHUNK, *q.shape[1:])
    positions = jnp.arange(chunks * CHUNK).reshape(chunks, CHUNK)

    def on_visual(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        weights = attention_weights(chunk[0], k, chunk[1], real)
        return jnp.sum(weights * visual, axis=-1).mean(axis=0)

    share = jax.lax.map(on_visual, (padded, positions)).reshape(-1)[:length]
    mean = jnp.sum(share * asking) / jnp.maximum(asking.sum(), 1)
    return jnp.stack([mean, 1 - mean])


def _norms(streams: Streams, batch: Batch) -> np.ndarray:
    """Mean L2 norm of the visual and of the text tokens of the first row; [2], NaN where there are none."""
    norms = np.asarray(jnp.linalg.norm(join_slots(streams)[0].astype(jnp.float32), axis=-1), np.float64)
    used = np.asarray(batch.segment_ids[0]) > 0
    visual = np.arange(len(norms)) < batch.visual_slots
    return np.array([norms[used & of].mean() if (used & of).any() else np.nan for of in (visual, ~visual)])
