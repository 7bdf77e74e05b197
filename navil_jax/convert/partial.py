"""Partial: a new folder, written beside its name until it is whole, by one command at a time."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from navil_jax.errors import UserError

PURPOSE = "purpose.json"
FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def partial_folder(target: Path, purpose: dict[str, Any]) -> Iterator[Path]:
    """Gives `<target>.partial`, which becomes the target at the end. After an error it stays, for a command to go on.

    Args:
      target: must not exist or be empty; local.
      purpose: says what is written, such as where from and with which settings; anything that JSON can hold. What a
        command of another purpose left is removed.

    Raises:
      UserError: the target holds something, another command writes it now, or the disk is full or cannot be written.
    """
    partial = target.absolute().with_name(f"{target.name}.partial")
    with _disk_errors_named(partial):
        _check_free(target)
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial):
            _check_free(target)
            _check_purpose(partial, purpose)
            yield partial
            (partial / PURPOSE).unlink()
            if target.exists():
                target.rmdir()
            partial.rename(target)


def _check_free(target: Path) -> None:
    """Raises a `UserError` if the target is no new folder."""
    file = next((path for path in (target, *target.absolute().parents) if path.exists() and not path.is_dir()), None)
    if file is not None:
        raise UserError(f"{target}: {file} is a file; give a new folder")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target}: is not empty; give a new folder")


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """The lock is the folder's own: it ends with the process and leaves no file."""
    busy = f"{partial}: another command is writing it; wait until it has ended, or give another folder"
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(busy) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # file systems that have no locks
                raise
        if not (partial.exists() and os.path.samestat(os.fstat(handle), partial.stat())):
            raise UserError(busy)  # it has just become the target
        yield
    finally:
        os.close(handle)


def _check_purpose(partial: Path, purpose: dict[str, Any]) -> None:
    """Keeps what a command of the same purpose left, and removes what one of another purpose did."""
    said, names = partial / PURPOSE, {entry.name for entry in partial.iterdir()}
    text = json.dumps(purpose)
    if PURPOSE in names and said.read_text() == text:
        return
    if names and PURPOSE not in names:
        raise UserError(
            f"{partial}: holds files that no interrupted command left; move them away, or give another folder"
        )
    if names:
        print(f"{partial}: what another command left there is removed")
    for name in names - {PURPOSE}:
        entry = epath.Path(partial / name)
        entry.rmtree() if entry.is_dir() else entry.unlink()
    said.write_text(text)


@contextlib.contextmanager
def _disk_errors_named(folder: Path) -> Iterator[None]:
    """Turns what the disk refuses into a `UserError`; the storage library has only words for it."""
    try:
        yield
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in FULL or "No space left" in str(error) or "quota exceeded" in str(error):
            raise UserError(f"{folder}: the disk is full; make space and run the same command, it goes on") from error
        if not isinstance(error, OSError):
            raise
        raise UserError(f"{error.filename or folder}: {error.strerror or error}; nothing was finished") from error
