"""The door of every command: what the world refuses is one line, and only a fault of the program has a traceback."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from navil_jax.errors import UserError, explain, one_line, report_user_errors, status_of

REPOSITORY = Path(__file__).parents[1]


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """The error as it is when it is caught."""
    try:
        raise error from cause
    except BaseException as caught:
        return caught


def write(path: Path) -> None:
    with path.open("w") as file:
        file.write("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "no", "a/b"), "a/b: No space left on device; make space and run the same command again"),
        (PermissionError(errno.EACCES, "no", "a"), "a: Permission denied; change its rights or give another path"),
        (IsADirectoryError(errno.EISDIR, "no", "a"), "a: Is a directory; give a file"),
        (FileNotFoundError(errno.ENOENT, "no", "a"), "a: No such file or directory; check the path"),
        (OSError(errno.EMFILE, "no", "a"), "a: Too many open files; raise the limit (ulimit -n)"),
        (OSError(errno.ENOSPC, "no", "a\nb\x1b[0m\udce9"), "a b\\x1b[0m\\udce9: No space left"),
        (
            ValueError('RESOURCE_EXHAUSTED: Error writing "/a/b": No space left on device [source]'),
            "/a/b: No space left",
        ),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"),
            "RESOURCE_EXHAUSTED: Out of memory",
        ),
        (RuntimeError("can't start new thread"), "can't start new thread; raise the limit of processes"),
        (MemoryError(), "memory is full (of this machine); lower data.rows"),
        (ConnectionRefusedError(111, "Connection refused"), "the network cannot be reached"),
        (ModuleNotFoundError("No module named 'x'", name="x"), "Python package 'x' is missing; install it with pip"),
        (UserError("a\nb"), "a b"),
        (KeyError("x"), None),
        (ValueError("x"), None),
        (OSError(errno.ENOENT, "no"), None),
        (ModuleNotFoundError("no", name="navil_jax.x"), None),
    ],
)
def test_what_the_world_refuses_is_told_from_faults(error, said):
    found = explain(raised(error))
    assert (found is None) == (said is None)
    assert found is None or (found.startswith(said) and "\n" not in found)


def test_causes_and_groups_are_looked_through():
    full = OSError(errno.ENOSPC, "no", "a/b")
    for outer in (raised(ValueError("x"), full), raised(ExceptionGroup("several", [KeyError("x"), full]))):
        assert explain(outer) == "a/b: No space left on device; make space and run the same command again"
    assert explain(raised(RuntimeError("x"), UserError("said"))) == "said"


def test_the_file_is_found_where_the_error_does_not_name_it(tmp_path):
    with pytest.raises(OSError, match="No space") as error:
        write(tmp_path / "a.txt")
    assert (explain(error.value) or "").startswith(f"{tmp_path / 'a.txt'}: No space left")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(RecursionError) as deep:
        json.loads((path := tmp_path / "deep.json").read_text())
    assert explain(deep.value) == f"{path}: nested too deeply for JSON; give a flatter file"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("said"), 2, "error: said"),
        (KeyboardInterrupt(), 130, "stopped; again"),
        (OSError(errno.EROFS, "no", "a"), 2, "error: a: Read-only file system; give a folder that can be written"),
    ],
)
def test_a_command_returns_a_status_and_prints_a_line(error, status, line, capsys):
    def main() -> int:
        raise error

    assert report_user_errors(main, stopped="stopped; again")() == status
    assert capsys.readouterr().err == f"{line}\n"


def test_a_bucket_or_network_that_is_down_ends_with_a_status_that_is_started_anew(capsys):
    down = pytest.importorskip("gcsfs.retry").HttpError({"code": 503, "message": "down"})
    for error, said in (
        (down, "the bucket cannot be used (down, 503); check it, and your rights, and run the same command again"),
        (
            ConnectionRefusedError(111, "no"),
            "the network cannot be reached ([Errno 111] no); check it and run the same",
        ),
    ):

        def main(error: Exception = error) -> int:
            raise error

        assert report_user_errors(main)() == 1
        assert capsys.readouterr().err.startswith(f"error: {said}")
    assert status_of(raised(UserError("no such model"), down)) == 2


def test_an_interrupt_within_another_error_is_an_interrupt(capsys):
    def main() -> int:
        try:
            raise KeyboardInterrupt
        finally:
            raise ValueError("closed")

    assert report_user_errors(main)() == 130
    assert capsys.readouterr().err == "stopped\n"


def test_a_fault_has_its_traceback_and_says_so(capsys):
    def main() -> int:
        raise KeyError("fault")

    assert report_user_errors(main)() == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("KeyError: 'fault'\n" + error.splitlines()[-1] + "\n")
    assert "please report it" in error.splitlines()[-1]


def test_text_for_a_terminal_is_one_line():
    assert one_line("a\n b\tc\r\x1b[1m ü \udce9") == "a  b\\tc\\r\\x1b[1m ü \\udce9"


def command(*arguments: str, **settings: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **dict(settings.pop("env", {}))}  # type: ignore[call-overload]
    return subprocess.Popen(
        [sys.executable, "-m", *arguments], env=environment, stderr=subprocess.PIPE, text=True, **settings
    )


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 0.6, 1.2])
def test_ctrl_c_while_modules_are_imported_is_one_line(seconds):
    process = command("navil_jax.chat", "--checkpoint", "none", stdin=subprocess.DEVNULL)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) in ((130, "stopped\n"), (2, error))
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("navil_jax.train", "--help"), ("navil_jax.study", "fit")])
def test_who_reads_may_leave(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    process = command(*arguments, stdout=writing)
    os.close(writing)
    assert (process.communicate(timeout=120)[1], process.returncode) == ("", 141)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [("navil_jax.train", "--help"), ("navil_jax.study", "fit")])
def test_a_full_disk_behind_stdout_is_told(arguments):
    with Path("/dev/full").open("w") as full:
        process = command(*arguments, stdout=full)
    error = process.communicate(timeout=120)[1]
    assert (error, process.returncode) == (
        "error: stdout: No space left on device; make space and run the same command again\n",
        2,
    )


@pytest.mark.slow
def test_any_terminal_takes_any_text():
    process = command("navil_jax.data", "doctor", "--source", "llava:größe.jsonl", env={"PYTHONIOENCODING": "ascii"})
    assert "gr\\xf6\\xdfe.jsonl" in process.communicate(timeout=60)[1]
    assert process.returncode == 2


def test_closed_streams_are_one_line() -> None:
    chat = f"{sys.executable} -m navil_jax.chat --checkpoint nowhere"
    for command, said in ((f"{chat} --prompt Hi 1>&-", "stdout is closed"), (f"{chat} <&-", "stdin is closed")):
        ended = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert ended.returncode == 2
        assert ended.stderr.startswith(f"error: {said}")
        assert ended.stderr.count("\n") == 1
