"""The doctor's report as one HTML page."""

import dataclasses
import datetime
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from navil_jax.data.features import sample_features
from navil_jax.data.inspect import page
from navil_jax.data.inspect.checkup import Checkup
from navil_jax.data.inspect.reading import view_sample
from navil_jax.data.inspect.summary import Reason, Summary, aspect_ratios, duplicates, summary_rows, usable
from navil_jax.data.inspect.token_map import row_budgets
from navil_jax.errors import UserError

LISTED = 2000  # bad samples of a source that the page lists
REPEATED = 10  # samples whose copies it shows
EXTREMES = (  # what shown samples have the most or least of: field of a note, most, words
    ("text_tokens", True, "most text tokens"),
    ("visual_tokens", True, "most visual tokens"),
    ("learnt_tokens", False, "fewest learnt tokens"),
    ("widest", True, "widest image"),
    ("narrowest", False, "narrowest image"),
    ("learnt_tokens", True, "most learnt tokens"),
    ("visual_tokens", False, "fewest visual tokens"),
    ("text_tokens", False, "fewest text tokens"),
    ("images", True, "most images"),
)


@dataclasses.dataclass(frozen=True)
class Head:
    """What stands above all sources."""

    verdict: str
    is_bad: bool
    advice: str  # on the budgets of a row
    command: str
    config: str  # as JSON


def report(
    checkups: Sequence[Checkup],
    tables: Sequence[np.ndarray],
    summaries: Sequence[Summary],
    head: Head,
    samples: int,
    bad: Mapping[str, Sequence[tuple[str, str]]],
) -> str:
    """The page.

    Args:
      checkups, tables, summaries: one per source.
      samples: of each source that are shown: a usual one, and those that are the most or least in something.
      bad: source -> (key, reason) of bad samples to list.
    """
    sources = [
        {
            "name": summary.name,
            "rows": summary_rows(summary, row_budgets(checkup.config)),
            "marks": [(f"{found.samples:,} x", found.text, f"first {found.first}") for found in summary.marks],
            "reasons": [_reason(found) for found in summary.reasons],
            "bad": summary.bad,
            "bad_samples": bad.get(summary.name, ()),
            "repeated": list(_repeated(checkup, notes)),
            "charts": list(_charts(checkup, notes[usable(notes)])),
            "samples": [_preview(checkup, index, why) for index, why in chosen(notes, samples)],
        }
        for checkup, notes, summary in zip(checkups, tables, summaries, strict=True)
    ]
    return page.render(
        page.HERE / "doctor.html.jinja",
        title="Data report",
        verdict=head.verdict,
        bad=head.is_bad,
        advice=head.advice,
        command=head.command,
        config=head.config,
        date=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        links=[(f"source-{number}", summary.name) for number, summary in enumerate(summaries, start=1)],
        sources=sources,
    )


def _reason(found: Reason) -> tuple[str, str, str]:
    return f"{found.samples:,}", found.text, found.first


def _repeated(checkup: Checkup, notes: np.ndarray) -> Iterator[tuple[str, str, str]]:
    """(copies, key, beginning of the text) of the samples that have the most copies."""
    for index, count in Counter(duplicates(notes)[1].tolist()).most_common(REPEATED):
        try:
            sample = checkup.source[index]
        except UserError:  # the data have changed since
            continue
        text = " / ".join(text for turn in sample.turns for text in turn)
        yield f"{count:,}", sample.key, page.shortened(text, 120)


def _charts(checkup: Checkup, good: np.ndarray) -> Iterator[dict[str, Any]]:
    budgets = row_budgets(checkup.config)
    for field in (*budgets, "characters"):
        if good[field].any():
            yield page.histogram(f"{field.replace('_', ' ')} per sample", good[field], budgets.get(field))
    if good["images"].any():
        yield page.histogram("width / height of images", aspect_ratios(good))


def chosen(notes: np.ndarray, number: int) -> list[tuple[int, str]]:
    """(index, why) of usable samples, no two of them alike: a usual one, outliers, then evenly spread ones."""
    indices = np.flatnonzero(usable(notes))
    if not len(indices):
        return []
    good = notes[indices]
    order = np.argsort(good["text_tokens"], kind="stable")
    wanted = [(int(order[len(order) // 2]), "median of text tokens")]
    for field, most, why in EXTREMES:
        places = np.flatnonzero(good["images"] > 0) if field in ("widest", "narrowest") else np.arange(len(good))
        values = good[field][places].astype(np.float64)
        if len(np.unique(values)) > 1:
            place = int(places[values.argmax() if most else values.argmin()])
            wanted.append((place, f"{why}: {good[field][place]:,.4g}"))
    wanted += [(int(place), "one of the others") for place in np.linspace(0, len(good) - 1, 4 * number + 1)]
    found: dict[int, tuple[int, str]] = {}  # by hash
    for place, why in wanted:
        found.setdefault(int(good["hash"][place]), (int(indices[place]), why))
    return list(found.values())[:number]


def _preview(checkup: Checkup, index: int, why: str) -> dict[str, Any]:
    """What the template shows of a sample."""
    try:
        sample = checkup.source[index]
        features = sample_features(sample, checkup.config, checkup.tokenizer)
    except UserError as error:  # the data have changed since
        return {"problem": str(error)}
    return {
        "problem": "",
        "title": f"{sample.key} ({why})",
        "view": view_sample(features, checkup.tokenizer, checkup.config.model.vision),
    }
