"""Samples of a source as packed records, and beside each shard the list of those that cannot be used."""

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from navil_jax.data.formats import files
from navil_jax.data.formats.array_record import SUFFIX, pack
from navil_jax.data.formats.records import is_of_sample, reason
from navil_jax.data.sample import BadSample, Source
from navil_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tally:
    """What stands beside a shard."""

    bad: int  # samples that could not be used
    unused: Counter[str]  # fields of the records -> samples that are not made of them


def stretch(samples: int, shards: int, number: int) -> range:
    """Indices of the n-th of so many stretches of a source. Example: 10, 4, 1 -> 2, 3, 4"""
    return range(samples * number // shards, samples * (number + 1) // shards)


def packed(source: Source, indices: Iterable[int], path: str) -> Iterator[tuple[int, bytes]]:
    """(index, record) of the samples that can be used; then notes the others, and unused fields, beside `path`.

    What writes a file of the records gives it its name after that: a file that is there has its notes, too.
    """
    bad, unused = list[dict[str, Any]](), Counter[str]()
    for index in indices:
        try:
            sample = source[index]
            record = pack(sample)
        except (UserError, OSError) as error:
            if isinstance(error, OSError) and not is_of_sample(error):
                raise
            entry = {"source": "", "key": str(index), "reason": reason(error), "index": index}
            if isinstance(error, BadSample):
                entry |= {"source": error.source, "key": error.key, "reason": error.reason}
            bad.append(entry)
            continue
        unused.update(sample.unused)
        yield index, record
    _note(_bad_file(path), bad)
    _note(_unused_file(path), [dict(unused)] if unused else [])


def read_tally(path: str) -> Tally:
    """The notes beside a shard."""
    unused = Counter[str]()
    for counts in _noted(_unused_file(path)):
        unused.update(counts)
    return Tally(len(_noted(_bad_file(path))), unused)


def count_usable(source: Source, path: str) -> int:
    """How many of the samples that were bad when a shard was written can be used by now."""
    usable = 0
    for entry in _noted(_bad_file(path)):
        with contextlib.suppress(UserError, OSError):
            pack(source[entry["index"]])
            usable += 1
    return usable


def _bad_file(path: str) -> str:
    return path.removesuffix(SUFFIX) + ".bad.jsonl"


def _unused_file(path: str) -> str:
    """Example: out/data-00000-of-00001.array_record -> out/.unused/data-00000-of-00001.jsonl"""
    return f"{files.folder_of(path)}/.unused/{files.name_of(path).removesuffix(SUFFIX)}.jsonl"


def _note(path: str, entries: list[dict[str, Any]]) -> None:
    if entries or files.exists(path):
        files.write_file(path, "".join(json.dumps(entry) + "\n" for entry in entries).encode())


def _noted(path: str) -> list[dict[str, Any]]:
    lines = files.read_file(path).splitlines() if files.exists(path) else []
    return [json.loads(line) for line in lines]
