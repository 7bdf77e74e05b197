"""Saving: when a run writes a checkpoint, and what that costs its steps."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from navil_jax.config import Config
from navil_jax.errors import UserError
from navil_jax.train.checkpoint import Checkpoints
from navil_jax.train.coordinator import agreed
from navil_jax.train.keep import Keep

PATIENCE_SECONDS = 1.0  # that a save waits for an earlier one; if that takes longer, it comes later
SAVE, LATER, NO = "save", "later", "no"


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a checkpoint cost."""

    step: int
    blocked: float  # seconds that the steps waited, mostly for the copy from the devices
    background: float  # seconds from then on until it was complete
    gib: float  # of arrays

    def __str__(self) -> str:
        size = f"{self.gib:.2f} GiB" if self.gib >= 0.1 else f"{self.gib * 1024:.1f} MiB"
        return (
            f"checkpoint of step {self.step}: {size}, steps waited {self.blocked:.2f} s, then {self.background:.1f} s "
            "in the background"
        )

    def values(self) -> dict[str, float]:
        """For the log."""
        return {
            "checkpoint/blocked_seconds": self.blocked,
            "checkpoint/background_seconds": self.background,
            "checkpoint/gib": self.gib,
        }


def keep(config: Config) -> Keep:
    """Which checkpoints a run keeps."""
    best = config.keep_best_checkpoints, config.best_metric, config.best_mode
    return Keep(config.keep_checkpoints, config.keep_checkpoints_every, *best)


class Saving:
    """Decides when a run saves, alike on all processes, and measures it.

    A save is due every `checkpoint_every` steps and after `checkpoint_minutes`, which is looked at every `log_every`
    steps. It never waits for an earlier one longer than `PATIENCE_SECONDS`: then it comes when that is complete.

    Args:
      say: prints a line.
    """

    def __init__(self, config: Config, checkpoints: Checkpoints, say: Callable[[str], None] = print) -> None:
        self._config, self._checkpoints, self._say = config, checkpoints, say
        self._saved = time.monotonic()  # the last time
        self._late = False
        self._running: Cost | None = None

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this step."""
        regular = step % self._config.checkpoint_every == 0
        by_time = self._config.checkpoint_minutes > 0 and step % self._config.log_every == 0
        if not (regular or by_time or self._late):
            return False
        said = agreed(f"navil/save/{step}", lambda: self._decide(regular))
        if said == LATER and not self._late:
            self._say(f"step {step}: the checkpoint before is still being written, so this one comes later")
        self._late = said == LATER
        return said == SAVE

    def metric(
        self, step: int, evaluated: Mapping[str, float] | None, last: Mapping[str, float]
    ) -> dict[str, float] | None:
        """What the best checkpoints are chosen by, of the step that is saved; None if it was not measured there.

        Args:
          evaluated: what the evaluators measured after this step, on the first process; None: they did not run.
          last: scalars of this step.

        Raises:
          UserError: on the first process: nothing is called `best_metric`.
        """
        name = self._config.best_metric
        of_evaluators = name.startswith("eval/")
        if not name or (of_evaluators and evaluated is None):
            return None
        return {name: float(agreed(f"navil/best/{step}", lambda: _value(name, evaluated if of_evaluators else last)))}

    def _decide(self, regular: bool) -> str:
        minutes = (time.monotonic() - self._saved) / 60
        timed = self._config.checkpoint_minutes and minutes >= self._config.checkpoint_minutes
        if not (regular or timed or self._late):
            return NO
        patient_until = time.monotonic() + (0 if self._late else PATIENCE_SECONDS)
        while self._checkpoints.is_saving and time.monotonic() < patient_until:
            time.sleep(0.01)
        return LATER if self._checkpoints.is_saving else SAVE

    def began(self, step: int, seconds: float, arrays: Any) -> None:
        """Call it when a save has begun: steps waited so many seconds for it. `arrays` are those that are written."""
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        self._saved = time.monotonic()
        self._running = Cost(step, seconds, 0.0, size / 2**30)

    def finished(self) -> Cost | None:
        """The cost of a checkpoint, once, when it is complete. Raises what went wrong in the background."""
        if self._running is None or self._checkpoints.is_saving:
            return None
        background = max(0.0, self._checkpoints.completed - self._saved)
        self._checkpoints.wait()
        done, self._running = dataclasses.replace(self._running, background=background), None
        return done


def _value(name: str, known: Mapping[str, float] | None) -> str:
    known = known or {}
    if name not in known:
        raise UserError(f"config.best_metric: nothing is called {name!r}; there are {', '.join(sorted(known))}")
    return repr(float(known[name]))
