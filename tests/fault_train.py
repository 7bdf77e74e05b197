"""Trains as `python -m navil_jax.train` does, and is hit by a fault: `fault_train.py "PROCESS FAULT STEP" FLAGS...`.

The fault comes before the step, in the process named. A checkpoint may take `WRITE_SECONDS`.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]
hit, sys.argv = sys.argv[1], [str(ROOT / "navil_jax" / "train" / "__main__.py"), *sys.argv[2:]]  # the command itself

from navil_jax.train import checkpoint  # noqa: E402
from navil_jax.train.__main__ import main  # noqa: E402
from navil_jax.train.checksums import IteratorHandler  # noqa: E402
from navil_jax.train.profiling import Profiler  # noqa: E402

WRITE_SECONDS = {"storage-hangs": 4.0, "storage-hangs-behind": 4.0}  # for a checkpoint, else 60


def hang(*_: object, **__: object) -> None:
    threading.Event().wait()


def storage_hangs() -> None:
    """Every later write of a checkpoint stands still where a step waits for it."""
    IteratorHandler.save = hang  # type: ignore[method-assign]


def storage_hangs_behind() -> None:
    """Every later write of a checkpoint stands still in the background."""
    original = os.rename

    def rename(source: os.PathLike[str], target: os.PathLike[str]) -> None:
        if "checkpoints" in os.fspath(target):
            hang()
        original(source, target)

    os.rename = os.replace = rename  # type: ignore[assignment]


def clock_jumps() -> None:
    """An hour back; three hours on while the next checkpoint is written."""
    original, save, jumps = time.time, IteratorHandler.save, [float("inf")]
    time.time = lambda: original() + (-3600 if time.monotonic() < jumps[0] else 7200)

    def save_and_jump(self: IteratorHandler, *rest: object, **more: object) -> None:
        save(self, *rest, **more)  # type: ignore[arg-type]
        jumps[0] = min(jumps[0], time.monotonic() + 0.02)

    IteratorHandler.save = save_and_jump  # type: ignore[method-assign, assignment]


def disk_is_full() -> None:
    """Nothing more can be written where the workdir is."""
    workdir = next(word.partition("=")[2] for word in sys.argv if word.startswith("--config.workdir="))
    size = 2**20
    with (Path(workdir) / "filler").open("wb", buffering=0) as file:
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


FAULTS: dict[str, Callable[[], None]] = {
    "storage-hangs": storage_hangs,
    "storage-hangs-behind": storage_hangs_behind,
    "clock-jumps": clock_jumps,
    "disk-full": disk_is_full,
}

if __name__ == "__main__":
    process, name, step_hit = hit.split()
    checkpoint.WRITE_SECONDS = WRITE_SECONDS.get(name, 60.0)
    begin = Profiler.begin

    def begin_or_be_hit(self: Profiler, step: int) -> None:
        if step == int(step_hit) and jax.process_index() == int(process):
            FAULTS[name]()
        time.sleep(0.05)  # so that a save ends within some steps
        begin(self, step)

    Profiler.begin = begin_or_be_hit
    sys.exit(main())
