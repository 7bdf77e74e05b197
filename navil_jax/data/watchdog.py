"""Watchdog: ends the process if a wait for data, or for storage, takes longer than its limit."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
LIMIT_SECONDS = 900.0  # without a batch: reading hangs, as a disk or a network can

_END = object()


class Watchdog:
    """Ends the process with status 1 if one wait takes longer than `seconds`, with a line that says what.

    A thread that hangs in a read or write can be neither interrupted nor joined, so nothing gentler ends the process
    for sure. What was saved stays, and the run can be started again. Use it with `with`; waits cost nothing.

    Args:
      stacks: print where every thread stands, too: what hangs may be code of the user's.
    """

    def __init__(self, seconds: float = LIMIT_SECONDS, stacks: bool = True) -> None:
        self._seconds, self._stacks = seconds, stacks
        self._deadline: float | None = None
        self._why = ""
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, daemon=True, name="stall-watch").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def begin(self, why: str) -> None:
        """From here until `end` it must not take longer than `seconds`; `why` says what does, in the last line."""
        self._why, self._deadline = why, time.monotonic() + self._seconds

    def end(self) -> None:
        self._deadline = None

    def hurry(self, seconds: float) -> None:
        """What has begun has so many seconds from here, if it had more."""
        if self._deadline is not None:
            self._deadline = min(self._deadline, time.monotonic() + seconds)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A batch is waited for in here."""
        self.begin(f"no data for {self._seconds:g} s, reading hangs")
        try:
            yield
        finally:
            self.end()

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The items, for each of which is waited as in `waiting`."""
        iterator = iter(items)
        while True:
            with self.waiting():
                item = next(iterator, _END)
            if item is _END:
                return
            yield item  # type: ignore[misc]  # no end

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 2)):
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                where = "; where every thread stands:" if self._stacks else ""
                print(f"error: {self._why}{where}", file=sys.stderr, flush=True)
                if self._stacks:
                    faulthandler.dump_traceback()
                os._exit(1)
