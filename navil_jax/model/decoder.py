"""The decoder with modality-specific attention and feed-forward experts (paper section 3.3; released behaviour)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, Shaped

from navil_jax.batch import AnyArray, Batch
from navil_jax.config import ModelConfig
from navil_jax.model import layers, rope
from navil_jax.model.attention import attention, whole_rows
from navil_jax.model.experts import Experts, Streams, join_slots, split_slots
from navil_jax.model.xla_attention import cached_attention
from navil_jax.sharding import constrain


class Layout(NamedTuple):
    """What every layer needs to know of the packed rows."""

    rotation: rope.Rotation  # of every position of the reading order
    reading_order: Int32[Array, "B L"]  # the slot that is read first, second, ...
    inverse_order: Int32[Array, "B L"]  # when each slot is read
    segment_ids: Int32[Array, "B L"]  # in reading order
    visual_slots: int


class LayerOutputs(NamedTuple):
    """What a layer computed besides its output."""

    keys: Float[Array, "B L K D"]  # in reading order, rotated
    values: Float[Array, "B L K D"]  # in reading order
    attention: Float[Array, "B L H"]  # after the output projections, in slot order


class Cache(NamedTuple):
    """Keys and values of the tokens read so far, in reading order, heads first as attention reads them."""

    keys: jax.Array  # [depth, B, K, S, D], rotated
    values: jax.Array  # [depth, B, K, S, D]
    lengths: jax.Array  # [B] int32, tokens of each row; what lies behind them has no meaning

    def positions(self, count: int) -> Int32[Array, "B N"]:
        """Of so many new tokens of each row."""
        return self.lengths[:, None] + jnp.arange(count)

    def written(self, layer: jax.Array, keys: Float[Array, "B N K D"], values: Float[Array, "B N K D"]) -> "Cache":
        """With new tokens' keys and values in a layer, but for those past its end; lengths are as before."""
        positions = self.positions(keys.shape[1])
        at = jnp.stack([jnp.full_like(positions, layer), positions], axis=2)
        write = functools.partial(jax.lax.scatter, dimension_numbers=_WRITTEN, unique_indices=True, mode="drop")
        return Cache(write(self.keys, at, keys), write(self.values, at, values), self.lengths)


_WRITTEN = jax.lax.ScatterDimensionNumbers(  # [B, N, K, D] at N (layer, position) of each row of a cache
    update_window_dims=(2, 3),
    inserted_window_dims=(0, 3),
    scatter_dims_to_operand_dims=(0, 3),
    operand_batching_dims=(1,),
    scatter_indices_batching_dims=(0,),
)


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

    @jax.named_scope("qkv")
    def __call__(
        self, x: Float[Array, "B N H"]
    ) -> tuple[Float[Array, "B N heads D"], Float[Array, "B N kv_heads D"], Float[Array, "B N kv_heads D"]]:
        """Queries, keys and values of tokens."""
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

    @jax.named_scope("out")
    def __call__(self, streams: Streams) -> Streams:
        """[B, N, heads, D] -> [B, N, H] of each stream; one stream alone meets the text's weights."""
        if len(streams) == 1 or self.visual is None:
            return tuple(map(self.text, streams))
        visual, text = streams
        return self.visual(self.text(visual) if self.serial else visual), self.text(text)


