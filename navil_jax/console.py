"""Terminal output: tables and frames by rich, as wide as the terminal, and the progress of long jobs by tqdm."""

import contextlib
import os
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

ENDLESS = 100_000  # characters of a line where nothing limits it: in files, pipes and Markdown
FRAME = 120  # characters of a frame at most
THOUSANDS = 10_000  # from which on a progress counts in k and M
SECONDS, LOG_SECONDS = 1.0, 30.0  # between two updates of a progress, on a terminal and in a log
LOG_LINE = "{desc}: {percentage:.0f}%, {n_fmt}/{total_fmt}{unit}, {rate_fmt}, {remaining} left"


def render(content: RenderableType, width: int | None = None) -> str:
    """What to print so that stdout shows the content.

    On a terminal it has colours, unless NO_COLOR is set, and no line is wider; elsewhere it is plain.

    Args:
      width: None: that of the terminal; endless where there is none.
    """
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    if width is None and not console.is_terminal:
        console.width = ENDLESS
    with console.capture() as captured:
        console.print(_wrapped(content, console) if isinstance(content, Text) else content)
    return "\n".join(line.rstrip() for line in captured.get().removesuffix("\n").split("\n"))


def _wrapped(text: Text, console: Console) -> Text:
    """Lines that are too long go on below their beginning, between words."""
    lines: list[Text] = []
    for line in text.split("\n", allow_blank=True):
        indent = len(line.plain) - len(line.plain.lstrip(" "))
        parts = line[indent:].wrap(console, max(1, console.width - indent - 2)) if indent < len(line) else [line]
        whole = line.cell_len <= console.width
        lines += [line] if whole else [Text(" " * (indent + 2 * (n > 0))) + part for n, part in enumerate(parts)]
    return Text("\n").join(lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], indent: int = 0) -> str:
    """Columns as wide as their cells; a column of numbers is aligned at the right, by its first row.

    On a terminal that is too narrow for the numbers, each row is its cells behind the names of their columns.

    Example:
      table(("group", "tensors"), [("head", "1"), ("vision", "36")]) ->
        group   tensors
        head          1
        vision       36
    """
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    least = indent - 2  # columns that it needs
    for number, name in enumerate(head):
        is_number = bool(rows) and rows[0][number][:1].isdecimal()
        cells = [row[number] for row in rows]
        words = [word for text in (name, *(() if is_number else cells)) for word in text.split()]
        width = max(map(cell_len, [*words, *(cells if is_number else ())]), default=0)
        grid.add_column(name, justify="right" if is_number else "left", min_width=width)
        least += width + 2
    if sys.stdout.isatty() and least > Console().width:
        named = ("  ".join([row[0], *map(" ".join, zip(head[1:], row[1:], strict=True))]) for row in rows)
        return "\n".join(part for line in named for part in _broken(" " * indent + line, Console().width))
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


def frame(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Rows of (label, text) in a box no wider than the terminal; long texts go on below their beginning."""
    grid = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(label, text)
    width = min(FRAME, Console().width) if sys.stdout.isatty() else FRAME
    return render(Panel.fit(grid, box=box.SQUARE, title=Text(title), title_align="left"), width)


def is_terminal(stream: TextIO) -> bool:
    """Whether lines on the stream can be written anew; TERM=dumb says that they cannot."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def say(*fields: str, stream: TextIO | None = None) -> None:
    """Prints a line of fields, two blanks between them, above the bars that are shown.

    On a narrower terminal it goes on in a next line, between fields; a field that is alone too long, between its words.
    """
    text, stream = "  ".join(fields), stream or sys.stdout
    if stream.isatty():
        text = "\n".join(line for one in text.split("\n") for line in _broken(one, Console(file=stream).width))
    with tqdm.external_write_mode(file=stream):
        print(text, file=stream, flush=True)


def _broken(line: str, width: int) -> list[str]:
    """A line as lines of at most so many characters; words that are longer alone, such as paths, stay whole."""
    lines: list[str] = []
    if Text.from_ansi(line).cell_len <= width or line.startswith("|"):  # a row of a Markdown table stays one
        return [line]
    start = " " * (len(line) - len(line.lstrip(" ")))
    for field in line.strip(" ").split("  "):
        if lines and len(lines[-1]) + 2 + len(field) <= width:
            lines[-1] += f"  {field}"
        else:
            indent = f"{start}  " if lines else start
            lines += textwrap.wrap(
                field,
                width,
                initial_indent=indent,
                subsequent_indent=f"{start}  ",
                break_long_words=False,
                break_on_hyphens=False,
            ) or [field]
    return lines


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

    Rate and time left are those from the first update on: what comes before it, such as starting processes, is not
    repeated.

    Example:
      with Progress("data", total=48_000, unit="samples") as progress:
          progress.update(32)  # more
    """

    monitor_interval = 0  # no thread: processes are forked while it is shown

    def __init__(
        self,
        label: str,
        total: int,
        unit: str,
        done: int = 0,
        stream: TextIO | None = None,
        shown: bool = True,
    ) -> None:
        """Args: done: what was there before, of no weight for the rate; shown: False on all processes but one."""
        stream = stream or sys.stderr
        self._is_first = True
        form: dict[str, Any] = {"file": stream, "mininterval": SECONDS, "dynamic_ncols": True}
        if not is_terminal(stream):
            form = {"file": _Lines(stream), "mininterval": LOG_SECONDS, "bar_format": LOG_LINE}
        super().__init__(
            desc=label,
            total=total,
            unit=unit if unit == "B" else f" {unit}",
            initial=done,
            unit_scale=total >= THOUSANDS,
            miniters=1,
            smoothing=0,
            delay=form["mininterval"],
            leave=None,
            disable=not shown,
            **form,
        )

    @staticmethod
    def format_meter(*given: Any, **settings: Any) -> str:
        """As tqdm's, which writes a slow rate with the blank before the unit, `2.63s/ requests`."""
        return tqdm.format_meter(*given, **settings).replace("s/ ", " s/")

    def update(self, n: float | None = 1) -> bool | None:
        """As tqdm's; a first update of no more than a tenth of the whole starts the clock."""
        first, self._is_first = self._is_first, False
        if first and not self.disable and n and n <= (self.total - self.n) / 10:
            self.start_t, self.initial = self._time(), self.n + n
        return super().update(n)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says on stderr what is going on and for how long, where nobody knows how much is left.

    Example: `compiling train for v5p-128 ... 12 s` on a terminal, in its place once it is done `...: 31 s`; elsewhere
    a line at the beginning, every half minute and at the end.
    """
    began, done = time.monotonic(), threading.Event()
    rewritten = is_terminal(sys.stderr)

    def tell(end: str = " ...") -> None:
        line = f"{what}{end} {time.monotonic() - began:.0f} s"
        if rewritten:
            line = f"\r{line[: Console(stderr=True).width - 1]}\x1b[K"
        print(line, end="" if rewritten else "\n", file=sys.stderr, flush=True)

    def tell_on() -> None:
        while not done.wait(SECONDS if rewritten else LOG_SECONDS):
            tell()

    if not rewritten:
        print(f"{what} ...", file=sys.stderr, flush=True)
    thread = threading.Thread(target=tell_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        tell(":")
        if rewritten:
            print(file=sys.stderr, flush=True)
