"""The one exception that stands for a user's mistake, and the door of every command: what went wrong, in one line.

A mistake, a full disk, a missing right, Ctrl-C or a closed pipe end a command with a line and a status. A traceback
means a fault of this program.
"""

import argparse
import contextlib
import difflib
import errno
import functools
import io
import json
import logging
import multiprocessing
import os
import re
import select
import socket
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

BAD_INPUT, INTERRUPTED, CLOSED_PIPE = 2, 130, 141  # exit statuses
AGAIN = "and run the same command again"

# What the world refuses -> what to do. Libraries that are no Python say the same in the words of `os.strerror`.
ADVICE = {
    errno.ENOSPC: f"make space {AGAIN}",
    errno.EDQUOT: f"make space within your quota {AGAIN}",
    errno.EROFS: "give a folder that can be written",
    errno.EACCES: "change its rights or give another path",
    errno.EPERM: "change its rights or give another path",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "give a path whose folders are folders",
    errno.EEXIST: "give another path or move what is there away",
    errno.ENOENT: "check the path",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: "a link there leads to itself",
    errno.EMFILE: "raise the limit (ulimit -n), or lower data.workers and data.threads",
    errno.ENFILE: f"end other programs {AGAIN}",
    errno.EAGAIN: "raise the limit of processes (ulimit -u), or lower data.workers and data.threads",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or give another file system",
    errno.EIO: f"check the disk {AGAIN}",
    errno.ESTALE: f"check the network disk {AGAIN}",
    errno.ENOMEM: "lower data.rows, raise optimizer.microbatches, or take a machine with more memory",
}
_SAID = {os.strerror(code): code for code in ADVICE if code not in (errno.ENOENT, errno.EEXIST, errno.ENOMEM)}
_NO_THREAD = "can't start new thread"  # a RuntimeError of Python


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do."""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions; on a terminal those that are longer than it go on in further ones.

    A command goes on behind a backslash, so that it can be copied.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return fitted(super()._fill_text(text, width, indent), width)

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any) -> str:
        """As argparse, which puts options behind a long name of a command; where they have no room, below it."""
        text = super()._format_usage(usage, actions, groups, prefix)
        if max(map(len, text.splitlines())) <= self._width:
            return text
        lines = [""]
        for part in re.findall(r"\[(?:[^][]|\[[^][]*\])*\]|\S+", text):
            if len(lines[-1]) + 1 + len(part) > self._width:
                lines.append("   ")
            lines[-1] += f" {part}" if lines[-1] else part
        return "\n".join(lines) + "\n\n"


def fitted(text: str, width: int) -> str:
    """A help text as it is; on a terminal, with lines of at most so many characters."""
    if not sys.stdout.isatty():
        return text
    joined = re.sub(r"(?m)^(\S.{90,})\n(?=\S)", r"\1 ", text)  # lines of a paragraph, before it is filled anew
    return "\n".join(part for line in joined.split("\n") for part in _narrowed(line, width))


def _narrowed(line: str, width: int) -> list[str]:
    """A line of a help text as lines of at most so many characters; a long word stays whole."""
    if len(line) <= width:
        return [line]
    start = line[: len(line) - len(line.lstrip())]
    is_command = line.lstrip().startswith(("python ", "--", "pip "))
    parts = textwrap.wrap(
        line.strip(),
        width - 2 * is_command,
        initial_indent=start,
        subsequent_indent=f"{start}  " if start else "",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [f"{part} \\" for part in parts[:-1]] + parts[-1:] if is_command else parts


class Parser(argparse.ArgumentParser):
    """Reads a command's arguments: its help keeps its lines, and a mistake is a `UserError` that names the option."""

    def __init__(self, **settings: Any) -> None:
        settings = {"formatter_class": _Help, "allow_abbrev": False, **settings}
        super().__init__(**settings)

    def error(self, message: str) -> NoReturn:
        """Example: "argument --rows: must be at least 1, not 0" -> UserError("--rows: must be at least 1, not 0")"""
        known = [option for action in self._actions for option in action.option_strings]
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        near = difflib.get_close_matches(unknown[1], known, n=1) if unknown else []
        more = f"; the nearest option is {near[0]}" if near else ""
        raise UserError(
            f"{message.removeprefix('argument ')}{more}; {self.prog.removeprefix('python -m ')} --help shows all"
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse, which takes the last of an option that is given twice."""
        given: set[int] = set()
        known = {name: action for action in self._actions for name in action.option_strings}
        for name in (argument.partition("=")[0] for argument in (sys.argv[1:] if args is None else args)):
            action = known.get(name)
            if action is not None and action.nargs != 0 and not isinstance(action, argparse._AppendAction):
                if id(action) in given:
                    raise UserError(f"{name}: is given twice; give it once")
                given.add(id(action))
        return super().parse_known_args(args, namespace)

    def print_help(self, file: Any = None) -> None:
        """As argparse, which passes over a full disk or a closed pipe."""
        print(self.format_help(), end="", file=file)


def report_user_errors(main: Callable[..., int | None], stopped: str = "stopped") -> Callable[..., int]:
    """Wraps a command's main, so that it returns a status and raises nothing.

    2 and one line on stderr for a `UserError`, for what the world refuses and for a missing package; 130 and one line
    after Ctrl-C; 141 and no word if who reads the output has left; 1 and a traceback for a fault of this program.

    Args:
      stopped: the line after Ctrl-C.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        _prepare()
        try:
            if sys.stdout is None:
                raise UserError("stdout is closed; leave it open, or send it to a file or to /dev/null")
            try:
                return main(*args, **kwargs) or 0
            finally:
                _flush()
        except SystemExit:
            raise
        except BaseException as error:
            status = _report(error, stopped)
            if _is_command():
                _leave(status)
            return status

    return wrapped


def one_line(text: object) -> str:
    """Text for a terminal: line breaks as spaces, what cannot be printed as escapes."""
    joined = " ".join(str(text).split("\n")).strip()
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in joined)


