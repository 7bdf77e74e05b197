"""Tables of notes -> what is said of each source."""

import contextlib
import dataclasses
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from navil_jax.config import Config
from navil_jax.console import frame
from navil_jax.data.inspect.checkup import BAD, EMPTY, GOOD, LITERAL, RESIZED, SIZES, TOO_LONG, UNREAD, Checkup
from navil_jax.data.mixture import Epoch, proportions
from navil_jax.data.packing import advise_slots, best_fill
from navil_jax.data.quarantine import kind_of_reason
from navil_jax.errors import UserError, one_line

KEPT, DRAWN = 0.99, 20_000  # share of samples that advised rows shall hold; samples that advice is made from
PACKED = 0.95  # of the slots that samples need most, as packing fills them
_SHOWN_REASONS, _SHOWN_MARKS, _SHOWN_FIELDS, _MARKED = 5, 20, 12, 1000


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why samples are bad."""

    text: str  # of the first of them; others differ in numbers and names
    samples: int
    first: str  # key of the first of them


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was found in one source."""

    name: str
    samples: int
    usable: int
    resized: int  # of the usable ones
    too_long: int
    bad: int
    reasons: tuple[Reason, ...]  # the most frequent first
    duplicates: int  # samples whose images and text another one before them has
    literal: int  # samples with markers, <image> or placeholders of other software in their text
    marks: tuple[Reason, ...]  # these texts, the most frequent first
    empty: int  # samples with an empty answer
    unused: tuple[tuple[str, int], ...]  # fields of records, samples that do not use them; the most frequent first
    images: int
    sums: dict[str, int]  # of usable samples: visual, text and learnt tokens, patches
    sizes: dict[str, tuple[int, int, int]]  # minimum, median and maximum of a usable sample
    ratios: tuple[float, float, float] | None  # minimum, median and maximum of width / height; None without images


def usable(notes: np.ndarray) -> np.ndarray:
    """[n] bool, which samples training uses."""
    return (notes["status"] == GOOD) | (notes["status"] == RESIZED)


def summarise(
    name: str,
    notes: np.ndarray,
    reasons: Counter[tuple[str, str]],
    marks: Counter[tuple[str, str]],
    unused: Counter[str],
) -> Summary:
    """What is said of a source.

    Args:
      notes: [n] `checkup.NOTE`.
      reasons, marks, unused: what `bad_reasons`, `marks_in_text` and `examination.Examined` give for it.
    """
    status = Counter(dict(enumerate(np.bincount(notes["status"], minlength=5).tolist())))
    good = notes[usable(notes)]
    counted = (*SIZES, "learnt_tokens", "characters")
    ratios = aspect_ratios(good)
    return Summary(
        name=name,
        samples=len(notes),
        usable=len(good),
        resized=status[RESIZED],
        too_long=status[TOO_LONG],
        bad=status[BAD],
        reasons=_most_common(reasons, len(reasons)),
        marks=_most_common(marks, _SHOWN_MARKS),
        duplicates=len(duplicates(notes)[0]),
        literal=int(np.count_nonzero(notes["flags"] & LITERAL)),
        empty=int(np.count_nonzero(notes["flags"] & EMPTY)),
        unused=tuple(unused.most_common()),
        images=int(good["images"].sum(dtype=np.int64)),
        sums={field: int(good[field].sum(dtype=np.int64)) for field in counted},
        sizes={field: _spread(good[field], int) for field in counted} if len(good) else {},
        ratios=_spread(ratios, float) if len(ratios) else None,
    )


def _most_common(found: Counter[tuple[str, str]], shown: int) -> tuple[Reason, ...]:
    return tuple(Reason(text, count, first) for (text, first), count in found.most_common(shown))


def marks_in_text(checkup: Checkup, notes: np.ndarray) -> Counter[tuple[str, str]]:
    """(text that marks an image or a turn elsewhere, key of the first such sample) -> samples.

    Reads the first `_MARKED` of the samples that have one.
    """
    found: Counter[tuple[str, str]] = Counter()
    first: dict[str, str] = {}
    for index in np.flatnonzero((notes["flags"] & LITERAL > 0) & (notes["status"] != BAD))[:_MARKED].tolist():
        with contextlib.suppress(UserError, OSError):  # the data have changed since
            sample = checkup.source[index]
            for mark in checkup.marks(sample):
                found[mark, first.setdefault(mark, sample.key)] += 1
    return found


def _spread(values: np.ndarray, kind: type) -> tuple[Any, Any, Any]:
    return kind(values.min()), kind(np.median(values)), kind(values.max())


