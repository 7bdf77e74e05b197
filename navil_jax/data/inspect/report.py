"""The doctor's report as one HTML page."""

import html
from collections.abc import Iterator, Sequence

import numpy as np

from navil_jax.data.features import sample_features
from navil_jax.data.inspect import page
from navil_jax.data.inspect.checkup import Checkup
from navil_jax.data.inspect.reading import view_sample
from navil_jax.data.inspect.summary import Summary, aspect_ratios, summary_rows, usable
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
    body = [f"<p>{html.escape(advice)}</p>" if advice else "", f"<p>{page.LEGEND}</p>"]
    for checkup, table, summary in zip(checkups, tables, summaries, strict=True):
        body += _source(checkup, table, summary, samples)
    return page.document("Data report", body)


def _source(checkup: Checkup, notes: np.ndarray, summary: Summary, samples: int) -> Iterator[str]:
    budgets = row_budgets(checkup.config)
    yield f"<h2>{html.escape(summary.name)}</h2>"
    yield page.table(summary_rows(summary, budgets))
    if summary.reasons:
        rows = [(f"{reason.samples:,} x", reason.text, f"first {reason.first}") for reason in summary.reasons]
        yield f'<h3 class="warn">Bad samples</h3>{page.table(rows)}'
    good = notes[usable(notes)]
    if not len(good):
        return
    yield '<div class="charts">'
    for field in (*budgets, "characters"):
        if good[field].any():
            yield page.histogram(f"{field.replace('_', ' ')} per sample", good[field], budgets.get(field))
    if summary.ratios:
        yield page.histogram("width / height of images", aspect_ratios(good))
    yield "</div>"
    for index in _spread(np.flatnonzero(usable(notes)), samples):
        yield _preview(checkup, index)


def _spread(indices: np.ndarray, number: int) -> list[int]:
    """So many of them, evenly spread."""
    return indices[np.linspace(0, len(indices) - 1, min(number, len(indices))).astype(int)].tolist()


def _preview(checkup: Checkup, index: int) -> str:
    try:
        sample = checkup.source[index]
        features = sample_features(sample, checkup.config, checkup.tokenizer)
    except UserError as error:  # the data have changed since
        return f'<p class="warn">{html.escape(str(error))}</p>'
    view = view_sample(features, checkup.tokenizer, checkup.config.model.vision)
    return page.sample(view, sample.key)
