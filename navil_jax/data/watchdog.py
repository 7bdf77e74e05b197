"""Watchdog: dumps every thread's stack and ends the process if data do not come within a time."""

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
    """Ends the process with status 1 and every thread's stack if one wait takes longer than `seconds`.

    A thread that hangs in a read can be neither interrupted nor joined, so nothing gentler ends the process for sure.
    What was saved stays, and the run can be started again. Use it with `with`; waits cost nothing.
    """

    def __init__(self, seconds: float = LIMIT_SECONDS) -> None:
        self._seconds = seconds
        self._deadline: float | None = None
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, daemon=True, name="stall-watch").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What is inside must not take longer than `seconds`."""
        self._deadline = time.monotonic() + self._seconds
        try:
            yield
        finally:
            self._deadline = None

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
                why = f"error: no data for {self._seconds:g} s, reading hangs; where every thread stands:"
                print(why, file=sys.stderr, flush=True)
                faulthandler.dump_traceback()
                os._exit(1)
