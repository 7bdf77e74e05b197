"""Tables, frames and progress: as wide as the terminal, plain where there is none."""

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Callable

import pytest
from rich.text import Text

from navil_jax.console import LOG_SECONDS, Progress, frame, is_terminal, markdown_table, render, say, table, waiting
from navil_jax.data import __main__ as data
from navil_jax.errors import Parser

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
    assert table(("benchmark", "score", ""), [("gqa", "1.0", "")]).startswith("benchmark  score\n")


def test_a_table_is_as_wide_as_the_terminal(terminal: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("word " * 20, "1")]
    assert "\x1b[1m" in table(("text", "number"), rows)
    monkeypatch.setenv("NO_COLOR", "1")
    assert max(map(len, table(("text", "number"), rows).splitlines()[1:])) <= 40


@pytest.mark.parametrize(
    ("columns", "last"),
    [
        (32, ["  easy_vqa   19,480    1,185,001"]),
        (28, ["  easy_vqa  samples 19,480", "    visual tokens 1,185,001"]),
    ],
)
def test_no_number_is_cut_on_a_narrow_terminal(columns: int, last: list[str], terminal: None, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    written = table(("source", "samples", "visual tokens"), [("easy_vqa", "19,480", "1,185,001")], indent=2)
    assert screen_lines(written)[-len(last) :] == last


def test_a_text_goes_on_below_its_beginning(terminal: None, monkeypatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    lines = render(Text("  head\n    " + "word " * 9 + "\n\nend")).splitlines()
    assert lines == ["  head", "    " + "word " * 6 + "word", "      word word", "", "end"]


def test_lines_of_files_and_pipes_are_not_wrapped() -> None:
    assert len(table(("text",), [("word " * 100,)]).splitlines()) == 2
    assert render(Text("word " * 100 + "end", style="red")) == "word " * 100 + "end"


def test_markdown_is_the_same_on_a_terminal(terminal: None) -> None:
    rows = [{"a": "1"}, {"a": "word " * 20 + "end", "b": "[x]"}]
    assert markdown_table(rows).splitlines()[1:3] == [
        "|" + "-" * 105 + "|-----|",
        "| 1" + " " * 102 + " |     |",
    ]


def test_a_frame_keeps_all_words_and_its_width() -> None:
    lines = frame("data [x]", [("bad", "word " * 60 + "end"), ("", "x" * 300)]).splitlines()
    assert {len(line) for line in lines} == {120}
    assert lines[0].startswith("┌─ data [x] ─")
    words = " ".join(line[1:-1] for line in lines[1:-1]).split()
    assert words.count("word") == 60
    assert "".join(words).count("x") == 300
    assert frame("data", [("a", "b")]).splitlines() == ["┌─ data ─┐", "│ a  b   │", "└────────┘"]


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


def test_a_slow_rate_is_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    stream = io.StringIO()
    with Progress("x", 4, "requests", stream=stream) as progress:
        now[0] += 40
        progress.update(2)
    assert stream.getvalue().splitlines()[0] == "x: 50%, 2/4 requests, 20.00 s/requests, 00:40 left"


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


FIELDS = ("step 40/100", "loss 2.3100", "padding 10% of tokens, 25% of patches", "data wait 0.1%", "ETA 0:10:00")


def on_terminal(columns: int, work: Callable[[], None], **environment: str) -> str:
    """What a function writes on a pseudo-terminal of so many columns."""
    child, terminal_ = pty.fork()
    if not child:
        os.environ.update({"TERM": "xterm", **environment})
        os.environ.pop("COLUMNS", None)
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        work()
        sys.stdout.flush()
        os._exit(0)
    written = b""
    while True:
        try:
            chunk = os.read(terminal_, 65536)
        except OSError:  # the other side is closed
            break
        if not chunk:
            break
        written += chunk
    os.waitpid(child, 0)
    return written.decode()


def screen_lines(written: str) -> list[str]:
    """What every line of a terminal showed at some time."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", written)
    return [state.rstrip() for line in plain.split("\n") for state in line.split("\r")]


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_lines_break_between_fields(columns: int) -> None:
    lines = [line for line in screen_lines(on_terminal(columns, lambda: say(*FIELDS))) if line]
    assert max(map(len, lines)) <= columns
    assert "  ".join(line.strip() for line in lines) == "  ".join(FIELDS)
    assert len(lines) == {60: 3, 80: 2, 200: 1}[columns]


@pytest.mark.parametrize("columns", [60, 80])
def test_the_usage_of_a_command_fits_the_terminal(columns: int) -> None:
    parser = Parser(prog="python -m navil_jax.generate", description="Answers.")
    for name in ("--checkpoint", "--max-new-tokens", "--temperature", "--repetition-penalty"):
        parser.add_argument(name, required=name == "--checkpoint")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    lines = screen_lines(on_terminal(columns, parser.print_help))
    assert max(map(len, lines)) <= columns
    assert "[--dtype {float32,bfloat16,float16}]" in " ".join(lines)
    assert "--checkpoint CHECKPOINT" in " ".join(lines)


def test_the_list_of_the_data_commands_fits_the_terminal() -> None:
    lines = screen_lines(on_terminal(60, lambda: data.main(["--help"]) and None))
    assert max(map(len, lines)) <= 60
    assert "  python -m navil_jax.data preview --config \\" in lines


def test_escapes_take_no_room() -> None:
    bold = "\x1b[1m" + "  ".join(["word"] * 10) + "\x1b[0m"
    lines = list(filter(None, screen_lines(on_terminal(60, lambda: say(bold)))))
    assert lines == ["  ".join(["word"] * 10)]


def test_an_indented_line_breaks_below_its_beginning() -> None:
    text = "  fits a row: visual tokens 65 of 8,192 (1%), text tokens 10 of 8,192 (0%), patches 256 of 24,576"
    lines = list(filter(None, screen_lines(on_terminal(60, lambda: say(text)))))
    assert max(map(len, lines)) <= 60
    assert [re.match(" *", one)[0] for one in lines] == ["  ", "    "]  # type: ignore[index]


def test_a_path_is_never_broken() -> None:
    path = "runs/" + "x" * 100
    assert path in on_terminal(60, lambda: say(f"written to the folder {path}, which is new and holds nothing else"))


def show_bar() -> None:
    with Progress("train", 100, "steps") as bar:
        for step in range(100):
            bar.start_t, bar.last_print_t = bar.start_t - 1, bar.last_print_t - 1
            bar.update(1)
            if step == 50:
                say("step 50", "loss 1.0")


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_bar_is_no_wider_than_the_terminal_and_lines_stand_above_it(columns: int) -> None:
    lines = screen_lines(on_terminal(columns, show_bar, NO_COLOR="1"))
    assert columns - 2 <= max(map(len, lines)) <= columns
    assert "step 50  loss 1.0" in lines
    assert len([line for line in lines if "100%" in line]) >= 1


def test_no_colour_and_a_dumb_terminal_get_no_escapes() -> None:
    def work() -> None:
        print(frame("data", [("bad", "1")]))
        print(table(("a", "b"), [("c", "1")]))
        with waiting("compiling"):
            pass
        show_bar()

    assert "\x1b" not in on_terminal(80, work, TERM="dumb", NO_COLOR="1").replace("\x1b[K", "!")
    assert "\x1b[3" not in on_terminal(80, work, NO_COLOR="1")


def test_work_of_unknown_length_says_when_it_begins_and_ends(capsys: pytest.CaptureFixture) -> None:
    with waiting("compiling"):
        assert capsys.readouterr().err == "compiling ...\n"
    assert capsys.readouterr().err == "compiling: 0 s\n"


def test_the_time_left_does_not_count_what_came_before_the_first_update(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    stream = io.StringIO()
    with Progress("x", 10_000, "samples", stream=stream) as progress:
        for seconds, more in ((100, 10), (140, 4000)):
            now[0] = 1000 + seconds
            progress.update(more)
    assert "100 samples/s, 00:59 left" in stream.getvalue()