def aspect_ratios(notes: np.ndarray) -> np.ndarray:
    """width / height of each image; of more than two in a sample, those of the narrowest and the widest. [m] float32"""
    several = notes[notes["images"] > 1]
    return np.concatenate([notes["narrowest"][notes["images"] > 0], several["widest"]])


def duplicates(notes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of samples that repeat an earlier one, and of the first one that each repeats. Two times [m] int64"""
    read = _read(notes)
    order = read[np.argsort(notes["hash"][read], kind="stable")]
    hashes = notes["hash"][order]
    again = np.flatnonzero(hashes[1:] == hashes[:-1]) + 1
    return order[again], order[np.searchsorted(hashes, hashes[again])]


def shared(tables: Sequence[np.ndarray]) -> int:
    """How many samples of a source another one before it has, too."""
    unlike = [np.unique(notes["hash"][_read(notes)]) for notes in tables]
    return sum(map(len, unlike)) - len(np.unique(np.concatenate(unlike)))


def seen(held_out: Sequence[np.ndarray], trained: Sequence[np.ndarray]) -> int:
    """How many held-out samples training has, too."""
    known = [notes["hash"][_read(notes)] for notes in trained]
    return sum(int(np.isin(notes["hash"][_read(notes)], np.concatenate(known)).sum()) for notes in held_out)


def _read(notes: np.ndarray) -> np.ndarray:
    return np.flatnonzero((notes["status"] != BAD) & (notes["status"] != UNREAD))


def bad_reasons(quarantine: Path) -> dict[str, Counter[tuple[str, str]]]:
    """Source -> (reason of the first of those that differ in numbers and names alone, its key) -> samples."""
    found: dict[str, Counter[tuple[str, str]]] = {}
    first: dict[tuple[str, str], tuple[str, str]] = {}
    with quarantine.open(encoding="utf-8") as file:
        for entry in map(json.loads, file):
            plain = entry["reason"].replace(entry["key"], "").lstrip(":, ")
            shown = first.setdefault((entry["source"], kind_of_reason(plain)), (plain, entry["key"]))
            found.setdefault(entry["source"], Counter())[shown] += 1
    return found


def bad_samples(quarantine: Path, most: int) -> dict[str, list[tuple[str, str]]]:
    """Source -> (key, reason) of its first bad samples, `most` of them at most."""
    found: dict[str, list[tuple[str, str]]] = {}
    with quarantine.open(encoding="utf-8") as file:
        for entry in map(json.loads, file):
            of_source = found.setdefault(entry["source"], [])
            if len(of_source) < most:
                of_source.append((entry["key"], entry["reason"]))
    return found


def findings(name: str, notes: np.ndarray) -> Iterator[dict[str, str | int]]:
    """Samples that are not bad but worth a look, as JSON lines hold them."""
    texts = {LITERAL: "a marker or <image> stands in the text", EMPTY: "an answer is empty"}
    for flag, text in texts.items():
        for index in np.flatnonzero(notes["flags"] & flag).tolist():
            yield {"source": name, "index": index, "finding": text}
    for status, text in ((TOO_LONG, "longer than a row"), (RESIZED, "images made smaller to fit a row")):
        for index in np.flatnonzero(notes["status"] == status).tolist():
            yield {"source": name, "index": index, "finding": text}
    for index, first in zip(*(array.tolist() for array in duplicates(notes)), strict=True):
        yield {"source": name, "index": index, "finding": f"same images and text as sample {first}"}


def box(summary: Summary, budgets: dict[str, int]) -> str:
    """The summary as text with a frame, for a terminal."""
    rows = []
    for label, text in summary_rows(summary, budgets):
        reasons = {"markers in text": summary.marks, "bad": summary.reasons}.get(label, ())
        shown = [f"{found.samples:,} x {found.text} (first {found.first})" for found in reasons[:_SHOWN_REASONS]]
        if rest := reasons[_SHOWN_REASONS:]:
            samples = sum(found.samples for found in rest)
            shown.append(f"{samples:,} x {len(rest)} more kinds, all of which are in report.html")
        rows += [(label, text), *(("", line) for line in shown)]
    return frame(summary.name, rows)


def _said(low: str, middle: str, high: str, what: str) -> str:
    """Example: "34 to 40 per sample, median 37"; "5 in every sample" """
    return f"{low} in every {what}" if low == high else f"{low} to {high} per {what}, median {middle}"


def summary_rows(summary: Summary, budgets: dict[str, int]) -> list[tuple[str, str]]:
    """(label, text) of what is said of a source but for the reasons."""
    usable = "all" if summary.usable == summary.samples else f"{summary.usable:,}"
    rows = [("samples", f"{summary.samples:,}, {usable} of them usable"), ("images", f"{summary.images:,}")]
    if summary.ratios:
        low, middle, high = summary.ratios
        rows.append(("width / height", _said(f"{low:.2f}", f"{middle:.2f}", f"{high:.2f}", "image")))
    for field in (*SIZES, "learnt_tokens", "characters"):
        if summary.sizes:
            low, middle, high = summary.sizes[field]
            room = f"; a row has {budgets[field]:,}" if field in budgets else ""
            rows.append(
                (
                    field.replace("_", " "),
                    f"{summary.sums[field]:,}; {_said(f'{low:,}', f'{middle:,}', f'{high:,}', 'sample')}{room}",
                )
            )
    resized = f"; {summary.resized:,} more fit with smaller images" if summary.resized else ""
    return [
        *rows,
        ("longer than a row", f"{summary.too_long:,}{resized}"),
        ("duplicates", f"{summary.duplicates:,}"),
        ("markers in text", f"{summary.literal:,}"),
        ("empty answers", f"{summary.empty:,}"),
        *([("fields not used", unused_fields(summary.unused))] if summary.unused else []),
        ("bad", f"{summary.bad:,}"),
    ]


def unused_fields(found: Sequence[tuple[str, int]]) -> str:
    """Example: url (1,200 samples), id (1,200 samples) and 3 more"""
    more = f" and {len(found) - _SHOWN_FIELDS} more" if len(found) > _SHOWN_FIELDS else ""
    return ", ".join(f"{one_line(name)} ({count:,} samples)" for name, count in found[:_SHOWN_FIELDS]) + more


def drawn_by(config: Config, sizes: Sequence[int], samples: int) -> np.ndarray:
    """How many of the first so many samples of a run are drawn from each source, of these sizes. [n] int64

    Where nobody knows how many samples a run has (0), of so many that the shares are exact.
    """
    epochs = [len(Epoch(size, entry.repeat)) for size, entry in zip(sizes, config.data.sources, strict=True)]
    chosen = proportions(config.data, config.batch_samples, epochs, [sys.maxsize] * len(sizes))
    return np.array(chosen.counts(samples or 10**12))


def slot_advice(config: Config, tables: Sequence[np.ndarray]) -> str:
    """What budgets suit the mixture; "" where no sample is usable."""
    rng, parts = np.random.default_rng(0), []
    weights = drawn_by(config, [len(table) for table in tables], config.steps * config.batch_samples)
    for table, share in zip(tables, weights / weights.sum(), strict=True):
        good = np.flatnonzero(usable(table))
        if len(good):
            drawn = table[rng.choice(good, max(1, round(DRAWN * share)))]
            parts.append(np.stack([drawn[field] for field in SIZES], axis=1).astype(np.int64))
    if not parts:
        return ""
    data = config.data
    now = np.array([data.visual_slots, data.text_slots, data.patch_slots])
    sizes = np.minimum(np.concatenate(parts), now)  # images that are too large for a row get smaller
    visual, text, patches = best_fill(sizes, now).tolist()
    multiple = 128 if min(data.visual_slots, data.text_slots) >= 1024 else 8
    advice = advise_slots(sizes, data.patch_slots, KEPT, multiple)
    return (
        f"rows of {now[0]:,} visual, {now[1]:,} text and {now[2]:,} patch slots can be filled to {visual:.0%}, "
        f"{text:.0%} and {patches:.0%} at best;\n{advice.visual_slots:,}, {advice.text_slots:,} and "
        f"{advice.patch_slots:,} would be filled alike, and {KEPT:.0%} of the samples fit each"
        f"{_row_advice(config, sizes)}"
    )


def _row_advice(config: Config, sizes: np.ndarray) -> str:
    """How many rows hold as many samples as a batch shall have, where the config says so; sizes [n, 3]."""
    if not config.batch_samples:
        return ""
    data = config.data
    budgets = np.array([data.visual_slots, data.text_slots, data.patch_slots])
    rows = config.batch_samples * float((sizes.mean(axis=0) / budgets).max()) / PACKED
    return (
        f";\na batch of {config.batch_samples:,} samples (batch_samples) fills {math.ceil(rows):,} rows on average, "
        f"and data.rows is {data.rows:,}"
    )
