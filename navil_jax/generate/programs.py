"""Prefill and cached decoding of prompts of any size, through few compiled programs.

Prompts go through the model in the training layout (one sample per row). Slots and cache lengths are rounded up to
buckets, so that images of many sizes share programs. The patch slots follow from the visual slots, as every merged
unit fills one of them.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from navil_jax.batch import Batch, BatchSpec, SampleFeatures
from navil_jax.config import MeshConfig, ModelConfig
from navil_jax.errors import UserError
from navil_jax.model import params as model_params
from navil_jax.model.decoder import Cache
from navil_jax.model.linear import exact_products
from navil_jax.model.params import Params
from navil_jax.model.xla_attention import QUERY_CHUNK
from navil_jax.sharding import axis_size, constrain, make_mesh, named

VISUAL_FLOOR, TEXT_FLOOR, CACHE_FLOOR = 256, 128, 512  # smallest buckets, in tokens
CACHE_AXES = ("layers", "batch", "kv_heads", "slots", "head_dim")


def bucket(count: int, floor: int) -> int:
    """The smallest bucket that holds `count`: floor, doubled, and three quarters of it where whole query chunks fit.

    Example, floor 256: 256, 512, 1024, 1536, 2048, 3072, 4096, ...
    """
    size = floor
    while size < count:
        size *= 2
    smaller = size * 3 // 4
    return smaller if count <= smaller and size > floor and smaller % QUERY_CHUNK == 0 else size


def length_of(prompt: SampleFeatures) -> int:
    """Tokens of a prompt."""
    return len(prompt["visual_tokens"]) + len(prompt["text_tokens"])


def tokens_of(prompt: SampleFeatures) -> np.ndarray:
    """Tokens of a prompt in reading order, [n] int32."""
    tokens = np.zeros(length_of(prompt), np.int32)
    tokens[prompt["visual_positions"]] = prompt["visual_tokens"]
    tokens[prompt["text_positions"]] = prompt["text_tokens"]
    return tokens


class Programs:
    """The model's compiled programs with given parameters; `engine.Engine` runs requests with them.

    Args:
      config: the model.
      params: its parameters; they are put on the mesh as in training. None: nothing can be run, only lowered (`lower`).
      mesh: devices; None: the first device. Rows are split over its batch axes (empty rows fill them up).

    `compilations` counts the programs compiled so far, by "prefill" and "decode".
    """

    def __init__(self, config: ModelConfig, params: Params | None, mesh: Mesh | None = None):
        self.config = dataclasses.replace(config, remat="none")
        self.mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
        self.params: Params | None = None
        if params is not None:
            self.load(params)
        self.compilations: collections.Counter[str] = collections.Counter()
        self._prefill = jax.jit(self._prefill_program)
        self._decode = jax.jit(self._decode_program, donate_argnums=2)
        self._resize = jax.jit(self._resize_program, static_argnums=1)

    def load(self, params: Params) -> None:
        """Puts parameters on the mesh, in the place of those before; the compiled programs serve them too."""
        self.params = model_params.put(self.config, params, self.mesh)

    @property
    def rows(self) -> int:
        """Rows of a batch are a multiple of it: the devices of the batch axes."""
        return axis_size(self.mesh, "batch")

    def prefill(self, prompts: Sequence[SampleFeatures], max_new_tokens: int) -> tuple[jax.Array, Cache]:
        """Reads the prompts into a cache of their own.

        Args:
          prompts: n samples; targets and weights play no part.
          max_new_tokens: the cache gets room for that many.

        Returns:
          Logits [B, vocab] float32 after the last token of each row, and the cache; B >= n, rows from n on are empty.

        Raises:
          UserError: images for a model without vision.
        """
        longest = max(map(length_of, prompts))
        batch = self.batch(prompts)
        logits, cache = self.read(batch)
        return logits, self._resize(cache, bucket(longest + max_new_tokens, CACHE_FLOOR))

    def read(self, batch: Batch) -> tuple[jax.Array, Cache]:
        """Logits [B, vocab] float32 after the last token of each row, and a cache as long as a row of the batch."""
        return self._prefill(self.params, batch)

    def decode(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """One step: tokens [B] int32 -> logits [B, vocab] float32 after them, and the longer cache. `cache` is gone."""
        return self._decode(self.params, tokens, cache)

    def lower(self, spec: BatchSpec, max_new_tokens: int) -> dict[str, jax.stages.Lowered]:
        """The programs "prefill" and "decode" for prompts of these shapes, to be compiled without data."""

        def array(shape: tuple[int, ...], dtype: jnp.dtype, *axes: str) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=named(self.mesh, *axes))

        params = model_params.abstract_on(self.config, self.mesh)
        decoder, rows = self.config.decoder, spec.rows
        length = bucket(spec.row_slots + max_new_tokens, CACHE_FLOOR)
        kept = (decoder.depth, rows, decoder.num_kv_heads, length, decoder.head_dim)
        keys = array(kept, jnp.dtype(self.config.compute_dtype), *CACHE_AXES)
        cache = Cache(keys, keys, array((rows,), jnp.dtype("int32"), "batch"))
        return {
            "prefill": self._prefill.lower(params, spec.abstract(named(self.mesh, "batch"))),
            "decode": self._decode.lower(params, cache.lengths, cache),
        }

    def batch(self, prompts: Sequence[SampleFeatures]) -> Batch:
        """One row per prompt, in the smallest buckets that hold them, on the devices."""

        def longest(name: str) -> int:
            return max(len(prompt[name]) for prompt in prompts)

        if self.config.vision is None and longest("visual_tokens"):
            raise UserError("the model has no vision part; ask without images")
        visual_slots = bucket(longest("visual_tokens"), VISUAL_FLOOR) if self.config.vision else 0
        rows = -(-len(prompts) // self.rows) * self.rows
        spec = self._spec(rows, visual_slots, bucket(longest("text_tokens"), TEXT_FLOOR))
        none = {"patches": np.zeros((0, 0), np.uint8)} if self.config.vision is None else {}
        return self._put(spec, [[{**prompt, **none}] for prompt in prompts])

    def read_empty(self, visual_slots: int, text_slots: int) -> tuple[jax.Array, Cache]:
        """What `read` makes of a batch without prompts, so that its program is compiled."""
        return self.read(self._put(self._spec(self.rows, visual_slots, text_slots), []))

    def _spec(self, rows: int, visual_slots: int, text_slots: int) -> BatchSpec:
        vision = self.config.vision
        if vision is None:
            return BatchSpec(rows, 0, text_slots, 0, patch_dim=0, unit_patches=1)
        units = vision.unit_patches
        return BatchSpec(rows, visual_slots, text_slots, visual_slots * units, vision.patch_dim, units)

    def _put(self, spec: BatchSpec, rows: Sequence[Sequence[SampleFeatures]]) -> Batch:
        context_id = self.config.special_id("<IMG_CONTEXT>") if self.config.vision else -1
        return jax.device_put(spec.build(rows, context_id), named(self.mesh, "batch"))

    def _prefill_program(self, params: Params, batch: Batch) -> tuple[jax.Array, Cache]:
        self.compilations["prefill"] += 1
        with self.sharded(), exact_products(self.config.compute_dtype):
            model = model_params.bind(self.config, params)
            x, (keys, values) = model(
                batch, keep=lambda x, outputs: (outputs.keys.swapaxes(1, 2), outputs.values.swapaxes(1, 2))
            )
            lengths = jnp.sum(batch.segment_ids > 0, axis=1, dtype=jnp.int32)
            last = jnp.take_along_axis(batch.reading_order, jnp.maximum(lengths - 1, 0)[:, None], axis=1)
            logits = model.logits(jnp.take_along_axis(x, last[..., None], axis=1))[:, 0]
            return logits, constrained(Cache(keys, values, lengths))

    def _decode_program(self, params: Params, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        self.compilations["decode"] += 1
        with self.sharded(), exact_products(self.config.compute_dtype):
            decoder = model_params.bind(self.config, params).decoder
            logits, cache = decoder.decode(tokens, cache)
            return logits, constrained(cache)

    def _resize_program(self, cache: Cache, length: int) -> Cache:
        with self.sharded():
            return resized(cache, length)

    def sharded(self) -> contextlib.AbstractContextManager:
        """Where programs of this mesh are traced."""
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)


def resized(cache: Cache, length: int) -> Cache:
    """Cuts or extends the positions of the cache; cut ones are empty, as the reading order puts these last."""

    def resize(x: jax.Array) -> jax.Array:
        missing = max(0, length - x.shape[3])
        return jnp.pad(x[:, :, :, :length], ((0, 0), (0, 0), (0, 0), (0, missing), (0, 0)))

    return constrained(Cache(resize(cache.keys), resize(cache.values), cache.lengths))


def constrained(cache: Cache) -> Cache:
    """The cache as the mesh divides it."""
    keys, values = constrain(cache.keys, *CACHE_AXES), constrain(cache.values, *CACHE_AXES)
    return Cache(keys, values, constrain(cache.lengths, "batch"))
