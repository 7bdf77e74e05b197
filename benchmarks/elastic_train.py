"""Trains as `python -m navil_jax.train` does, notes the samples of every row, and may be hit by a signal at a step.

    elastic_train.py FOLDER "PROCESS SIGNAL STEP" FLAGS...

Each process appends a line for every step to FOLDER/<process>.jsonl. The process named gets the signal before the
step, or cannot read its disk where the signal is 0; "" for none.
"""

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from navil_jax.batch import Batch
from navil_jax.train.__main__ import main
from navil_jax.train.profiling import Profiler
from navil_jax.train.recorder import Recorder


def rows_of(batch: Batch) -> list[list[tuple[int, int]]]:
    """(source, sample) of every segment, for each row."""
    rows = []
    for segments, sources, samples in zip(batch.segment_ids, batch.source_ids, batch.sample_ids, strict=True):
        firsts = (int(np.argmax(segments == segment)) for segment in range(1, segments.max() + 1))
        rows.append([(int(sources[first]), int(samples[first])) for first in firsts])
    return rows


if __name__ == "__main__":
    folder, hit = Path(sys.argv[1]), [int(word) for word in sys.argv[2].split()]
    add, begin = Recorder.add, Profiler.begin

    def add_and_note(self: Recorder, step: int, metrics: Any, batch: Batch, *rest: Any) -> None:
        with (folder / f"{jax.process_index()}.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "rows": rows_of(batch)}) + "\n")
        add(self, step, metrics, batch, *rest)

    def begin_or_be_hit(self: Profiler, step: int) -> None:
        if hit and hit[0] == jax.process_index() and hit[2] == step:
            if not hit[1]:
                raise OSError(errno.EIO, os.strerror(errno.EIO), "disk")
            os.kill(os.getpid(), hit[1])
        begin(self, step)

    Recorder.add, Profiler.begin = add_and_note, begin_or_be_hit
    sys.exit(main(sys.argv[3:]))
