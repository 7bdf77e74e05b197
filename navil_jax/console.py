"""Terminal output: tables and frames by rich, as wide as the terminal, and the progress of long jobs by tqdm."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

ENDLESS = 100_000  # characters of a line where nothing limits it: in files, pipes and Markdown
FRAME = 120  # characters of a frame at most
FRAME_EDGES = 4  # of them, the borders and the blanks beside them
SECONDS, LOG_SECONDS = 1.0, 30.0  # between two updates of a progress, on a terminal and in a log
LOG_LINE = "{desc}: {percentage:.0f}%, {n_fmt}/{total_fmt}{unit}, {rate_fmt}, {remaining} left"


def render(content: RenderableType, width: int | None = None) -> str:
    """What to print so that stdout shows the content.

    On a terminal it has colours, unless NO_COLOR is set; elsewhere it is plain. Text is left to the terminal to wrap.

    Args:
      width: None: that of the terminal; endless where there is none.
    """
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    if width is None and not console.is_terminal:
        console.width = ENDLESS
    with console.capture() as captured:
        console.print(content, soft_wrap=isinstance(content, Text))
    return "\n".join(line.rstrip() for line in captured.get().removesuffix("\n").split("\n"))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], indent: int = 0) -> str:
    """Columns as wide as their cells; a column of numbers is aligned at the right, by its first row.

    Example:
      table(("group", "tensors"), [("head", "1"), ("vision", "36")]) ->
        group   tensors
        head          1
        vision       36
    """
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for number, name in enumerate(head):
        is_number = bool(rows) and rows[0][number][:1].isdecimal()
        grid.add_column(name, justify="right" if is_number else "left")
    for row in rows:
        grid.add_row(*row)
    return render(Padding(grid, (0, 0, 0, indent), expand=False))


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Columns are those of the longest row, and missing cells stay empty."""
    columns = max((list(cells) for cells in rows), key=len)
    grid = Table(*columns, box=box.MARKDOWN, header_style="")
    for cells in rows:
        grid.add_row(*(cells.get(name, "") for name in columns))
    return render(grid, ENDLESS).strip()


def frame(title: str, lines: Sequence[str]) -> str:
    """The lines in a box; what is too long for it ends in an ellipsis."""
    content = Text("\n".join(lines), no_wrap=True, overflow="ellipsis")
    width = min(FRAME, Console().width) if sys.stdout.isatty() else FRAME
    return render(Panel.fit(content, box=box.SQUARE, title=Text(title), title_align="left"), width)


def is_terminal(stream: TextIO) -> bool:
    """Whether lines on the stream can be written anew; TERM=dumb says that they cannot."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class _Lines:
    """A stream on which every state of a progress is a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self._stream.write(f"{text.strip()}\n")

    def flush(self) -> None:
        self._stream.flush()


class Progress(tqdm):
    """A bar on stderr with rate and time left; a line every half minute where that is no terminal. Not if quick.

    Example:
      with Progress("data", total=48_000, unit="samples") as progress:
          progress.update(32)  # more
    """

    monitor_interval = 0  # no thread: processes are forked while it is shown

    def __init__(self, label: str, total: int, unit: str, done: int = 0, stream: TextIO | None = None) -> None:
        """Args: done: what was there before, of no weight for the rate."""
        stream = stream or sys.stderr
        shown: dict[str, Any] = {"file": stream, "mininterval": SECONDS, "dynamic_ncols": True}
        if not is_terminal(stream):
            shown = {"file": _Lines(stream), "mininterval": LOG_SECONDS, "bar_format": LOG_LINE}
        super().__init__(
            desc=label,
            total=total,
            unit=unit if unit == "B" else f" {unit}",
            initial=done,
            unit_scale=True,
            miniters=1,
            smoothing=0,
            delay=shown["mininterval"],
            **shown,
        )
