"""One line that says how far a long job is, how fast it goes and how long it will take."""

import sys
import time
from typing import TextIO

SECONDS, LOG_SECONDS = 1.0, 30.0  # between two updates, on a terminal and in a log


class Progress:
    """Writes `label: 1,200/48,000 samples, 310/s, 0:02:31 left` in place, to a log every half minute; not if quick."""

    def __init__(self, label: str, total: int, unit: str, done: int = 0, stream: TextIO | None = None) -> None:
        """Args: done: what was there before, of no weight for the rate."""
        self._label, self._total, self._unit, self._before = label, total, unit, done
        self._stream = stream or sys.stderr
        self._seconds, self._end = (SECONDS, "\r") if self._stream.isatty() else (LOG_SECONDS, "\n")
        self._began = self._shown = time.monotonic()

    def update(self, done: int) -> None:
        now = time.monotonic()
        if now - self._shown >= self._seconds:
            self._shown = now
            self._write(self._text(done, now), self._end)

    def finish(self, done: int) -> None:
        """Closes the line, if there was one."""
        if self._shown > self._began:
            rate = (done - self._before) / (time.monotonic() - self._began)
            self._write(f"{self._label}: {done:,} {self._unit}, {rate:,.0f}/s, done", "\n")

    def _text(self, done: int, now: float) -> str:
        rate = (done - self._before) / (now - self._began)
        seconds = int((self._total - done) / rate) if rate else 0
        left = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        return f"{self._label}: {done:,}/{self._total:,} {self._unit}, {rate:,.0f}/s, {left} left"

    def _write(self, text: str, end: str) -> None:
        self._stream.write(f"{text:<100}{end}")
        self._stream.flush()