class FeedForward(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        decoder = config.decoder
        linear = functools.partial(layers.linear, config=config, rngs=rngs)
        self.gate = linear((decoder.width,), (decoder.mlp_dim,), ("embed", "mlp"))
        self.up = linear((decoder.width,), (decoder.mlp_dim,), ("embed", "mlp"))
        self.down = linear((decoder.mlp_dim,), (decoder.width,), ("mlp", "embed"))

    @jax.named_scope("ffn")
    def __call__(self, x: Float[Array, "B N H"]) -> Float[Array, "B N H"]:
        """Runs the block on tokens."""
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

    def __call__(self, streams: Streams, layout: Layout) -> tuple[Streams, LayerOutputs]:
        """Runs the layer. Queries, keys and values alone go to reading order, and the result back.

        Args:
          streams: [B, V, H] and [B, T, H], visual and text slots; or [B, L, H] alone, which the text weights serve.
        """
        q, k, v = self.heads(streams, layout)
        attended = attention(q, k, v, layout.segment_ids, causal=True, backend=self.backend)
        heads = map(whole_rows, to_slot_order(attended, len(streams), layout))
        out = self.out(tuple(constrain(stream, "batch", "slots", "heads", "head_dim") for stream in heads))
        streams = tuple(map(jnp.add, streams, out))
        streams = tuple(map(jnp.add, streams, self.ffn(tuple(map(self.ffn_norm, streams)))))
        streams = tuple(constrain(stream, "batch", "slots", "features") for stream in streams)
        return streams, LayerOutputs(k, v, join_slots(out))

    def heads(
        self, streams: Streams, layout: Layout
    ) -> tuple[Float[Array, "B L N D"], Float[Array, "B L K D"], Float[Array, "B L K D"]]:
        """What attention works on, in reading order: queries and keys, rotated, and values."""
        qkv = zip(*self.qkv(tuple(map(self.attention_norm, streams))), strict=True)
        q, k, v = (to_reading_order(tuple(map(whole_rows, of)), layout) for of in qkv)
        return rope.rotate(q, layout.rotation), rope.rotate(k, layout.rotation), v

    def extend(
        self, x: Float[Array, "B N H"], cache: Cache, number: Int32[Array, ""], rotation: rope.Rotation
    ) -> tuple[Float[Array, "B N H"], Cache]:
        """New tokens of each row, with the text weights (produced visual tokens, too: released behaviour).

        Args:
          cache: of all layers; the new tokens are written behind each row's.
          number: of this layer.
          rotation: of the new tokens.

        Returns:
          x, and the cache with the new tokens' keys and values in this layer; its lengths are as before.
        """
        q, k, v = self.qkv.text(self.attention_norm(x))
        q, k = rope.rotate(q, rotation), rope.rotate(k, rotation)
        cache = cache.written(number, k, v)
        attended = cached_attention(q, cache.keys, cache.values, number, cache.positions(x.shape[1]))
        x = x + self.out.text(attended)
        return x + self.ffn.text(self.ffn_norm(x)), cache


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

    @jax.named_scope("embed")
    def embed_new(self, tokens: Int32[AnyArray, "B N"]) -> Float[Array, "B N H"]:
        """Embeds from the ordinary table alone: the rule for produced tokens (released behaviour)."""
        x = self._rows(self.embed, "vocab", tokens)
        if self.config.pad_token_id is not None:
            x = jnp.where((tokens == self.config.pad_token_id)[..., None], jax.lax.stop_gradient(x), x)
        return x

    @jax.named_scope("decoder/embed")
    def embed_prompt(self, tokens: Int32[AnyArray, "B L"]) -> Float[Array, "B L H"]:
        """Embeds a prompt; special tokens come from the special table, so that they train on their own."""
        x = self.embed_new(tokens)
        if self.special_embed is None:
            return x
        matches = tokens[..., None] == jnp.array(self.special_token_ids)
        special = self._rows(self.special_embed, "special", jnp.argmax(matches, axis=-1))
        return jnp.where(matches.any(axis=-1)[..., None], special, x)

    def _rows(self, embed: nnx.Embed, axis: str, ids: AnyArray) -> jax.Array:
        """Rows of a table, rounded after they are taken: the gradient of a row is the float32 sum over its tokens."""
        table = embed.embedding[...]
        table = layers.unshard(table, (axis, "embed"), table.dtype, table.dtype)
        return jnp.take(table, ids, axis=0).astype(self.compute_dtype)

    def layout(self, batch: Batch) -> Layout:
        """What the layers need, computed once per step."""
        reading_order, lengths = jnp.asarray(batch.reading_order), self._lengths(batch)
        order = functools.partial(jnp.take_along_axis, indices=reading_order, axis=1)
        rotation = rope.decoder_rotation(
            self.config, order(batch.positions), lengths if lengths is None else order(lengths)
        )
        rows, numbers = jnp.arange(reading_order.shape[0])[:, None], jnp.arange(reading_order.shape[1])
        inverse = jnp.zeros_like(reading_order).at[rows, reading_order].set(numbers)
        return Layout(rotation, reading_order, inverse, order(batch.segment_ids), batch.visual_slots)

    def _lengths(self, batch: Batch) -> jax.Array | None:
        """[B, L] length of each token's sample, where dynamic scaling can act on rows as long as these; else None."""
        slots = batch.tokens.shape[1]
        if self.config.rope_scaling != "dynamic" or slots <= self.config.max_positions:
            return None
        count = jax.vmap(lambda ids: jnp.bincount(ids, length=slots + 1)[ids])
        return count(batch.segment_ids)

    @jax.named_scope("decoder")
    def __call__(
        self,
        x: Float[Array, "B L H"],
        layout: Layout,
        keep: Callable[[jax.Array, LayerOutputs], Any] = lambda x, outputs: None,
    ) -> tuple[Float[Array, "B L H"], Any]:
        """Runs the layers.

        Args:
          x: embedded tokens in slot order.
          keep: what to keep of every layer's output and `LayerOutputs`.

        Returns:
          Tokens before the final norm, and what was kept, stacked over layers.
        """

        def body(layer: DecoderLayer, streams: Streams, _: None) -> tuple[Streams, Any]:
            streams, outputs = layers.unsharded(layer, self.model_config)(streams, layout)
            return streams, keep(join_slots(streams), outputs)

        streams, kept = layers.scan_layers(self.layers, body, self.streams(x, layout), None, self.remat)
        return join_slots(streams), kept

    def streams(self, x: Float[Array, "B L H"], layout: Layout) -> Streams:
        """The slots as layers take them: visual and text ones, where the model has weights for each."""
        two = layout.visual_slots and (self.config.attention_experts or self.config.ffn_experts)
        return split_slots(x, layout.visual_slots) if two else (x,)

    @jax.named_scope("decoder")
    def decode(self, tokens: Int32[Array, " B"], cache: Cache) -> tuple[Float32[Array, "B vocab"], Cache]:
        """One step with a cache.

        Args:
          tokens: the newest one of each row.

        Returns:
          Logits, and the cache with the token in it. Past `max_positions` the rotation of new tokens
          follows the length so far, older keys keep theirs (released behaviour).
        """
        x, cache = self._extend(self.embed_new(tokens[:, None]), cache)
        return self.logits(x)[:, 0], cache._replace(lengths=cache.lengths + 1)

    @jax.named_scope("decoder")
    def read_on(
        self, tokens: Int32[Array, "B N"], counts: Int32[Array, " B"], cache: Cache
    ) -> tuple[Float32[Array, "B vocab"], Cache]:
        """More text tokens of prompts whose beginnings are in the cache, within `max_positions`.

        Args:
          counts: how many of each row's tokens are meant, at least 1; the others have no meaning.

        Returns:
          Logits after the last token of each row, and the cache with the tokens in it.
        """
        x, cache = self._extend(self.embed_prompt(tokens), cache)
        last = jnp.take_along_axis(x, (counts - 1)[:, None, None], axis=1)
        return self.logits(last)[:, 0], cache._replace(lengths=cache.lengths + counts)

    def _extend(self, x: Float[Array, "B N H"], cache: Cache) -> tuple[Float[Array, "B N H"], Cache]:
        positions = cache.positions(x.shape[1])
        rotation = rope.decoder_rotation(self.config, positions, positions + 1)

        def body(layer: DecoderLayer, carry: tuple[jax.Array, Cache], number: jax.Array):
            return layer.extend(*carry, number, rotation), None

        return layers.scan_layers(self.layers, body, (x, cache), jnp.arange(self.config.depth))[0]

    @jax.named_scope("head")
    def logits(self, x: Float[Array, "B N H"]) -> Float32[Array, "B N vocab"]:
        """The head after the final norm."""
        x = self.final_norm(x)
        kernel = constrain(self.head_kernel().astype(x.dtype), None, "vocab")
        return jnp.einsum("bnh,hv->bnv", x, kernel, preferred_element_type=jnp.float32)

    def head_kernel(self) -> Float[Array, "H vocab"]:
        """The vocabulary head; the embeddings where they are tied."""
        return jnp.asarray(self.embed.embedding[...].T if self.head is None else self.head.kernel[...])


@jax.named_scope("reading_order")
def to_reading_order(streams: Streams, layout: Layout) -> Shaped[Array, "B L ..."]:
    """Visual and text slots (or all of them) in the order in which they are read.

    Example: streams (a b, c d e), reading_order 2 0 1 4 3 -> c a b e d
    """
    return _to_reading_order(streams, *_orders(len(streams), layout)) if layout.visual_slots else streams[0]


@jax.named_scope("reading_order")
def to_slot_order(x: Shaped[Array, "B L ..."], streams: int, layout: Layout) -> Streams:
    """The inverse of `to_reading_order`."""
    return _to_slot_order(x, *_orders(streams, layout)) if layout.visual_slots else (x,)


def _orders(streams: int, layout: Layout) -> tuple[jax.Array, Streams]:
    """The slot at each position of the reading order, and the position of each slot, by stream."""
    inverse = layout.inverse_order
    return layout.reading_order, split_slots(inverse, layout.visual_slots) if streams == 2 else (inverse,)


def _take(x: jax.Array, order: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1, mode="promise_in_bounds")


@jax.custom_vjp
def _to_reading_order(streams: Streams, reading_order: jax.Array, inverse: Streams) -> jax.Array:
    """Its gradient is a gather too, not a scatter."""
    return _take(join_slots(streams), reading_order)


@jax.custom_vjp
def _to_slot_order(x: jax.Array, reading_order: jax.Array, inverse: Streams) -> Streams:
    return tuple(_take(x, own) for own in inverse)


_to_reading_order.defvjp(
    lambda streams, *orders: (_to_reading_order(streams, *orders), orders),
    lambda orders, gradient: (_to_slot_order(gradient, *orders), None, None),
)
_to_slot_order.defvjp(
    lambda x, *orders: (_to_slot_order(x, *orders), orders),
    lambda orders, gradient: (_to_reading_order(gradient, *orders), None, None),
)
