"""Near duplicates: samples that fall into one bucket are compared, and the first of each group is kept.

A table of buckets is made from some bits of the perceptual hash of the image and some bytes of the MinHash of the text,
chosen by the table's number; near samples share a bucket in some of the tables, others hardly ever. A task handles
one table, and of its buckets those of one partition, so that it fits into memory and needs nothing of the others.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from navil_jax.data.cleaning.image import COLOUR_SUM
from navil_jax.data.cleaning.settings import Settings
from navil_jax.data.cleaning.text import PERMUTATIONS

TABLES = 64  # of buckets
LOW_BITS = 63  # of an image that buckets are made from, see `image.image_measures`
BOTH_BITS, IMAGE_BITS = 14, 24  # of them in a bucket of image and text, of the image alone
BOTH_BYTES, TEXT_BYTES = 2, 5  # of the MinHash in a bucket of image and text, of the text alone
PARTITION = 2**25  # keys that a task holds in memory, 16 bytes each
ROWS = 2**18  # samples that are looked at at a time
LEADERS = 256  # samples of a bucket with which the others in it are compared
Columns = Mapping[str, np.ndarray]


class Near(NamedTuple):
    """What a task finds."""

    pairs: np.ndarray  # [m, 2] int64, the lower sample first
    uncompared: int  # samples of crowded buckets that were not compared with all others in them


def tasks(samples: int, kinds: Sequence[str]) -> Iterator[tuple[str, int, int, int]]:
    """(kind, table, partition, partitions) of all tasks."""
    partitions = max(1, -(-samples // PARTITION))
    for kind, table, partition in itertools.product(kinds, range(TABLES), range(partitions)):
        yield kind, table, partition, partitions


def find_near(
    columns: Columns,
    rows: np.ndarray,
    settings: Settings,
    kind: str,
    table: int,
    partition: int = 0,
    partitions: int = 1,
) -> Near:
    """Near pairs among some samples that one table of buckets brings together.

    Args:
      rows: [n] int64, the samples, ascending.
      kind: "both", "image" or "caption".
    """
    keys, members = [], []
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        found = bucket_keys(columns, some, kind, table)
        own = (found % np.uint64(partitions) == partition) & (found != 0)
        keys.append(found[own])
        members.append(some[own])
    joined, members_ = (
        np.concatenate([np.zeros(0, kind_), *parts]) for kind_, parts in (("u8", keys), ("i8", members))
    )
    order = np.argsort(joined, kind="stable")
    return _in_runs(joined[order], members_[order], functools.partial(is_near, columns, settings, kind))


def bucket_keys(columns: Columns, rows: np.ndarray, kind: str, table: int) -> np.ndarray:
    """The bucket of each sample; 0: in none. [n] uint64"""
    low, images = columns["low"][rows], columns["images"][rows]
    if kind == "image":
        bits = low & _mask(table, IMAGE_BITS)
        return np.where(images > 0, mixed(bits + images.astype(np.uint64) * np.uint64(2**56 + 1)) | np.uint64(1), 0)
    order = _order("byte", table, PERMUTATIONS)[:TEXT_BYTES]
    few = _packed(columns, rows, order[:BOTH_BYTES])
    many = _packed(columns, rows, order)
    if kind == "caption":
        key = mixed(many)
    else:
        key = mixed(mixed(low & _mask(table, BOTH_BITS)) ^ np.where(images > 0, few, many))
    return np.where(columns["words"][rows] > 0, key | np.uint64(1), 0)


def _packed(columns: Columns, rows: np.ndarray, order: Sequence[int]) -> np.ndarray:
    packed = np.zeros(len(rows), np.uint64)
    for place in order:
        packed = packed << np.uint64(8) | columns["planes"][place][rows]
    return packed


@functools.cache
def _order(name: str, table: int, count: int) -> list[int]:
    """The numbers below `count` in an order of the table's own, the same on every machine."""
    return sorted(range(count), key=lambda n: hashlib.blake2b(f"{name} {table} {n}".encode()).digest())


def _mask(table: int, bits: int) -> np.uint64:
    return np.uint64(sum(1 << bit for bit in _order("bit", table, LOW_BITS)[:bits]))


def mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def is_near(columns: Columns, settings: Settings, kind: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether samples a[i] and b[i] are near in what `kind` says. [m] bool"""
    some = (slice(start, start + ROWS) for start in range(0, len(a), ROWS))
    return np.concatenate([np.zeros(0, bool), *(_is_near(columns, settings, kind, a[s], b[s]) for s in some)])


def _is_near(columns: Columns, settings: Settings, kind: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    similar, has_images = similarity(columns, a, b), columns["images"][a] > 0
    if kind == "caption":
        return similar >= settings.min_text_similarity
    most_bits = settings.max_lone_image_bits if kind == "image" else settings.max_image_bits
    near = columns["images"][a] == columns["images"][b]
    near &= image_bits(columns, a, b) <= most_bits
    near &= colour_distance(columns, a, b) <= settings.max_colour_distance
    if kind == "image":
        return near & has_images
    is_caption = has_images & ~columns["asked"][a] & ~columns["asked"][b]
    return near & (similar >= np.where(is_caption, settings.min_caption_similarity, settings.min_text_similarity))


def similarity(columns: Columns, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Estimated share of words, or word triples, that two texts have in common (Jaccard similarity). [m] float"""
    equal = np.mean(columns["caption"][a] == columns["caption"][b], axis=1)
    return np.maximum(0, (equal - 1 / 256) / (1 - 1 / 256))  # of two other words 1 in 256 has the same byte


def image_bits(columns: Columns, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bits in which the hashes of first or last images differ, whichever are more. [m] int"""
    return np.bitwise_count(columns["hashes"][a] ^ columns["hashes"][b]).sum(axis=2, dtype=np.int64).max(axis=1)


def colour_distance(columns: Columns, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The share of the colours that differs, likewise. [m] float, 0 to 1"""
    mine, others = (columns["colours"][rows].astype(np.int64) for rows in (a, b))
    return np.abs(mine - others).sum(axis=2).max(axis=1) / (2 * COLOUR_SUM)


def _in_runs(keys: np.ndarray, rows: np.ndarray, near: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Near:
    """Compares the first sample of each bucket with the others in it, then those left over among themselves.

    Args:
      keys, rows: [n] buckets, ascending, and their samples, ascending in each bucket.
    """
    again = np.concatenate([[False], keys[1:] == keys[:-1], [False]])
    shared = again[1:] | again[:-1] if len(keys) else np.zeros(0, bool)
    keys, rows, pairs = keys[shared], rows[shared], [np.zeros((0, 2), np.int64)]
    for _ in range(LEADERS):
        if not len(keys):
            break
        start = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        leaders = np.repeat(rows[start], np.diff(np.append(start, len(keys))))
        others = np.flatnonzero(rows != leaders)
        matched = near(leaders[others], rows[others])
        pairs.append(np.stack([leaders[others], rows[others]], axis=1)[matched])
        left = others[~matched]
        keys, rows = keys[left], rows[left]
    return Near(np.concatenate(pairs), len(rows))


def packed_pairs(pairs: np.ndarray) -> np.ndarray:
    """[m, 2] -> [m] uint64, which sort by the second sample and then by the first; samples are below 2**32."""
    first, second = pairs.astype(np.uint64).T
    return second << np.uint64(32) | first


def resolve(packed: np.ndarray, near: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Which samples to leave out, and the kept one that each is near to: the lowest sample is kept. [m, 2] int64

    A sample is only left out for one that is kept, so that no chain of near samples ends in one that is far.

    Args:
      packed: [n] uint64, `packed_pairs`, ascending.

    Example: pairs 0-1, 1-2 -> 1 is left out for 0; 2 is kept, unless it is near 0, too
    """
    low = np.uint64(2**32 - 1)
    kept_for = np.full(int(packed[-1] >> np.uint64(32)) + 1 if len(packed) else 0, -1, np.int64)
    for start in range(0, len(packed), ROWS):
        some = packed[start : start + ROWS]
        for first, second in zip((some & low).tolist(), (some >> np.uint64(32)).tolist(), strict=True):
            if kept_for[second] >= 0:
                continue
            kept = first if kept_for[first] < 0 else int(kept_for[first])
            if kept == first or near(np.array([kept]), np.array([second]))[0]:
                kept_for[second] = kept
    left_out = np.flatnonzero(kept_for >= 0)
    return np.stack([left_out, kept_for[left_out]], axis=1)


def find_matches(columns: Columns, rows: np.ndarray, references: np.ndarray, settings: Settings, table: int) -> Near:
    """Pairs (reference, sample) whose images are near and that one table of buckets brings together.

    Args:
      references: [r] int64, what the samples are compared with; all are held in memory.
    """
    own = bucket_keys(columns, references, "image", table)
    order = np.argsort(own, kind="stable")
    own, ordered = own[order], references[order]
    pairs, crowded = [np.zeros((0, 2), np.int64)], 0
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        keys = bucket_keys(columns, some, "image", table)
        first = np.searchsorted(own, keys)
        count = np.where(keys > 0, np.searchsorted(own, keys, side="right") - first, 0)
        crowded += int(np.count_nonzero(count > LEADERS))
        for number in range(min(LEADERS, int(count.max(initial=0)))):
            has = np.flatnonzero(count > number)
            found = np.stack([ordered[first[has] + number], some[has]], axis=1)
            pairs.append(found[is_near(columns, settings, "image", found[:, 0], found[:, 1])])
    return Near(np.concatenate(pairs), crowded)
