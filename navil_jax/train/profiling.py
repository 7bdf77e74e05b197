"""What a run measures of itself on demand: xprof traces of chosen steps, and the memory of the devices."""

from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Traces some steps for xprof (`xprof --logdir FOLDER`, or TensorBoard's profile page).

    Args:
      steps: first and last step to trace, or () for none.
      folder: where traces go; None on processes that do not trace. One is enough, for all run the same program.
    """

    def __init__(self, steps: tuple[int, ...], folder: Path | None) -> None:
        self._steps, self._folder = steps, folder
        self._tracing = False

    def begin(self, step: int) -> None:
        """Call it before a step."""
        if self._steps and self._folder and step == self._steps[0]:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True

    def end(self, step: int, results: Any) -> None:
        """Call it with what the step gives; the last traced step is waited for."""
        if self._tracing and step == self._steps[1]:
            jax.block_until_ready(results)
            jax.profiler.stop_trace()
            self._tracing = False


def peak_memory() -> int | None:
    """Bytes in use at most so far on the fullest device of this process; None where that is not known (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [of_one["peak_bytes_in_use"] for of_one in stats if "peak_bytes_in_use" in of_one]
    return max(peaks, default=None)
