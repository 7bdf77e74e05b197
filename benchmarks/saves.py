"""What saving costs a run, and restoring: `python -m benchmarks.saves --config configs/demo.py`.

Trains in blocks that save every few steps, as a run does, in turn with blocks that save nothing, all in one process. So
whatever else the machine does falls on both. Prints the time of a step in both and what each save cost.

    python -m benchmarks.saves --config configs/navil_2b.py --config.model.decoder.depth=6 --state

trains nothing: it writes a checkpoint of the recipe's parameters in bfloat16 and reads it back, and prints the seconds
of each beside those of reading the same files; what the system kept of the files in memory is dropped before.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from benchmarks.step_time import Row, table
from navil_jax.config import Config
from navil_jax.config.flags import parse
from navil_jax.config.ranges import Count, read_as
from navil_jax.data.pipeline import make_dataset
from navil_jax.data.run import OpenRun, open_run
from navil_jax.errors import UserError, report_user_errors
from navil_jax.model import params as model_params
from navil_jax.model.params import flatten, unflatten
from navil_jax.sharding import make_mesh
from navil_jax.train.checkpoint import Checkpoints, Record
from navil_jax.train.host_memory import keep_freed_memory
from navil_jax.train.saving import Cost, Saving
from navil_jax.train.step import global_batch, initial_params, initial_state, make_train_step

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BITS = 2**24  # bytes that are repeated


def blocks(
    opened: OpenRun, folder: Path, count: int, saves: int, late: list[str]
) -> Iterator[tuple[float, float, list[Cost]]]:
    """Seconds of a step in a block that saves nothing and in the one after it that saves, and the costs of its saves.

    A block has `saves` times `config.checkpoint_every` steps; the last save comes that many steps before its end.

    Args:
      late: gets a line for each save that came later, as the one before was still being written.
    """
    config, mesh = opened.config, make_mesh(opened.config.mesh)
    iterator = iter(make_dataset(config, opened.sources, opened.tokenizer))
    state, train_step = initial_state(config, mesh, initial_params(config, mesh)), make_train_step(config, mesh)
    state, _ = jax.block_until_ready(train_step(state, global_batch(next(iterator), mesh)))  # compiles
    step, record = config.checkpoint_every, Record(config, opened.tokenizer.files(), {})
    with Checkpoints(folder, 2) as checkpoints:
        saving = Saving(config, checkpoints, late.append)
        for _ in range(count):
            seconds, costs = [], list[Cost | None]()
            for is_saving in (False, True):
                began = time.perf_counter()
                for _ in range(saves * config.checkpoint_every):
                    state, metrics = train_step(state, global_batch(next(iterator), mesh))
                    jax.block_until_ready(metrics)
                    if is_saving and saving.due(step):
                        costs.append(saving.finished())  # of the one before
                        waits = time.perf_counter()
                        checkpoints.save(step, state.params, record, state.optimizer, iterator, state.ema)
                        saving.began(step, time.perf_counter() - waits, (state.params, state.optimizer, state.ema))
                    step += 1
                seconds.append((time.perf_counter() - began) / (saves * config.checkpoint_every))
            checkpoints.wait()
            costs.append(saving.finished())
            yield seconds[0], seconds[1], [cost for cost in costs if cost]


def step_rows(opened: OpenRun, folder: Path, count: int, saves: int) -> list[Row]:
    """Measures as `blocks` does."""
    late: list[str] = []
    plain, saved, costs = zip(*blocks(opened, folder, count, saves, late), strict=True)
    more = [100 * (b / a - 1) for a, b in zip(plain, saved, strict=True)]
    all_costs = [cost for of_block in costs for cost in of_block]
    blocked, background = ([getattr(cost, name) for cost in all_costs] for name in ("blocked", "background"))
    return [
        ("a save every", f"{opened.config.checkpoint_every} steps, {all_costs[0].gib * 1024:,.1f} MiB each"),
        ("blocks of each kind", f"{count} of {saves * opened.config.checkpoint_every} steps"),
        ("a step without saves, median block", f"{1e3 * statistics.median(plain):,.1f} ms"),
        ("a step with them, median block", f"{1e3 * statistics.median(saved):,.1f} ms"),
        (
            "more time a step, by pair of blocks",
            f"{statistics.median(more):+.1f}% ({min(more):+.1f} to {max(more):+.1f})",
        ),
        ("saves", f"{len(all_costs)}, of which {len(late)} came later than due, behind the one before"),
        ("steps waited for a save", _spread(blocked)),
        ("written in the background", _spread(background)),
    ]


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def state_rows(config: Config, folder: Path) -> list[Row]:
    """Writes and reads parameters of a recipe's shape."""
    shapes = flatten(model_params.shapes(config.model))
    size = 2 * sum(leaf.size for leaf in shapes.values())
    with open("/proc/meminfo") as file:
        free = next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    if 3 * size > free:
        raise UserError(
            f"{size / 2**30:.1f} GiB of parameters, which are held up to three times, do not fit into the "
            f"{free / 2**30:.1f} GiB of memory that are free; lower config.model.decoder.depth and vision.depth"
        )
    bits = np.frombuffer(np.random.default_rng(0).bytes(BITS), BFLOAT16)
    params = unflatten({name: jax.device_put(np.resize(bits, leaf.shape)) for name, leaf in shapes.items()})
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params)
    with Checkpoints(folder, 1) as checkpoints:
        began = time.perf_counter()
        checkpoints.save(1, params, Record(dataclasses.replace(config, workdir=""), {"none": b""}, {}))
        waited = time.perf_counter() - began
        del params
        checkpoints.wait()
        wrote = time.perf_counter() - began
        plain = read_all(folder)
        forget(folder)
        began = time.perf_counter()
        jax.block_until_ready(checkpoints.restore_params(wanted, averaged=False))
        restored = time.perf_counter() - began
    rate = lambda seconds: f"{seconds:.1f} s, {size / seconds / 1e6:,.0f} MB/s"  # noqa: E731
    return [
        ("parameters", f"{size // 2:,} in bfloat16, {size / 2**30:.2f} GiB"),
        ("a save, steps wait", f"{waited:.1f} s"),
        ("a save, until it is complete", rate(wrote)),
        ("reading its files", rate(plain)),
        ("restoring", rate(restored)),
    ]


def forget(folder: Path) -> None:
    """Drops what the system keeps of files in memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(folder: Path) -> float:
    """Seconds of reading all files, one after the other, from the disk."""
    forget(folder)
    began = time.perf_counter()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(BITS):
                    pass
    return time.perf_counter() - began


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--blocks", type=read_as(Count), default=5, help="of each kind (default: 5)")
    add(
        "--saves",
        type=read_as(Count),
        default=2,
        help="in a block, one every config.checkpoint_every steps (default: 2)",
    )
    add("--state", action="store_true", help="write and read parameters of the recipe's shape in the place of training")
    add("--folder", type=Path, help="an existing one, on the disk that is measured (default: that of temporary files)")


@report_user_errors
def main(argv: list[str] | None = None) -> int:
    keep_freed_memory()
    config, options = parse(sys.argv[1:] if argv is None else argv, __doc__, _add_options)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.state:
            rows = state_rows(config, Path(folder))
        else:
            rows = step_rows(open_run(config, None), Path(folder), options.blocks, options.saves)
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(table([("recipe", options.config), ("devices", devices), *rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
