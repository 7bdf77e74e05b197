"""The report of a cleaning as one HTML page: counts, distributions with thresholds, examples."""

import contextlib
import dataclasses
import datetime
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from navil_jax.data.cleaning import near
from navil_jax.data.cleaning.decide import RULES, Verdicts
from navil_jax.data.cleaning.given import Given
from navil_jax.data.cleaning.rules import BY_NAME, LIMITS
from navil_jax.data.cleaning.settings import STEPS, Settings
from navil_jax.data.images import load_image
from navil_jax.data.inspect import page
from navil_jax.errors import UserError

DRAWN = 1_000_000  # samples that histograms are made of, evenly spread
IMAGES = 4  # of a sample that are shown


@dataclasses.dataclass(frozen=True)
class Findings:
    """What the report tells."""

    given: Given
    columns: Mapping[str, np.ndarray]
    verdicts: Verdicts
    settings: Settings
    off: frozenset[str]
    said: Sequence[str]
    examples: Mapping[str, Sequence[Mapping[str, Any]]]  # rule -> entries of the lists


def report(found: Findings, command: str) -> str:
    """The page. Args: command: as it was given."""
    counts = {rule: len(found.verdicts.left_out(rule)) for rule in RULES}
    total, left_out = len(found.verdicts.codes), sum(counts.values())
    rules = [rule for rule, count in counts.items() if count]
    return page.render(
        Path(__file__).parent / "report.html.jinja",
        title="Cleaning report",
        verdict=f"{left_out:,} of {total:,} samples are left out ({left_out / total:.1%})",
        date=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        command=command,
        said=_said(found),
        links=[
            ("counts", "Counts"),
            ("thresholds", "Thresholds"),
            *((f"rule-{rule}", f"{rule} ({counts[rule]:,})") for rule in rules),
        ],
        counts=list(_counts(found, rules)),
        settings=[
            (field.name, str(getattr(found.settings, field.name)), field.metadata["help"])
            for field in dataclasses.fields(Settings)
        ],
        total=total,
        off=", ".join(sorted(found.off)),
        charts=[*_charts(found), *_near_charts(found)],
        rules=[
            {
                "name": rule,
                "count": counts[rule],
                "about": _about(rule, found.settings),
                "examples": [_example(found.given, entry) for entry in found.examples.get(rule, ())],
            }
            for rule in rules
        ],
    )


def _said(found: Findings) -> Iterator[str]:
    yield from found.said
    if count := found.verdicts.uncompared:
        yield f"{count:,} samples stand in crowded buckets and were not compared with all others there."


def _counts(found: Findings, rules: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """(source, what becomes of samples, how many, share of the source)"""
    bounds = found.given.bounds
    for number, entry in enumerate(found.given.entries):
        own = slice(bounds[number], bounds[number + 1])
        total = bounds[number + 1] - bounds[number]
        counts = {rule: len(found.verdicts.left_out(rule, own)) for rule in rules}
        shown = {"all": total, "stay": total - sum(counts.values())} | counts
        for name, count in shown.items():
            if count or name == "stay":
                yield entry.name, name, f"{count:,}", f"{count / total:.2%}"


def _charts(found: Findings) -> Iterator[dict[str, Any]]:
    total = len(found.verdicts.codes)
    rows = np.arange(0, total, max(1, total // DRAWN))
    rows = rows[~found.columns["bad"][rows]]
    drawn = set()
    for limit in LIMITS:
        values = limit.values(found.columns, rows, found.settings).astype(np.float64)
        values = values[found.columns["images"][rows] > 0] if limit.step == "images" else values
        values = values[~np.isnan(values)]
        if len(values) and limit.column not in drawn:
            drawn.add(limit.column)
            title, mark = limit.column.replace("_", " "), limit.setting.replace("_", " ")
            yield page.histogram(title, values, getattr(found.settings, limit.setting), mark=mark)


def _near_charts(found: Findings) -> Iterator[dict[str, Any]]:
    """How near the samples are that are left out as near duplicates."""
    pairs = found.verdicts.pairs.get("near", np.zeros((0, 2), np.int64))[:DRAWN]
    sample, kept = pairs.T
    if not len(pairs):
        return
    yield page.histogram("text that near samples share", near.similarity(found.columns, sample, kept))
    with_images = found.columns["images"][sample] > 0
    if with_images.any():
        bits = near.image_bits(found.columns, sample[with_images], kept[with_images])
        yield page.histogram("bits that differ in near images", bits)


def _about(rule: str, settings: Settings) -> str:
    """What a rule leaves out. Example: min words = 3: fewest words of a sample's text"""
    if rule not in BY_NAME:
        return STEPS[RULES[rule]]
    name = BY_NAME[rule].setting
    text = next(field.metadata["help"] for field in dataclasses.fields(Settings) if field.name == name)
    return f"{name.replace('_', ' ')} = {getattr(settings, name)}: {text}"


def _example(given: Given, entry: Mapping[str, Any]) -> dict[str, Any]:
    sides = [_side(given, entry, "left out" if "kept" in entry else "")]
    if "kept" in entry:
        sides.append(
            _side(given, entry["kept"], "stays" if entry["kept"]["source"] not in given.references else "asked")
        )
    return {"key": entry["key"], "source": entry["source"], "reason": entry["reason"], "sides": sides}


def _side(given: Given, entry: Mapping[str, Any], title: str) -> dict[str, Any]:
    """What is shown of a sample."""
    images, text = [], ""
    with contextlib.suppress(UserError, OSError):  # it cannot be read, which the reason says
        sample = given.all_sources[given.names.index(entry["source"])][entry["index"]]
        text = "\n".join(text for turn in sample.turns for text in turn if text)
        images = [load_image(content, sample.key) for content in sample.images[:IMAGES]]
    return {"title": title, "key": entry["key"], "text": text, "images": images}
