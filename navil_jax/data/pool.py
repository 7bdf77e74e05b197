"""Pool: worker processes that share one object, ignore Ctrl-C and end with the process that started them."""

import concurrent.futures
import multiprocessing
import os
import signal
import sys
import threading
from typing import Any

_shared: Any = None  # in a worker: the object of its pool


def start_pool(processes: int, shared: Any, module: str) -> concurrent.futures.ProcessPoolExecutor:
    """A pool whose workers hold `shared`, which is copied once into each; they start with the first task.

    Args:
      processes: how many.
      shared: anything that can be pickled; what runs in a worker gets it by `shared_object`.
      module: name of the module of the tasks, imported once for all workers, as is what the main module imports,
        which each of them would run again.
    """
    context = multiprocessing.get_context("forkserver")  # a fork of a process that runs JAX can hang
    main = getattr(sys.modules["__main__"], "__spec__", None)
    own = [main.name] if main is not None and main.name.startswith("navil_jax.") else []
    context.set_forkserver_preload([*own, module])
    return concurrent.futures.ProcessPoolExecutor(processes, context, _start, (shared,))


def stop_pool(pool: concurrent.futures.ProcessPoolExecutor) -> None:
    """Ends the processes of a pool, whatever they are at."""
    processes = list((pool._processes or {}).values())  # terminate_workers() does this from Python 3.14 on
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


def shared_object() -> Any:
    """In a worker: what its pool was started with."""
    return _shared


def _start(shared: Any) -> None:
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the command decides when to end
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
