"""Trains as `python -m navil_jax.train` does, but the process dies before a step: `kill_at_step.py STEP FLAGS...`."""

import os
import signal
import sys

from navil_jax.train.__main__ import main
from navil_jax.train.profiling import Profiler

if __name__ == "__main__":
    fatal, begin = int(sys.argv[1]), Profiler.begin

    def begin_or_die(self: Profiler, step: int) -> None:
        if step == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        begin(self, step)

    Profiler.begin = begin_or_die
    sys.exit(main(sys.argv[2:]))