def explain(error: BaseException) -> str | None:
    """What is wrong, where and what to do, if it is none of this program's faults; else None. Looks at causes too."""
    raised: BaseException | None = error
    while raised is not None:
        if isinstance(raised, UserError):
            return one_line(raised)
        raised = raised.__cause__
    for found in _chain(error):
        if said := _explain(found):
            return said
    return None


def _report(error: BaseException, stopped: str) -> int:
    chain = list(_chain(error))
    if any(isinstance(found, KeyboardInterrupt) for found in chain):
        print(one_line(stopped), file=sys.stderr)
        return INTERRUPTED
    if any(isinstance(found, BrokenPipeError) for found in chain) and _nobody_reads():
        _silence()
        return CLOSED_PIPE
    said = explain(error)
    if said is not None:
        print(f"error: {said}", file=sys.stderr)
        return status_of(error)
    traceback.print_exception(error)
    print("this is a fault of navil_jax: please report it with the command and all lines above", file=sys.stderr)
    return 1


def _leave(status: int) -> None:
    """Ends the process at once, with the processes it has started: threads of a loader, or of Orbax whose write has
    failed, can wait for each other for ever where Python ends. Processes of a pod leave together, in the long way.
    """
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        return
    for child in multiprocessing.active_children():
        child.terminate()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(status)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, those of its group, and what it was raised from or while handling, each once."""
    waiting, seen = [error], set()
    while waiting:
        found = waiting.pop(0)
        if id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        inner = getattr(found, "exceptions", ())  # of a group
        waiting += [other for other in (*inner, found.__cause__, found.__context__) if isinstance(other, BaseException)]


def _explain(error: BaseException) -> str | None:
    first = one_line(str(error).strip().split("\n")[0])
    if isinstance(error, ModuleNotFoundError):
        ours = not error.name or error.name.startswith("navil_jax")
        return None if ours else f"Python package {error.name!r} is missing; install it with pip"
    if isinstance(error, MemoryError):
        return f"memory is full ({first or 'of this machine'}); {ADVICE[errno.ENOMEM]}"
    if isinstance(error, OSError) and error.errno in ADVICE and not isinstance(error, BrokenPipeError):
        where = _where(error)
        known = where or error.errno not in (errno.ENOENT, errno.EEXIST)
        return _refused(error.errno or 0, where) if known else None
    if _is_of_network(error):
        return f"the network cannot be reached ({first}); check it {AGAIN}"
    if _is_of_bucket(error):
        return f"the bucket cannot be used ({first or type(error).__name__}); check it, and your rights, {AGAIN}"
    if isinstance(error, RecursionError) and "JSON" in str(error):
        return f"{_where(error) or 'a JSON text'}: nested too deeply for JSON; give a flatter file"
    if isinstance(error, UnicodeDecodeError) and (where := _where(error)):
        return f"{where}: is no UTF-8 text at byte {error.start}; convert it to UTF-8"
    if isinstance(error, json.JSONDecodeError) and (where := _where(error)):
        return f"{where}: not JSON: {first}"
    return _explain_text(first, str(error)) if isinstance(error, RuntimeError | ValueError) else None


def _is_of_network(error: BaseException) -> bool:
    down = isinstance(error, ConnectionError | TimeoutError | socket.gaierror)
    return down and not isinstance(error, BrokenPipeError)


def _is_of_bucket(error: BaseException) -> bool:
    """Whether a package that reaches buckets raises it, after trying again for half a minute."""
    return type(error).__module__.startswith(("gcsfs.", "google.auth.", "google.api_core.", "aiohttp."))


def status_of(error: BaseException) -> int:
    """Exit status for what `explain` explains: 1 for what may be over at the next start, else that of a mistake."""
    by_user = isinstance(error, UserError) or isinstance(error.__cause__, UserError)
    passes = any(_is_of_network(found) or _is_of_bucket(found) for found in _chain(error))
    return 1 if passes and not by_user else BAD_INPUT


def _explain_text(first: str, text: str) -> str | None:
    """As `_explain`, by the words of libraries that are no Python: TensorStore, XLA."""
    if code := next((code for said, code in _SAID.items() if said in text), 0):
        path = re.search(r"[\s\"'=(](/[^\s\"',)]+)", text)
        return _refused(code, path[1] if path else "")
    if _NO_THREAD in text:
        return f"{first}; {ADVICE[errno.EAGAIN]}"
    return f"{first}; {ADVICE[errno.ENOMEM]}" if "RESOURCE_EXHAUSTED" in text else None


def _refused(code: int, where: str) -> str:
    return f"{where}{': ' if where else ''}{os.strerror(code)}; {ADVICE[code]}"


def _where(error: BaseException) -> str:
    """The file that an error is about: as it says itself, else what the innermost function held; empty if unknown."""
    named = getattr(error, "filename", None)
    if isinstance(named, str | bytes):
        return one_line(os.fsdecode(named))
    last = traceback.extract_tb(error.__traceback__)[-1:]
    if last and (last[0].line or "").startswith("print("):
        return "stdout"
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    for values in reversed(frames):
        for value in list(values.values()):
            name = getattr(value, "name", None) if isinstance(value, io.IOBase) else None
            if isinstance(name, str) and not name.startswith("<"):
                return one_line(name)
        known = values.get("path"), values.get("file"), getattr(values.get("self"), "path", None)
        named = [value for value in known if isinstance(value, str | os.PathLike)]
        if found := named or [value for value in values.values() if isinstance(value, os.PathLike)][::-1]:
            return one_line(os.fspath(found[0]))
    return ""


def _prepare() -> None:
    """Makes streams take any text, and lets libraries be silent of errors that end the command with a line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    from absl import logging as absl  # Orbax logs with it

    absl.set_verbosity(absl.ERROR)
    for logger in (absl.get_absl_logger(), logging.getLogger("gcsfs")):
        if _is_news not in logger.filters:
            logger.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record of a library's log tells more than the line of the command: Orbax logs what it raises later."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or explain(error) is None


