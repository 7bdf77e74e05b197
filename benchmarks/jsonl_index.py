"""Time and memory of the offset index: `python -m benchmarks.jsonl_index [--lines 10000000]`.

Writes a JSON-lines file of made conversations into a temporary folder, then in a process of its own builds the index,
opens it again, and reads lines at random; prints one table. The file is deleted at the end.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from navil_jax.data.formats.llava import Llava
from navil_jax.errors import UserError, report_user_errors

LINE_BYTES = 300  # of a made record, about that of a LLaVA conversation of two turns


def write_lines(path: Path, lines: int) -> None:
    """A file of records that differ in their first field only."""
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "x" * (LINE_BYTES - 140)}]
    tail = json.dumps({"conversations": turns})[1:].encode() + b"\n"
    with open(path, "wb") as file:
        for start in range(0, lines, 10_000):
            numbers = range(start, min(lines, start + 10_000))
            file.write(b"".join(b'{"id": "%012d", ' % number + tail for number in numbers))


def measure(path: Path, lines: int, reads: int, answer: Connection) -> None:
    """Sends (what, how much) of indexing and reading, measured in this process."""
    process, begin = psutil.Process(), _memory(psutil.Process())
    rows = [("memory after the imports", f"{begin:.0f} MB")]
    started = time.perf_counter()
    source = Llava(str(path))
    seconds = time.perf_counter() - started
    size = path.stat().st_size
    rows.append(
        ("building the index", f"{seconds:.1f} s, {size / seconds / 1e6:,.0f} MB/s, {lines / seconds:,.0f} lines/s")
    )
    rows.append(("size of the index", f"{os.path.getsize(str(path) + '.index') / 1e6:.0f} MB"))
    rows.append(("peak memory so far", f"{_peak():.0f} MB, {_peak() - begin:+.0f} MB"))
    started = time.perf_counter()
    source = Llava(str(path))
    rows.append(("opening it again", f"{1000 * (time.perf_counter() - started):.1f} ms"))
    chosen = random.Random(0).choices(range(lines), k=reads)
    started = time.perf_counter()
    for index in chosen:
        assert source[index].key.endswith(f":{index + 1}")
    seconds = time.perf_counter() - started
    rows.append(("random samples", f"{reads / seconds:,.0f} a second"))
    kinds = process.memory_info()
    rows.append(
        ("memory after them", f"{_memory(process):.0f} MB, of it {kinds.shared / 1e6:.0f} MB shared (mapped files)")
    )
    rows.append(("peak memory", f"{_peak():.0f} MB, {_peak() - begin:+.0f} MB"))
    answer.send(rows)


def _memory(process: psutil.Process) -> float:
    """Resident memory in MB."""
    return process.memory_info().rss / 1e6


def _peak() -> float:
    """Peak of resident memory in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000, help="of the made file (default: 1,000,000)")
    parser.add_argument("--reads", type=int, default=50_000, help="random samples that are read (default: 50,000)")
    options = parser.parse_args(argv)
    if options.lines < 1 or options.reads < 1:
        raise UserError("--lines and --reads must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.jsonl"
        write_lines(path, options.lines)
        rows = [("lines", f"{options.lines:,}"), ("file", f"{path.stat().st_size / 1e9:.2f} GB")]
        receive, send = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("spawn")
        child = context.Process(target=measure, args=(path, options.lines, options.reads, send))
        child.start()
        child.join()
        if child.exitcode:
            raise UserError(f"the measuring process ended with status {child.exitcode}")
        rows += receive.recv()
    print("| what | measured |\n| --- | --- |")
    for what, value in rows:
        print(f"| {what} | {value} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
