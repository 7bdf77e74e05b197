"""Lock: one run at a time writes to a workdir, and all its processes were started with the same settings."""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from types import TracebackType
from typing import Any, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils

from navil_jax.config import Config
from navil_jax.config.plain import differences, from_json, to_json
from navil_jax.errors import UserError, one_line
from navil_jax.paths import is_remote, path_of

FILE = ".lock"
RENEWED_SECONDS = 10.0  # how often a run says in its bucket that it lives


class WorkdirLock:
    """Keeps a workdir for this run, from `with` to its end; a process that has died keeps nothing.

    On a file system the first process holds an advisory lock (`flock`) on `<workdir>/.lock`. A bucket has no locks:
    there the file names the run and is written anew every `RENEWED_SECONDS`; a file that stays as it is belongs to a
    dead run.

    Raises:
      UserError: another run has the workdir. Raised on every process. At the end of `with`, in the place of an error
        that ends it: the workdir was removed.
    """

    def __init__(self, workdir: str | os.PathLike[str], renewed_seconds: float = RENEWED_SECONDS) -> None:
        self._path, self._every = path_of(workdir) / FILE, renewed_seconds
        self._own = {"host": socket.gethostname(), "pid": os.getpid(), "run": uuid.uuid4().hex}
        self._file: TextIO | None = None
        self._ended = threading.Event()
        self._leased = False

    def __enter__(self) -> "WorkdirLock":
        holder = ""
        if jax.process_index() == 0:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            holder = self._lease() if is_remote(self._path) else self._lock()
        if _first_says(bool(holder)):
            raise UserError(
                f"{self._path.parent}: another run writes there{holder}; wait for its end, stop it, or set "
                "config.workdir to another folder"
            )
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._file is not None:
            with self._file:
                if isinstance(error, Exception):
                    self.check()  # says so if the whole folder is gone, whatever could not be written to it
        elif self._leased and self._read() == self._own:
            self._path.unlink()

    def check(self) -> None:
        """Raises a `UserError` if the workdir was removed or put elsewhere since; on a bucket it does nothing."""
        if self._file is None:
            return
        try:
            there = os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            there = False
        if not there:
            raise UserError(
                f"{self._path.parent}: was removed or put elsewhere while the run writes to it, with what it had "
                "written; put it back, or begin anew with the same command"
            )

    def _lock(self) -> str:
        """Takes the lock of a file system; " (who has it)" if another process has."""
        file = open(self._path, "a+")  # noqa: SIM115  # closed at the run's end, and by the system if it is killed
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            return _who(_parsed(file.read()))
        file.truncate(0)
        file.write(json.dumps(self._own))
        file.flush()
        self._file = file
        return ""

    def _lease(self) -> str:
        """As `_lock`, of a bucket."""
        found = self._read()
        if found and not self._is_dead(found):
            print(f"{self._path.parent}: was another run's{_who(found)}; looking whether it still lives", flush=True)
            time.sleep(2 * self._every)
            if (now := self._read()) and now != found:
                return _who(now)
        self._renew(0)
        time.sleep(min(2.0, self._every / 2))  # who began at the same instant has written by then
        if (now := self._read() or {}) | {"renewed": 0} != self._own | {"renewed": 0}:
            return _who(now)
        self._leased = True
        threading.Thread(target=self._keep, daemon=True, name="workdir-lease").start()
        return ""

    def _keep(self) -> None:
        count = 0
        while not self._ended.wait(self._every):
            count += 1
            try:
                self._renew(count)
            except Exception as error:  # whatever the packages of a bucket raise
                print(f"warning: {self._path}: cannot be renewed ({one_line(error)}); it is tried again", flush=True)

    def _renew(self, count: int) -> None:
        self._own = self._own | {"renewed": count}
        self._path.write_text(json.dumps(self._own))

    def _read(self) -> dict[str, Any] | None:
        return _parsed(self._path.read_text()) if self._path.exists() else None

    def _is_dead(self, found: dict[str, Any]) -> bool:
        """Whether it is known at once that a run has ended: it was a process of this host."""
        if found.get("host") != self._own["host"] or not isinstance(found.get("pid"), int):
            return False
        try:
            os.kill(found["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return found["pid"] == os.getpid()


def _parsed(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _who(found: dict[str, Any]) -> str:
    return f" (process {found['pid']} on {found['host']})" if {"pid", "host"} <= found.keys() else ""


def _first_says(value: bool) -> bool:
    """What the first process says, on every process."""
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value))) if jax.process_count() > 1 else value


def check_same_settings(config: Config) -> None:
    """Raises a `UserError` on every process if they were started with different settings or versions of JAX."""
    if jax.process_count() == 1:
        return
    own = np.frombuffer(json.dumps([jax.__version__, to_json(config)]).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.zeros(int(np.max(lengths)), np.uint8)
    padded[: len(own)] = own
    everyone = multihost_utils.process_allgather(padded)
    said = [json.loads(bytes(text[:length])) for text, length in zip(everyone, lengths, strict=True)]
    for number, (version, text) in enumerate(said):
        if version != said[0][0]:
            raise UserError(f"JAX: process {number} has {version} and process 0 {said[0][0]}; install one version")
        if text != said[0][1]:
            changed = differences(from_json(said[0][1]), from_json(text))
            listed = ", ".join(f"config.{key} is {new} and not {old}" for key, (old, new) in changed.items())
            raise UserError(f"process {number} was started with other settings than process 0: {listed}")
