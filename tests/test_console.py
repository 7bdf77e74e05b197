"""Tables, frames and progress: as wide as the terminal, plain where there is none."""

import io
import sys

import pytest
from rich.text import Text

from navil_jax.console import LOG_SECONDS, Progress, frame, is_terminal, markdown_table, render, table

ROWS = [("head", "1"), ("vision [red]", "1,036")]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """stdout is a terminal of 40 columns."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")


def test_numbers_are_aligned_at_the_right() -> None:
    assert table(("group", "tensors"), ROWS).splitlines() == [
        "group         tensors",
        "head                1",
        "vision [red]    1,036",
    ]
    assert table(("group", "tensors"), ROWS, indent=2).splitlines()[1] == "  head                1"
    assert table(("group", "tensors"), []) == "group  tensors"


def test_a_table_is_as_wide_as_the_terminal(terminal: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("word " * 20, "1")]
    assert "\x1b[1m" in table(("text", "number"), rows)
    monkeypatch.setenv("NO_COLOR", "1")
    assert max(map(len, table(("text", "number"), rows).splitlines()[1:])) <= 40


def test_lines_of_files_and_pipes_are_not_wrapped() -> None:
    assert len(table(("text",), [("word " * 100,)]).splitlines()) == 2
    assert render(Text("word " * 100 + "end", style="red")) == "word " * 100 + "end"


def test_markdown_is_the_same_on_a_terminal(terminal: None) -> None:
    rows = [{"a": "1"}, {"a": "word " * 20 + "end", "b": "[x]"}]
    assert markdown_table(rows).splitlines()[1:3] == [
        "|" + "-" * 105 + "|-----|",
        "| 1" + " " * 102 + " |     |",
    ]


def test_a_frame_cuts_what_is_too_long() -> None:
    top, short, long, bottom = frame("data [x]", ["short", "x" * 200]).splitlines()
    assert {len(line) for line in (top, short, long, bottom)} == {120}
    assert top.startswith("┌─ data [x] ─")
    assert short.startswith("│ short  ")
    assert long.endswith("x… │")
    assert frame("data", ["a"]).splitlines() == ["┌─ data ─┐", "│ a      │", "└────────┘"]


def test_a_log_gets_lines_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    stream = io.StringIO()
    with Progress("x", 10_000, "samples", done=1000, stream=stream) as progress:
        for seconds, more in ((10, 1000), (40, 3000), (41, 1), (90, 4999)):
            now[0] = 1000 + seconds
            progress.update(more)
    assert stream.getvalue().splitlines() == [
        "x: 50%, 5.00k/10.0k samples, 100 samples/s, 00:50 left",
        "x: 100%, 10.0k/10.0k samples, 100 samples/s, 00:00 left",
        "x: 100%, 10.0k/10.0k samples, 100 samples/s, 00:00 left",
    ]


def test_a_quick_job_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    stream = io.StringIO()
    with Progress("x", 10, "samples", stream=stream) as progress:
        now[0] += LOG_SECONDS / 2
        progress.update(10)
    assert stream.getvalue() == ""


def test_a_dumb_terminal_is_written_to_in_lines(terminal: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_terminal(sys.stdout)
    monkeypatch.setenv("TERM", "dumb")
    assert not is_terminal(sys.stdout)
