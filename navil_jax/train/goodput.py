"""Goodput: what the wall time of a run went to, over all its restarts, kept in `<workdir>/goodput.jsonl`."""

import contextlib
import dataclasses
import datetime
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from navil_jax.console import table
from navil_jax.train.metrics import lines_of

FILE = "goodput.jsonl"
START, STEPS, DATA_WAIT, CHECKPOINT, EVALUATION = PHASES = ("start", "steps", "data_wait", "checkpoint", "evaluation")
# What a run's wall time is divided into -> what it is called. The first is the goodput.
PARTS = {
    "productive": "steps that count",
    "lost": "steps taken again after a restart",
    DATA_WAIT: "waiting for data",
    CHECKPOINT: "saving checkpoints, as far as steps waited",
    EVALUATION: "evaluation",
    START: "start-up and compilation, first time",
    "restart": "start-up and compilation, after restarts",
    "down": "between two attempts, or failing to start",
}


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One life of a run's processes, from its start to the last note of it."""

    began: float  # seconds since 1970
    first: int  # finished steps that it went on from
    last: int  # finished steps at its last note
    seconds: dict[str, float]  # by phase, one of PHASES


def read_attempts(folder: str | Path) -> list[Attempt]:
    """The attempts of the run in a local folder; none of a run that has taken no step or is older than goodput."""
    path = Path(folder) / FILE
    return attempts_of(path.read_bytes())[0] if path.exists() else []


def attempts_of(content: bytes) -> tuple[list[Attempt], int]:
    """The attempts in goodput.jsonl, and how many lines are none (`metrics.lines_of`)."""
    lines, damaged = lines_of(content, _is_attempt)
    return [Attempt(**line) for line in lines], damaged


def _is_attempt(line: dict[str, Any]) -> bool:
    numbers = [line.get(name) for name in ("began", "first", "last")]
    seconds = line.get("seconds")
    return (
        line.keys() == {field.name for field in dataclasses.fields(Attempt)}
        and isinstance(seconds, dict)
        and all(isinstance(number, (int, float)) for number in (*numbers, *seconds.values()))
    )


def divide(attempts: Sequence[Attempt]) -> dict[str, float]:
    """Seconds of wall time by the keys of `PARTS`, which are all from the first start to the last note.

    Steps of an attempt that a later one took again are lost, each with the attempt's mean step time. Time between two
    attempts is what their clocks say, and none if the clock was set back.

    Example: 10 steps of 1 s, killed, on from step 6 -> {"productive": 6 + ..., "lost": 4.0, ...}
    """
    spent = dict.fromkeys(PARTS, 0.0)
    for number, attempt in enumerate(attempts):
        later = [other.first for other in attempts[number + 1 :]]
        taken = attempt.last - attempt.first
        lost = min(taken, max(0, attempt.last - min(later, default=attempt.last)))
        steps = attempt.seconds.get(STEPS, 0.0)
        spent["lost"] += steps * lost / max(1, taken)
        spent["productive"] += steps * (taken - lost) / max(1, taken)
        spent["restart" if number else START] += attempt.seconds.get(START, 0.0)
        for phase in (DATA_WAIT, CHECKPOINT, EVALUATION):
            spent[phase] += attempt.seconds.get(phase, 0.0)
        if number:
            before = attempts[number - 1]
            spent["down"] += max(0.0, attempt.began - before.began - sum(before.seconds.values()))
    return spent


def shares(attempts: Sequence[Attempt]) -> dict[str, float]:
    """Share of the wall time by the keys of `PARTS`."""
    spent = divide(attempts)
    whole = sum(spent.values())
    return {part: seconds / whole if whole else 0.0 for part, seconds in spent.items()}


def goodput_table(attempts: Sequence[Attempt]) -> str:
    """A table of what the wall time went to."""
    spent, of_whole = divide(attempts), shares(attempts)
    rows = [(duration(spent[part]), f"{of_whole[part]:.1%}", text) for part, text in PARTS.items()]
    restarts = f"{len(attempts) - 1} restart{'' if len(attempts) == 2 else 's'}"
    rows.append((duration(sum(spent.values())), "100.0%", f"wall time, with {restarts}"))
    return table(("time", "share", "spent on"), rows)


def duration(seconds: float) -> str:
    """Example: 3723.4 -> 1:02:03;  0.32 -> 0.3 s"""
    return f"{seconds:.1f} s" if seconds < 60 else str(datetime.timedelta(seconds=round(seconds)))


class Goodput:
    """Measures this attempt of a run and keeps it beside the earlier ones.

    All until the end of the first step is start-up; then all is steps but for what a `with` of `phase` holds.

    Args:
      folder: of goodput.jsonl; None on all processes but the first, which write nothing.
      step: finished steps that the run goes on from.
      began: `time.monotonic()` at the start of the run.
    """

    def __init__(self, folder: Path | None, step: int, began: float) -> None:
        self._path = folder / FILE if folder else None
        self._earlier = read_attempts(folder) if folder else []
        self._began, self._first, self._last = time.time() - (time.monotonic() - began), step, step
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._phase, self._since = START, began

    @property
    def attempts(self) -> list[Attempt]:
        """Earlier ones and, once it has taken a step, this one."""
        taken = self._last > self._first
        return self._earlier + [Attempt(self._began, self._first, self._last, self._seconds)] * taken

    def taken(self, step: int) -> None:
        """Call it when a step has been taken; the first one ends the start-up."""
        self._last = step
        if self._phase == START:
            self._switch(STEPS)

    def compiled(self, seconds: float) -> None:
        """So much of what counts as steps so far was a compilation."""
        self._seconds[STEPS] -= seconds
        self._seconds[START] += seconds

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens in here is a phase of its own, but for the start-up."""
        before = self._phase
        self._switch(START if before == START else name)
        try:
            yield
        finally:
            self._switch(before)

    def write(self) -> dict[str, float]:
        """Brings the file up to date; gives the shares of the wall time so far."""
        self._switch(self._phase)
        attempts = self.attempts
        if self._path and attempts:
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(dataclasses.asdict(attempt)) + "\n" for attempt in attempts))
            temporary.replace(self._path)
        return shares(attempts)

    def _switch(self, phase: str) -> None:
        now = time.monotonic()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now
