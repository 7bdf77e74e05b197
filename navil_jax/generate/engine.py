"""Prefill and cached decoding of prompts of any size, through few compiled programs.

Prompts go through the model in the training layout (one sample per row). Slots and cache lengths are rounded up to
buckets, so that images of many sizes share programs. The patch slots follow from the visual slots, as every merged
unit fills one of them.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
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

MAX_TOKENS = 32768  # prompt and answer together, of one row
VISUAL_FLOOR, TEXT_FLOOR, CACHE_FLOOR = 256, 128, 512  # smallest buckets, in tokens
CACHE_AXES = ("layers", "batch", "kv_heads", "slots", "head_dim")

# (logits [B, vocab] float32, number of the new token from 0) -> tokens [B] int32. See sampling.Sampler.
Chooser = Callable[[jax.Array, int], jax.Array]


def bucket(count: int, floor: int) -> int:
    """The smallest bucket that holds `count`: floor, doubled, and three quarters of it where whole query chunks fit.

    Example, floor 256: 256, 512, 1024, 1536, 2048, 3072, 4096, ...
    """
    size = floor
    while size < count:
        size *= 2
    smaller = size * 3 // 4
    return smaller if count <= smaller and size > floor and smaller % QUERY_CHUNK == 0 else size


class Engine:
    """Generates with given parameters.

    Args:
      config: the model.
      params: its parameters; they are put on the mesh as in training. None: nothing can be run, only lowered (`lower`).
      mesh: devices; None: the first device. Rows are split over its batch axes (empty rows fill them up).
      max_tokens: limit of prompt and answer together, for every row.

    `compilations` counts the programs compiled so far, by "prefill" and "decode".

    Example:
      engine = Engine(config, params)
      engine.generate([prompt], Sampler(), max_new_tokens=100, stop_id=tokenizer.token_id("<|im_end|>"))
      -> [[1008, 364, 92542]]
    """

    def __init__(
        self, config: ModelConfig, params: Params | None, mesh: Mesh | None = None, max_tokens: int = MAX_TOKENS
    ):
        self.config = dataclasses.replace(config, remat="none")
        self.mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
        shardings = model_params.shardings(self.config, self.mesh)
        self.params = None if params is None else jax.device_put(params, shardings)
        self.max_tokens = max_tokens
        self.compilations: collections.Counter[str] = collections.Counter()
        self._prefill = jax.jit(self._prefill_program)
        self._decode = jax.jit(self._decode_program, donate_argnums=2)
        self._resize = jax.jit(self._resize_program, static_argnums=1)

    def generate(
        self, prompts: Sequence[SampleFeatures], choose: Chooser, max_new_tokens: int, stop_id: int
    ) -> list[list[int]]:
        """The new tokens of every prompt; arguments and errors as in `stream`."""
        answers: list[list[int]] = [[] for _ in prompts]
        for tokens in self.stream(prompts, choose, max_new_tokens, stop_id):
            for answer, token in zip(answers, tokens, strict=True):
                answer += [] if token is None else [token]
        return answers

    def stream(
        self, prompts: Sequence[SampleFeatures], choose: Chooser, max_new_tokens: int, stop_id: int
    ) -> Iterator[list[int | None]]:
        """Yields one new token per prompt and step, None for a prompt whose answer has ended.

        Args:
          prompts: one sample per row, of any lengths.
          choose: picks tokens from logits.
          max_new_tokens: the most tokens of an answer.
          stop_id: ends an answer and is its last token (released behaviour).

        Raises:
          UserError: as `prefill`.
        """
        logits, cache = self.prefill(prompts, max_new_tokens)
        running = [True] * len(prompts)
        for step in range(max_new_tokens):
            tokens = choose(logits, step)
            if step + 1 < max_new_tokens:
                logits, cache = self.decode(tokens, cache)  # the device goes on while the host reads the tokens
            new = np.asarray(tokens)[: len(prompts)].tolist()
            yield [token if runs else None for token, runs in zip(new, running, strict=True)]
            running = [runs and token != stop_id for token, runs in zip(new, running, strict=True)]
            if not any(running):
                return

    def prefill(self, prompts: Sequence[SampleFeatures], max_new_tokens: int) -> tuple[jax.Array, Cache]:
        """Reads the prompts.

        Args:
          prompts: n samples; targets and weights play no part.
          max_new_tokens: the cache gets room for that many.

        Returns:
          Logits [B, vocab] float32 after the last token of each row, and the cache; B >= n, rows from n on are empty.

        Raises:
          UserError: a prompt with its answer is longer than `max_tokens`, images for a model without vision, or no
            room for new tokens is asked for.
        """
        if max_new_tokens < 1:
            raise UserError(f"max-new-tokens {max_new_tokens}: must be at least 1")
        longest = max(len(prompt["visual_tokens"]) + len(prompt["text_tokens"]) for prompt in prompts)
        if longest + max_new_tokens > self.max_tokens:
            raise UserError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones are over the limit of {self.max_tokens}; "
                "take fewer or smaller images, a shorter text, or fewer new tokens"
            )
        batch = jax.device_put(self._batch(prompts), named(self.mesh, "batch"))
        logits, cache = self._prefill(self.params, batch)
        return logits, self._resize(cache, bucket(longest + max_new_tokens, CACHE_FLOOR))

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

    def _batch(self, prompts: Sequence[SampleFeatures]) -> Batch:
        """One row per prompt, in the smallest buckets that hold them."""

        def longest(name: str) -> int:
            return max(len(prompt[name]) for prompt in prompts)

        vision = self.config.vision
        if vision is None and longest("visual_tokens"):
            raise UserError("the model has no vision part; ask without images")
        visual_slots = bucket(longest("visual_tokens"), VISUAL_FLOOR) if vision else 0
        batch_devices = axis_size(self.mesh, "batch")
        spec = BatchSpec(
            rows=-(-len(prompts) // batch_devices) * batch_devices,
            visual_slots=visual_slots,
            text_slots=bucket(longest("text_tokens"), TEXT_FLOOR),
            patch_slots=visual_slots * vision.unit_patches if vision else 0,
            patch_dim=prompts[0]["patches"].shape[1],
            unit_patches=vision.unit_patches if vision else 1,
        )
        return spec.build([[prompt] for prompt in prompts], self.config.special_id("<IMG_CONTEXT>") if vision else -1)

    def _prefill_program(self, params: Params, batch: Batch) -> tuple[jax.Array, Cache]:
        self.compilations["prefill"] += 1
        with self._sharded(), exact_products(self.config.compute_dtype):
            model = model_params.bind(self.config, params)
            x, (keys, values) = model(
                batch, keep=lambda x, outputs: (outputs.keys.swapaxes(1, 2), outputs.values.swapaxes(1, 2))
            )
            lengths = jnp.sum(batch.segment_ids > 0, axis=1, dtype=jnp.int32)
            last = jnp.take_along_axis(batch.reading_order, jnp.maximum(lengths - 1, 0)[:, None], axis=1)
            logits = model.logits(jnp.take_along_axis(x, last[..., None], axis=1))[:, 0]
            return logits, _constrain(Cache(keys, values, lengths))

    def _decode_program(self, params: Params, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        self.compilations["decode"] += 1
        with self._sharded(), exact_products(self.config.compute_dtype):
            decoder = model_params.bind(self.config, params).decoder
            logits, cache = decoder.decode(tokens, cache)
            return logits, _constrain(cache)

    def _resize_program(self, cache: Cache, length: int) -> Cache:
        """Cuts or extends the positions of the cache; cut ones are empty, as the reading order puts these last."""

        def resize(x: jax.Array) -> jax.Array:
            missing = max(0, length - x.shape[3])
            return jnp.pad(x[:, :, :, :length], ((0, 0), (0, 0), (0, 0), (0, missing), (0, 0)))

        with self._sharded():
            return _constrain(Cache(resize(cache.keys), resize(cache.values), cache.lengths))

    def _sharded(self) -> contextlib.AbstractContextManager:
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)


def _constrain(cache: Cache) -> Cache:
    keys, values = constrain(cache.keys, *CACHE_AXES), constrain(cache.values, *CACHE_AXES)
    return Cache(keys, values, constrain(cache.lengths, "batch"))
