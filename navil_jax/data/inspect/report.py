"""The doctor's report as one HTML page."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from navil_jax.data.features import sample_features
from navil_jax.data.inspect import page
from navil_jax.data.inspect.checkup import Checkup
from navil_jax.data.inspect.reading import view_sample
from navil_jax.data.inspect.summary import Reason, Summary, aspect_ratios, summary_rows, usable
from navil_jax.data.inspect.token_map import row_budgets
from navil_jax.errors import UserError


def report(
    checkups: Sequence[Checkup], tables: Sequence[np.ndarray], summaries: Sequence[Summary], advice: str, samples: int
) -> str:
    """The page.

    Args:
      checkups, tables, summaries: one per source.
      advice: on the budgets of a row.
      samples: of each source that are shown, evenly spread over the usable ones.
    """
    sources = [
        {
            "name": summary.name,
            "rows": summary_rows(summary, row_budgets(checkup.config)),
            "marks": _table(summary.marks),
            "reasons": _table(summary.reasons),
            "charts": list(_charts(checkup, notes[usable(notes)])),
            "samples": [_preview(checkup, index) for index in _spread(np.flatnonzero(usable(notes)), samples)],
        }
        for checkup, notes, summary in zip(checkups, tables, summaries, strict=True)
    ]
    return page.render(page.HERE / "doctor.html.jinja", title="Data report", advice=advice, sources=sources)


def _table(found: Sequence[Reason]) -> list[tuple[str, str, str]]:
    return [(f"{reason.samples:,} x", reason.text, f"first {reason.first}") for reason in found]


def _charts(checkup: Checkup, good: np.ndarray) -> Iterator[dict[str, Any]]:
    budgets = row_budgets(checkup.config)
    for field in (*budgets, "characters"):
        if good[field].any():
            yield page.histogram(f"{field.replace('_', ' ')} per sample", good[field], budgets.get(field))
    if good["images"].any():
        yield page.histogram("width / height of images", aspect_ratios(good))


def _spread(indices: np.ndarray, number: int) -> list[int]:
    """So many of them, evenly spread."""
    return indices[np.linspace(0, len(indices) - 1, min(number, len(indices))).astype(int)].tolist()


def _preview(checkup: Checkup, index: int) -> dict[str, Any]:
    """What the template shows of a sample."""
    try:
        sample = checkup.source[index]
        features = sample_features(sample, checkup.config, checkup.tokenizer)
    except UserError as error:  # the data have changed since
        return {"problem": str(error)}
    return {
        "problem": "",
        "title": sample.key,
        "view": view_sample(features, checkup.tokenizer, checkup.config.model.vision),
    }
