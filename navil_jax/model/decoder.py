"""The decoder with modality-specific attention and feed-forward experts (paper section 3.3; released behaviour)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from navil_jax.batch import Batch
from navil_jax.config import ModelConfig
from navil_jax.model import layers, rope
from navil_jax.model.attention import attention, cached_attention, whole_rows
from navil_jax.model.experts import Experts, Parts, join_slots, split_slots
from navil_jax.sharding import constrain


class Layout(NamedTuple):
    """What every layer needs to know of the packed rows."""

    rotation: rope.Rotation  # of every place of the reading order
    sequence: jax.Array  # [B, L] the slot at each place of the reading order
    places: jax.Array  # [B, L] the place of each slot: the inverse of `sequence`
    segment_ids: jax.Array  # [B, L] in reading order
    visual_slots: int


class LayerOutputs(NamedTuple):
    """What a layer computed besides its output."""

    keys: jax.Array  # [B, L, K, D] in reading order, rotated
    values: jax.Array  # [B, L, K, D] in reading order
    attention: jax.Array  # [B, L, H] after the output projections, in slot order


class QKV(nnx.Module):
    """One weight set of query, key and value projections, with the norms of heads where the model has them."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        decoder = config.decoder
        linear = functools.partial(layers.linear, config=config, rngs=rngs, use_bias=decoder.qkv_bias)
        width, kv_heads = (decoder.width,), (decoder.num_kv_heads, decoder.head_dim)
        self.q = linear(width, (decoder.num_heads, decoder.head_dim), ("embed", "heads", "head_dim"))
        self.k = linear(width, kv_heads, ("embed", "kv_heads", "head_dim"))
        self.v = linear(width, kv_heads, ("embed", "kv_heads", "head_dim"))
        norm = functools.partial(layers.rms_norm, decoder.head_dim, decoder.norm_eps, config, rngs)
        self.q_norm = norm() if decoder.qk_norm else None
        self.k_norm = norm() if decoder.qk_norm else None

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, N, H] -> queries [B, N, heads, D], keys and values [B, N, kv_heads, D]."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


class Output(nnx.Module):
    """The attention output projections.

    Serial (InternLM2 flavour, released behaviour): text wo(a), visual wo_ve(wo(a)); wo_ve starts at the identity.
    Otherwise: text wo(a), visual wo_ve(a).
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        decoder = config.decoder
        linear = functools.partial(layers.linear, config=config, rngs=rngs, use_bias=decoder.out_bias)
        heads, width = (decoder.num_heads, decoder.head_dim), (decoder.width,)
        self.text = linear(heads, width, ("heads", "head_dim", "embed"))
        self.serial = decoder.serial_visual_output
        if not decoder.attention_experts:
            self.visual = None
        elif self.serial:
            identity = lambda key, shape, dtype: jnp.eye(shape[0], shape[1], dtype=dtype)  # noqa: E731
            self.visual = linear(width, width, ("mlp", "embed"), kernel_init=identity)
        else:
            self.visual = linear(heads, width, ("heads", "head_dim", "embed"))

    def __call__(self, parts: Parts) -> Parts:
        """[B, N, heads, D] -> [B, N, H] of each part; one part alone meets the text's weights."""
        if len(parts) == 1 or self.visual is None:
            return tuple(map(self.text, parts))
        visual, text = parts
        return self.visual(self.text(visual) if self.serial else visual), self.text(text)


