"""The report of a study: one HTML page that needs nothing from outside."""

import base64
import html
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from navil_jax.data.inspect.page import document
from navil_jax.study.analysis import Analysis
from navil_jax.study.figures import draw
from navil_jax.study.findings import findings, markdown
from navil_jax.study.fitted import label
from navil_jax.study.results import size

GRID = "<style>table.grid td, table.grid th { border: 1px solid var(--line); padding: .3em .6em; }</style>"
METHOD = (
    "Intervals hold 95% of 1,000 repetitions of each fit, in which the noise is drawn anew: reading errors and the "
    "spread over seeds where the law misses the points by no more, else the misfit itself with Student's tails. "
    "<i>Holds</i> means that every interval lies on the side that the paper claims, <i>in part</i> that the effect is "
    "there but smaller than claimed."
)


def write_report(analysis: Analysis, path: Path, markdown_path: Path | None, title: str) -> None:
    """Writes the page with all figures in it, and the table of the five findings as Markdown if a path is given."""
    with tempfile.TemporaryDirectory() as folder:
        page = report(analysis, *draw(analysis, Path(folder)), title)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    if markdown_path:
        markdown_path.write_text(markdown(analysis), encoding="utf-8")


def report(analysis: Analysis, figures: Mapping[str, Path], missing: Mapping[str, str], title: str) -> str:
    """The page.

    Args:
      figures: title -> PNG, embedded.
      missing: title -> what was needed to draw it.
    """
    found = [(f"({f.number}) {f.claim}", "\n".join(f.measured) or "-", f.verdict) for f in findings(analysis)]
    laws = [(fit.law, fit.of, str(fit.points), fit.text()) for fit in analysis.all()]
    body = [
        GRID,
        f"<p>{METHOD}</p><h2>What holds</h2>",
        _table(("finding of the paper", "measured here", "verdict"), found),
        "<h2>Figures</h2>",
        *(_figure(name, path) for name, path in figures.items()),
        *(f"<p>{html.escape(name)} is not drawn: {html.escape(reason)}.</p>" for name, reason in missing.items()),
        "<h2>All laws</h2>",
        _table(("law", "of", "points", "found"), laws),
        "<h2>All settings</h2>",
        _table(("setting", "seeds", "points", "samples", "last loss"), _settings(analysis)),
    ]
    return document(title, body)


def _settings(analysis: Analysis) -> list[tuple[str, ...]]:
    return [
        (
            label(curve.row),
            str(curve.seeds),
            str(len(curve.samples)),
            size(curve.samples[-1]),
            f"{curve.losses[-1]:.4g} +- {1.96 * curve.errors[-1]:.2g}",
        )
        for curve in analysis.curves
    ]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    cell = lambda text: f"<td>{html.escape(text)}</td>".replace("\n", "<br>")  # noqa: E731
    lines = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<table class="grid"><tr>{first}</tr>{lines}</table>'


def _figure(name: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<h3>{html.escape(name)}</h3><img style="max-width:100%" alt="{html.escape(name)}" '
        f'src="data:image/png;base64,{data}">'
    )
