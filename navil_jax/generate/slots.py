"""Slots: the rows that are decoded together, on the devices, with a cache that grows and shrinks by buckets."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from navil_jax.generate.programs import CACHE_AXES, CACHE_FLOOR, Programs, bucket, resized
from navil_jax.generate.sampling import Chosen, Sampler, Settings, choose
from navil_jax.model import params as model_params
from navil_jax.model.decoder import Cache
from navil_jax.model.linear import exact_products
from navil_jax.model.params import Params
from navil_jax.sharding import named

CHUNK = 128  # tokens that are read at a time behind what a slot holds


class Rows(NamedTuple):
    """What the devices know of the slots beside the cache."""

    tokens: jax.Array  # [S] int32, the newest ones
    seen: jax.Array  # [S, vocab] bool, tokens of the prompt and the answer
    step: jax.Array  # [S] int32, number of the next new token
    settings: Settings


class Slots:
    """A cache for `count` rows; each is filled, from a prefill or behind what one holds, and then decoded.

    A step decodes a token of all of them.

    Args:
      programs: the model's.
      count: is rounded up to a multiple of the devices that share rows.
    """

    def __init__(self, programs: Programs, count: int):
        self.programs = programs
        self.count = -(-count // programs.rows) * programs.rows
        self.length = 0  # positions of the cache
        self._cache: Cache | None = None
        self._rows: Rows | None = None
        self._write = self._jitted("write", _write, donate_argnums=0)
        self._extend = self._jitted("extend", self._extend_program, donate_argnums=1)
        self._first = self._jitted("first", _first, donate_argnums=0)
        self._step = self._jitted("decode", self._step_program, donate_argnums=(1, 2))
        self._resize = self._jitted("resize", resized, static_argnums=1)
        self._empty = self._jitted("resize", self._empty_program, static_argnums=0)

    def _jitted(self, name: str, function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
        """Compiled for the mesh, and counted.

        The cache is divided as the model wants it, and all else lies whole on every device: a program is compiled anew
        for arguments that lie elsewhere, so no program may choose.
        """
        programs = self.programs
        of_cache = [named(programs.mesh, *axes) for axes in (CACHE_AXES, CACHE_AXES, ("batch",))]

        @functools.wraps(function)
        def traced(*arguments: Any) -> tuple[list[jax.Array], Any]:
            programs.compilations[name] += 1
            with programs.sharded(), exact_products(programs.config.compute_dtype):
                cache, others = _apart(function(*arguments))
                return [] if cache is None else [cache.keys, cache.values, cache.lengths], others

        has_cache = function is not _first
        shardings = (of_cache if has_cache else [], named(programs.mesh))
        compiled = jax.jit(traced, out_shardings=shardings, **settings)

        def call(*arguments: Any) -> Any:
            cache, others = compiled(*arguments)
            return (Cache(*cache), *others) if has_cache else others

        return call

    def forget(self) -> None:
        """Frees the cache; the next `fit` makes a new one."""
        self._cache = self._rows = None

    def fit(self, longest: int, busy: bool) -> None:
        """Makes the cache as long as rows of `longest` tokens need, bucket by bucket where it holds something."""
        wanted = bucket(longest, CACHE_FLOOR)
        if self._cache is None or self._rows is None:
            self._cache, self._rows = self._empty(wanted)
        elif not busy and wanted != self.length:
            self._cache = None  # its memory is free before the new one takes some
            self._cache, _ = self._empty(wanted)
        else:
            while self.length != wanted:
                self.length = neighbour(self.length, wanted)
                (self._cache,) = self._resize(self._cache, self.length)
        self.length = wanted

    def fill(self, slot: int, row: int, prefilled: Cache) -> None:
        """Puts a row of a prefill into a slot."""
        (self._cache,) = self._write(self._cache, prefilled, np.array([row, slot], np.int32))

    def extend(self, slot: int, source: int, known: int, tokens: np.ndarray) -> jax.Array:
        """Puts a prompt into a slot whose first tokens are those that another (or the same) slot holds.

        Args:
          known: how many tokens they are.
          tokens: [n] int32, of text, those that follow.

        Returns:
          Logits [1, vocab] float32 after the last token.
        """
        logits: jax.Array | None = None
        for start in range(0, len(tokens), CHUNK):
            chunk = tokens[start : start + CHUNK]
            where = np.array([source, slot, known + start, len(chunk)], np.int32)
            padded = np.pad(chunk, (0, CHUNK - len(chunk)))
            self._cache, logits = self._extend(self.programs.params, self._cache, padded, where)
            source = slot
        assert logits is not None
        return logits

    def first(
        self, slot: int, row: int, logits: jax.Array, tokens: np.ndarray, sampler: Sampler, measure: bool
    ) -> Chosen:
        """Chooses the first token of an answer after a row of logits, [1] of each.

        Args:
          tokens: [n] int32, of the prompt.
        """
        seen = np.zeros(self.programs.config.decoder.vocab_size, bool)
        seen[tokens] = True
        where = np.array([row, slot], np.int32)
        self._rows, chosen = self._first(self._rows, logits, seen, where, _on_host(sampler), np.array(measure))
        return chosen

    def step(self, active: np.ndarray, measure: bool) -> Chosen:
        """The next token of every slot; only those of `active` [S] bool have a meaning."""
        self._cache, self._rows, chosen = self._step(
            self.programs.params, self._cache, self._rows, active, np.array(measure)
        )
        return chosen

    def _step_program(
        self, params: Params, cache: Cache, rows: Rows, active: jax.Array, measure: jax.Array
    ) -> tuple[Cache, Rows, Chosen]:
        decoder = model_params.bind(self.programs.config, params).decoder
        no_position = cache.keys.shape[3]  # so that nothing is written over what others have left
        cache = cache._replace(lengths=jnp.where(active, cache.lengths, no_position))
        logits, cache = decoder.decode(rows.tokens, cache)
        chosen = choose(logits, rows.settings, rows.seen, rows.step, measure)
        seen = rows.seen.at[jnp.arange(len(chosen.tokens)), chosen.tokens].set(True)
        return cache, Rows(chosen.tokens, seen, rows.step + 1, rows.settings), chosen

    def _extend_program(
        self, params: Params, cache: Cache, tokens: jax.Array, where: jax.Array
    ) -> tuple[Cache, jax.Array]:
        source, slot, known, count = where
        decoder = model_params.bind(self.programs.config, params).decoder
        take = lambda x: jnp.take(x, source[None], axis=1, mode="clip")  # noqa: E731  (slicing would gather all slots)
        keys, values = take(cache.keys), take(cache.values)
        logits, own = decoder.read_on(tokens[None], count[None], Cache(keys, values, known[None]))
        put = lambda into, new: jax.lax.dynamic_update_slice(into, new, (0, slot, 0, 0, 0))  # noqa: E731
        lengths = cache.lengths.at[slot].set(own.lengths[0])
        return Cache(put(cache.keys, own.keys), put(cache.values, own.values), lengths), logits

    def _empty_program(self, length: int) -> tuple[Cache, Rows]:
        config, count = self.programs.config, self.count
        decoder = config.decoder
        shape = (decoder.depth, count, decoder.num_kv_heads, length, decoder.head_dim)
        keys, values = (jnp.zeros(shape, config.compute_dtype) for _ in range(2))
        zeros = jnp.zeros(count, jnp.int32)
        settings = Settings.of([Sampler()] * count)
        seen = jnp.zeros((count, decoder.vocab_size), bool)
        return Cache(keys, values, zeros), Rows(zeros, seen, zeros, settings)


def _apart(results: Any) -> tuple[Cache | None, tuple[Any, ...]]:
    """The cache, if it is the first of the results, and the others."""
    results = results if type(results) is tuple else (results,)
    return (results[0], results[1:]) if isinstance(results[0], Cache) else (None, results)


def neighbour(length: int, wanted: int) -> int:
    """The next bucket of a cache on the way from one length to another, so that few programs resize it."""
    if wanted > length:
        return bucket(length + 1, CACHE_FLOOR)
    sizes = [CACHE_FLOOR]
    while sizes[-1] < length:
        sizes.append(bucket(sizes[-1] + 1, CACHE_FLOOR))
    return sizes[-2]


def _on_host(sampler: Sampler) -> tuple[np.number, ...]:
    return (
        np.float32(sampler.temperature),
        np.int32(sampler.top_k),
        np.float32(sampler.top_p),
        np.uint32(sampler.seed),
        np.float32(sampler.repetition_penalty),
    )


def _write(cache: Cache, prefilled: Cache, where: jax.Array) -> Cache:
    """Copies row where[0] of a prefill to slot where[1]; what lies behind its length keeps no meaning."""
    row, slot = where
    length = min(cache.keys.shape[3], prefilled.keys.shape[3])

    def put(into: jax.Array, new: jax.Array) -> jax.Array:
        new = jax.lax.dynamic_slice_in_dim(new[:, :, :, :length], row, 1, axis=1)
        return jax.lax.dynamic_update_slice(into, new, (0, slot, 0, 0, 0))

    lengths = cache.lengths.at[slot].set(prefilled.lengths[row])
    return Cache(put(cache.keys, prefilled.keys), put(cache.values, prefilled.values), lengths)


def _first(
    rows: Rows,
    logits: jax.Array,
    prompt: jax.Array,
    where: jax.Array,
    sampler: tuple[jax.Array, ...],
    measure: jax.Array,
) -> tuple[Rows, Chosen]:
    row, slot = where
    own = Settings(*(value[None] for value in sampler))
    chosen = choose(logits[row][None], own, prompt[None], jnp.zeros(1, jnp.int32), measure)
    token = chosen.tokens[0]
    settings = Settings(*(all_.at[slot].set(new) for all_, new in zip(rows.settings, sampler, strict=True)))
    seen = rows.seen.at[slot].set(prompt.at[token].set(True))
    return Rows(rows.tokens.at[slot].set(token), seen, rows.step.at[slot].set(1), settings), chosen
