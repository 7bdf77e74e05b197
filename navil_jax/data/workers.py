"""Processes that make features, for machines where Python's lock keeps threads from using all cores.

Which process makes which sample follows no rule and changes nothing: samples are asked for by number, and answers are
used in the order of the asking.
"""

import concurrent.futures
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool

from navil_jax.data.features import FeatureSource, Skipped, Usable

_sources: Sequence[FeatureSource] = ()  # in a worker: those of its pool


class Workers:
    """A pool for all sources of a mixture. Its processes start with the first samples, and end with this one.

    Args:
      sources: are copied into every process.
      processes: how many.
    """

    def __init__(self, sources: Sequence[FeatureSource], processes: int) -> None:
        context = multiprocessing.get_context("forkserver")  # a fork of a process that runs JAX can hang
        context.set_forkserver_preload(_shared_modules())
        self._pool = concurrent.futures.ProcessPoolExecutor(processes, context, _start, (tuple(sources),))
        self._names = [source.name for source in sources]
        self._reading: set[tuple[int, int]] = set()
        self._lost: set[tuple[int, int]] = set()  # that were being read when a process died

    def read(self, number: int, index: int, place: int) -> Usable | Skipped:
        """Sample `index` of source `number`, at `place` of that source's endless stream.

        Raises:
          RuntimeError: a process died, or what `FeatureSource` raises.
        """
        self._reading.add((number, index))
        try:
            return self._pool.submit(_read, number, index, place).result()
        except BrokenProcessPool as error:
            self._lost.add((number, index))  # stays, as threads beside this one say the same of theirs
            samples = ", ".join(f"{self._names[n]}/{i}" for n, i in sorted(self._reading | self._lost))
            raise RuntimeError(
                f"a worker process died (killed, out of memory, or a crash in a decoder) with one of: {samples}"
            ) from error
        finally:
            self._reading.discard((number, index))


def _shared_modules() -> list[str]:
    """What all workers need, imported once: also what the main module imports, as each of them runs that again."""
    main = getattr(sys.modules["__main__"], "__spec__", None)
    own = [main.name] if main is not None and main.name.startswith("navil_jax.") else []
    return [*own, __name__]


def _start(sources: Sequence[FeatureSource]) -> None:
    global _sources
    _sources = sources
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the trainer decides when to end
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _read(number: int, index: int, place: int) -> Usable | Skipped:
    return _sources[number].read(index, place)
