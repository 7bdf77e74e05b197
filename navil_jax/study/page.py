"""The report of a study: one HTML page that needs nothing from outside."""

import base64
import tempfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from navil_jax.data.inspect.page import render
from navil_jax.study.analysis import Analysis
from navil_jax.study.figures import draw
from navil_jax.study.findings import MARKS, findings, markdown
from navil_jax.study.fitted import label
from navil_jax.study.results import size


def write_report(analysis: Analysis, path: Path, markdown_path: Path | None, title: str) -> None:
    """Writes the page with all figures in it, and the table of the five findings as Markdown if a path is given."""
    with tempfile.TemporaryDirectory() as folder:
        light, missing = draw(analysis, Path(folder) / "light")
        dark, _ = draw(analysis, Path(folder) / "dark", dark=True)
        page = report(analysis, {name: (light[name], dark[name]) for name in light}, missing, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    if markdown_path:
        markdown_path.write_text(markdown(analysis), encoding="utf-8")


def report(analysis: Analysis, figures: Mapping[str, tuple[Path, Path]], missing: Mapping[str, str], title: str) -> str:
    """The page.

    Args:
      figures: title -> PNG for light and for dark pages, embedded.
      missing: title -> what was needed to draw it.
    """
    return render(
        Path(__file__).with_name("report.html.jinja"),
        title=title,
        findings=findings(analysis),
        marks=MARKS,
        figures=[
            (name, _data_uri(light), _data_uri(dark), Image.open(light, formats=("PNG",)).text["Description"])  # type: ignore[attr-defined]
            for name, (light, dark) in figures.items()
        ],
        missing=missing,
        laws=[(fit.law, fit.of, str(fit.points), fit.text()) for fit in analysis.all()],
        settings=_settings(analysis),
    )


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


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