class FeedForward(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        decoder = config.decoder
        linear = functools.partial(layers.linear, config=config, rngs=rngs)
        self.gate = linear((decoder.width,), (decoder.mlp_dim,), ("embed", "mlp"))
        self.up = linear((decoder.width,), (decoder.mlp_dim,), ("embed", "mlp"))
        self.down = linear((decoder.mlp_dim,), (decoder.width,), ("mlp", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, H] -> [B, N, H]."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class DecoderLayer(nnx.Module):
    """x' = x + attention(norm(x)); x'' = x' + ffn(norm(x')); the norms serve both kinds of token."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        decoder = config.decoder
        norm = functools.partial(layers.rms_norm, decoder.width, decoder.norm_eps, config, rngs)
        self.attention_norm, self.ffn_norm = norm(), norm()
        self.qkv = Experts(lambda rngs: QKV(config, rngs), decoder.attention_experts, rngs)
        self.out = Output(config, rngs)
        self.ffn = Experts(lambda rngs: FeedForward(config, rngs), decoder.ffn_experts, rngs)
        self.backend = config.attention

    def __call__(self, parts: Parts, layout: Layout) -> tuple[Parts, LayerOutputs]:
        """Runs the layer. Queries, keys and values alone go to reading order, and the result back.

        Args:
          parts: [B, V, H] and [B, T, H], visual and text slots; or [B, L, H] alone, which the text weights serve.
        """
        qkv = zip(*self.qkv(tuple(map(self.attention_norm, parts))), strict=True)
        q, k, v = (to_reading_order(tuple(map(whole_rows, part)), layout) for part in qkv)
        q, k = rope.rotate(q, layout.rotation), rope.rotate(k, layout.rotation)
        attended = attention(q, k, v, layout.segment_ids, causal=True, backend=self.backend)
        heads = map(whole_rows, to_slot_order(attended, len(parts), layout))
        out = self.out(tuple(constrain(part, "batch", "slots", "heads", "head_dim") for part in heads))
        parts = tuple(map(jnp.add, parts, out))
        parts = tuple(map(jnp.add, parts, self.ffn(tuple(map(self.ffn_norm, parts)))))
        parts = tuple(constrain(part, "batch", "slots", "features") for part in parts)
        return parts, LayerOutputs(k, v, join_slots(out))

    def decode(
        self, x: jax.Array, keys: jax.Array, values: jax.Array, rotation: rope.Rotation, lengths: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """One new token per row, with the text weights (released behaviour).

        Args:
          x: [B, 1, H].
          keys, values: [B, S, K, D], this layer's cache.
          rotation: of the new token.
          lengths: [B] int32, tokens in the cache; the new one is written there.

        Returns:
          x, and the cache with the new token.
        """
        q, k, v = self.qkv.text(self.attention_norm(x))
        q, k = rope.rotate(q, rotation), rope.rotate(k, rotation)
        write = jax.vmap(lambda cache, new, at: jax.lax.dynamic_update_slice_in_dim(cache, new, at, 0))
        keys, values = write(keys, k, lengths), write(values, v, lengths)
        x = x + self.out.text(cached_attention(q, keys, values, lengths + 1))
        return x + self.ffn.text(self.ffn_norm(x)), (keys, values)


class Decoder(nnx.Module):
    """Embeddings, layers and head of the language model."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        decoder = config.decoder
        self.config, self.model_config, self.remat = decoder, config, config.remat
        self.compute_dtype = jnp.dtype(config.compute_dtype)
        self.special_token_ids = config.special_token_ids
        embed = functools.partial(
            nnx.Embed,
            features=decoder.width,
            dtype=jnp.dtype(config.compute_dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.embed = embed(decoder.vocab_size, embedding_metadata=layers.axes("vocab", "embed"))
        special = len(self.special_token_ids)
        special_axes = layers.axes("special", "embed")
        self.special_embed = embed(special, embedding_metadata=special_axes) if special else None
        self.layers = layers.stack(lambda rngs: DecoderLayer(config, rngs), decoder.depth, rngs)
        self.final_norm = layers.rms_norm(decoder.width, decoder.norm_eps, config, rngs)
        head = functools.partial(layers.linear, (decoder.width,), (decoder.vocab_size,), ("embed", "vocab"))
        self.head = None if decoder.tie_embeddings else head(config=config, rngs=rngs)

    def embed_new(self, tokens: jax.Array) -> jax.Array:
        """[B, N] -> [B, N, H] from the ordinary table alone: the rule for produced tokens (released behaviour)."""
        x = self._rows(self.embed, "vocab", tokens)
        if self.config.pad_token_id is not None:
            x = jnp.where((tokens == self.config.pad_token_id)[..., None], jax.lax.stop_gradient(x), x)
        return x

    def embed_prompt(self, tokens: jax.Array) -> jax.Array:
        """[B, L] -> [B, L, H]; special tokens come from the special table, so that they train on their own."""
        x = self.embed_new(tokens)
        if self.special_embed is None:
            return x
        matches = tokens[..., None] == jnp.array(self.special_token_ids)
        special = self._rows(self.special_embed, "special", jnp.argmax(matches, axis=-1))
        return jnp.where(matches.any(axis=-1)[..., None], special, x)

    def _rows(self, embed: nnx.Embed, axis: str, places: jax.Array) -> jax.Array:
        """Rows of a table, rounded after they are taken: the gradient of a row is the float32 sum over its tokens."""
        table = embed.embedding[...]
        table = layers.gather(table, (axis, "embed"), table.dtype, table.dtype)
        return jnp.take(table, places, axis=0).astype(self.compute_dtype)

    def layout(self, batch: Batch) -> Layout:
        """What the layers need, computed once per step."""
        order = functools.partial(jnp.take_along_axis, indices=batch.sequence, axis=1)
        lengths = self._lengths(batch)
        rotation = rope.decoder_rotation(
            self.config, order(batch.positions), lengths if lengths is None else order(lengths)
        )
        rows = jnp.arange(batch.sequence.shape[0])[:, None]
        places = jnp.zeros_like(batch.sequence).at[rows, batch.sequence].set(jnp.arange(batch.sequence.shape[1]))
        segment_ids = jnp.take_along_axis(batch.segment_ids, batch.sequence, axis=1)
        return Layout(rotation, batch.sequence, places, segment_ids, batch.visual_slots)

    def _lengths(self, batch: Batch) -> jax.Array | None:
        """[B, L] length of each token's sample, where dynamic scaling can act on rows as long as these; else None."""
        slots = batch.tokens.shape[1]
        if self.config.rope_scaling != "dynamic" or slots <= self.config.max_positions:
            return None
        count = jax.vmap(lambda ids: jnp.bincount(ids, length=slots + 1)[ids])
        return count(batch.segment_ids)

    def __call__(
        self, x: jax.Array, layout: Layout, keep: Callable[[jax.Array, LayerOutputs], Any] = lambda x, outputs: None
    ) -> tuple[jax.Array, Any]:
        """Runs the layers.

        Args:
          x: [B, L, H], embedded tokens in slot order.
          keep: what to keep of every layer's output and `LayerOutputs`.

        Returns:
          [B, L, H] before the final norm, and what was kept, stacked over layers.
        """

        def body(layer: DecoderLayer, parts: Parts, _: None) -> tuple[Parts, Any]:
            parts, outputs = layers.gathered(layer, self.model_config)(parts, layout)
            return parts, keep(join_slots(parts), outputs)

        two = layout.visual_slots and (self.config.attention_experts or self.config.ffn_experts)
        parts: Parts = split_slots(x, layout.visual_slots) if two else (x,)
        parts, kept = layers.scan_layers(self.layers, body, parts, None, self.remat)
        return join_slots(parts), kept

    def decode(
        self, tokens: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """One step with a cache.

        Args:
          tokens: [B] int32, the newest token of each row.
          keys, values: [depth, B, S, K, D].
          lengths: [B] int32, tokens in each row's cache.

        Returns:
          logits [B, vocab], and the cache with the token in it. Past `max_positions` the rotation of new tokens
          follows the length so far, older keys keep theirs (released behaviour).
        """
        rotation = rope.decoder_rotation(self.config, lengths[:, None], lengths[:, None] + 1)

        def body(layer: DecoderLayer, x: jax.Array, cache: tuple[jax.Array, jax.Array]):
            return layer.decode(x, *cache, rotation, lengths)

        x, (keys, values) = layers.scan_layers(self.layers, body, self.embed_new(tokens[:, None]), (keys, values))
        return self.logits(x)[:, 0], keys, values

    def logits(self, x: jax.Array) -> jax.Array:
        """The head after the final norm: [B, N, H] -> [B, N, vocab] float32."""
        x = self.final_norm(x)
        kernel = constrain(self.head_kernel().astype(x.dtype), None, "vocab")
        return jnp.einsum("bnh,hv->bnv", x, kernel, preferred_element_type=jnp.float32)

    def head_kernel(self) -> jax.Array:
        """The vocabulary head [H, vocab]; the embeddings where they are tied."""
        return self.embed.embedding[...].T if self.head is None else self.head.kernel[...]


def to_reading_order(parts: Parts, layout: Layout) -> jax.Array:
    """Slots [B, V, ...] and [B, T, ...] (or all of them) in the order in which they are read: [B, L, ...].

    Example: parts (a b, c d e), sequence 2 0 1 4 3 -> c a b e d
    """
    return _to_reading_order(parts, *_orders(len(parts), layout)) if layout.visual_slots else parts[0]


def to_slot_order(x: jax.Array, parts: int, layout: Layout) -> Parts:
    """The inverse of `to_reading_order`."""
    return _to_slot_order(x, *_orders(parts, layout)) if layout.visual_slots else (x,)


def _orders(parts: int, layout: Layout) -> tuple[jax.Array, Parts]:
    """The slot at each place, and the places of each part's slots."""
    return layout.sequence, split_slots(layout.places, layout.visual_slots) if parts == 2 else (layout.places,)


def _take(x: jax.Array, order: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1, mode="promise_in_bounds")


@jax.custom_vjp
def _to_reading_order(parts: Parts, sequence: jax.Array, places: Parts) -> jax.Array:
    """Its gradient is a gather too, not a scatter."""
    return _take(join_slots(parts), sequence)


@jax.custom_vjp
def _to_slot_order(x: jax.Array, sequence: jax.Array, places: Parts) -> Parts:
    return tuple(_take(x, own) for own in places)


_to_reading_order.defvjp(
    lambda parts, *orders: (_to_reading_order(parts, *orders), orders),
    lambda orders, gradient: (_to_slot_order(gradient, *orders), None, None),
)
_to_slot_order.defvjp(
    lambda x, *orders: (_to_slot_order(x, *orders), orders),
    lambda orders, gradient: (_to_reading_order(gradient, *orders), None, None),
)
