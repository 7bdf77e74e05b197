"""Processes that make features, for machines where Python's lock keeps threads from using all cores.

Which process makes which sample follows no rule and changes nothing: samples are asked for by number, and answers are
used in the order of the asking.
"""

from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from navil_jax.data.features import FeatureSource, Skipped, Usable
from navil_jax.data.pool import shared_object, start_pool
from navil_jax.data.sample import Sample


class Workers:
    """A pool for all sources of a mixture. Its processes start with the first samples, and end with this one.

    Args:
      sources: are copied into every process.
      processes: how many.
    """

    def __init__(self, sources: Sequence[FeatureSource], processes: int) -> None:
        self._pool = start_pool(processes, tuple(sources), __name__)
        self._names = [source.name for source in sources]
        self._reading: set[tuple[int, int]] = set()
        self._lost: set[tuple[int, int]] = set()  # that were being read when a process died

    def read(self, number: int, index: int, place: int) -> Usable | Skipped:
        """Sample `index` of source `number`, at `place` of that source's endless stream.

        Raises:
          RuntimeError: a process died, or what `FeatureSource` raises.
        """
        return self._ask(number, index, _read, place)

    def make(self, number: int, sample: Sample, index: int, place: int) -> Usable | Skipped:
        """The same of a sample that was fetched in this process."""
        return self._ask(number, index, _make, place, sample)

    def _ask(self, number: int, index: int, task: Callable[..., Usable | Skipped], *given: Any) -> Usable | Skipped:
        self._reading.add((number, index))
        try:
            return self._pool.submit(task, number, index, *given).result()
        except BrokenProcessPool as error:
            self._lost.add((number, index))  # stays, as threads beside this one say the same of theirs
            samples = ", ".join(f"{self._names[n]}/{i}" for n, i in sorted(self._reading | self._lost))
            raise RuntimeError(
                f"a worker process died (killed, out of memory, or a crash in a decoder) with one of: {samples}"
            ) from error
        finally:
            self._reading.discard((number, index))


def _read(number: int, index: int, place: int) -> Usable | Skipped:
    sources: Sequence[FeatureSource] = shared_object()
    return sources[number].read(index, place)


def _make(number: int, index: int, place: int, sample: Sample) -> Usable | Skipped:
    sources: Sequence[FeatureSource] = shared_object()
    return sources[number].make(sample, index, place)
