"""Writes the list of each source: which samples are left out, by which rule and why."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from navil_jax.data.cleaning import near, parts
from navil_jax.data.cleaning.decide import Verdicts, rule_of
from navil_jax.data.cleaning.given import Given
from navil_jax.data.cleaning.rules import BY_NAME
from navil_jax.data.cleaning.settings import Settings
from navil_jax.data.formats import files
from navil_jax.data.left_out import list_file, list_lines

SHOWN = 6  # entries of a rule that the report shows
Columns = Mapping[str, np.ndarray]


def write_lists(
    out: str, given: Given, columns: Columns, verdicts: Verdicts, settings: Settings
) -> dict[str, list[dict[str, Any]]]:
    """Writes `OUT/NAME.leave_out.jsonl` of every source.

    Returns:
      Rule -> its first entries in the lists, with the names of their sources.
    """
    keys = _kept_keys(out, given, verdicts)
    shown: dict[str, list[dict[str, Any]]] = {}
    for number, (entry, source) in enumerate(zip(given.entries, given.sources, strict=True)):
        count = int(np.count_nonzero(verdicts.codes[given.bounds[number] : given.bounds[number + 1]]))
        entries = _entries(out, given, number, columns, verdicts, settings, keys)
        lines = list_lines(entry.name, source, _noting(entries, entry.name, shown), count)
        with (
            files.written_whole(files.join(out, list_file(entry.name))) as partial,
            partial.open("w", encoding="utf-8") as file,
        ):
            file.writelines(lines)
    return shown


def _noting(
    entries: Iterable[dict[str, Any]], source: str, shown: dict[str, list[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """The entries as they are; the first ones of each rule are added to `shown`."""
    for entry in entries:
        some = shown.setdefault(entry["rule"], [])
        if len(some) < SHOWN:
            some.append({"source": source, **entry})
        yield entry


def _kept_keys(out: str, given: Given, verdicts: Verdicts) -> dict[int, str]:
    """Sample -> its key, of all samples that others repeat."""
    wanted = np.unique(np.concatenate([np.zeros(0, np.int64), *(pairs[:, 1] for pairs in verdicts.pairs.values())]))
    found: dict[int, str] = {}
    bounds = given.bounds
    for number, source in enumerate(given.all_sources):
        own = set((wanted[(wanted >= bounds[number]) & (wanted < bounds[number + 1])] - bounds[number]).tolist())
        if own:
            said = enumerate(parts.said_of(files.join(out, parts.MEASURES), number, len(source)))
            found |= {bounds[number] + index: key for index, (key, _) in said if index in own}
    return found


def _entries(
    out: str,
    given: Given,
    number: int,
    columns: Columns,
    verdicts: Verdicts,
    settings: Settings,
    keys: Mapping[int, str],
) -> Iterator[dict[str, Any]]:
    begin, end = given.bounds[number], given.bounds[number + 1]
    left_out = begin + np.flatnonzero(verdicts.codes[begin:end])
    position = 0
    for index, (key, bad) in enumerate(parts.said_of(files.join(out, parts.MEASURES), number, end - begin)):
        if position == len(left_out):
            return
        row = begin + index
        if left_out[position] != row:
            continue
        position += 1
        rule = rule_of(verdicts.codes[row])
        entry = {"index": index, "key": key, "rule": rule}
        if rule in BY_NAME:
            value = BY_NAME[rule].values(columns, np.array([row]), settings)[0].item()
            yield entry | {"reason": BY_NAME[rule].reason(value, settings)}
        elif rule in verdicts.pairs:
            yield entry | _repeats(given, columns, verdicts.pairs[rule], row, rule, keys)
        else:
            yield entry | {"reason": bad if rule == "unreadable" else "beyond what --keep asks for"}


def _repeats(
    given: Given, columns: Columns, pairs: np.ndarray, row: int, rule: str, keys: Mapping[int, str]
) -> dict[str, Any]:
    """Why a sample repeats another one, and which one."""
    other = int(pairs[np.searchsorted(pairs[:, 0], row), 1])
    number = int(np.searchsorted(given.bounds, other, side="right")) - 1
    kept = {"source": given.names[number], "index": other - given.bounds[number], "key": keys[other]}
    a, b = np.array([row]), np.array([other])
    bits = f"{near.image_bits(columns, a, b)[0]} of 256 bits of the image differ"
    words = f"{near.similarity(columns, a, b)[0]:.0%} of the text is shared"
    reason = {
        "exact": "the same images and text",
        "near": f"{bits}; {words}" if columns["images"][row] else words,
        "benchmark_image": f"an image of a benchmark: {bits}",
        "benchmark_question": "words of a benchmark's question",
    }[rule]
    return {"reason": f"{reason}: {kept['key']} of {kept['source']}", "kept": kept}
