"""What a run measures of itself: xprof traces of chosen steps, compilations, and the memory of the devices."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"


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


@contextlib.contextmanager
def compilations(function: str) -> Iterator[list[float]]:
    """A list that grows by the seconds of each compilation of a jitted function of this name (or of reading its cache).

    Example: a function that is called with two shapes -> [1.2, 1.1]
    """
    found: list[float] = []

    def listen(event: str, duration_secs: float, **about: str | int) -> None:
        if event == _COMPILED and about.get("fun_name") == f"jit({function})":
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def peak_memory() -> int | None:
    """Bytes in use at most so far on the fullest device of this process; None where that is not known (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [of_one["peak_bytes_in_use"] for of_one in stats if "peak_bytes_in_use" in of_one]
    return max(peaks, default=None)
