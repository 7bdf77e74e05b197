"""Preview: the first packed rows of a run as training sees them, in the terminal and as a page."""

import argparse
import dataclasses
import sys
import webbrowser
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from navil_jax.config import Config
from navil_jax.config.ranges import Count, read_as
from navil_jax.console import render, say, waiting
from navil_jax.data.inspect import page, terminal
from navil_jax.data.inspect.reading import RowView, view_rows
from navil_jax.data.pipeline import make_dataset
from navil_jax.data.quarantine import Quarantine
from navil_jax.data.run import OpenRun
from navil_jax.data.sample import Source
from navil_jax.errors import UserError
from navil_jax.paths import new_file

ABOUT = """Shows the first packed rows of a training run: which samples share them, how full they are, what is trained.

the first four rows of a recipe, in the terminal and as a page with images:
  python -m navil_jax.data preview --config configs/demo.py --rows 4 --out rows.html

In the terminal, {0.25|Yes.} is text that is trained with a loss weight of 0.25 per token; all other text is only read.
Which samples share a row follows from config.data.seed, so these are the rows of the run itself.

Exit status: 0 good, 2 bad input (one line says what), 130 after Ctrl-C."""


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rows", type=read_as(Count), default=2, metavar="N", help="number of rows (default: 2)")
    add("--out", type=new_file, metavar="FILE", help="HTML page with the rows and their images")
    add("--open", action="store_true", help="opens the page of --out in a browser")


def run(opened: OpenRun, options: argparse.Namespace) -> int:
    """Prints the first rows, and writes their page if asked to."""
    if options.open and not options.out:
        raise UserError("--open: has no effect without --out; give --out rows.html")
    config, tokenizer, sources = opened.config, opened.tokenizer, opened.sources
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, rows=options.rows, streams=1))
    quarantine = Quarantine(given=config.data.quarantine)
    iterator = iter(make_dataset(config, sources, tokenizer, quarantine=quarantine))
    with waiting(f"reading samples for {config.data.packing_lookahead} rows, from which these are packed"):
        rows = view_rows(next(iterator), tokenizer, config.model.vision)
    titles = _titles(rows, config, sources)
    say(terminal.LEGEND)
    for number, row in enumerate(rows, start=1):
        print(f"\n{render(terminal.row_text(number, row, titles))}")
    counts = Counter(config.data.sources[view.source].name for row in rows for view in row.samples)
    say("\nsamples in these rows:", *(f"{name} {count:,}" for name, count in sorted(counts.items())))
    if options.out:
        _write(options.out, rows, titles)
        print(f"page: {options.out}")
        if options.open and not webbrowser.open(options.out.resolve().as_uri()):
            print("no browser was found to open it", file=sys.stderr)
    return 0


def _titles(rows: Sequence[RowView], config: Config, sources: Sequence[Source]) -> dict[tuple[int, int], str]:
    """(source, sample) -> the source's name and the sample's key."""
    found = {(view.source, view.sample) for row in rows for view in row.samples}
    return {
        (source, sample): f"{config.data.sources[source].name}, {sources[source][sample].key}"
        for source, sample in sorted(found)
    }


def _write(path: Path, rows: Sequence[RowView], titles: Mapping[tuple[int, int], str]) -> None:
    links = [(f"row-{number}", f"row {number}") for number in range(1, len(rows) + 1)]
    text = page.render(page.HERE / "rows.html.jinja", title="Packed rows", rows=rows, titles=titles, links=links)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