def _flush() -> None:
    """Writes what is left for stdout; if that fails, Python need not try again at its end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            _silence()
            error.filename = error.filename or "stdout"
        raise


def _silence() -> None:
    """Nothing is written to stdout from here on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _nobody_reads() -> bool:
    """Whether stdout is a pipe without a reader."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # no file at all
        return False


def _is_command() -> bool:
    """Whether this process is a command of this package, and no program that imports it."""
    program = Path(sys.argv[0] if sys.argv else "")
    return program.name.startswith("navil-") or program.is_relative_to(Path(__file__).parent)


def _end_of_thread(failed: threading.ExceptHookArgs) -> None:
    """A thread that the world stops, such as TensorBoard's writer, ends the command: others wait for it."""
    said = explain(failed.exc_value) if failed.exc_value else None
    if said is None:
        threading.__excepthook__(failed)
        return
    print(f"error: {said}", file=sys.stderr, flush=True)
    _leave(status_of(failed.exc_value) if failed.exc_value else BAD_INPUT)


def _unraisable(failed: "sys.UnraisableHookArgs") -> None:
    """TensorStore tells a loop of Orbax that is closed after a failed write, and no one else, of every array."""
    if str(failed.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(failed)


if _is_command():
    threading.excepthook, sys.unraisablehook = _end_of_thread, _unraisable
