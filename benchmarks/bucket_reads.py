"""Reading samples from a bucket, by the time that an answer takes: `python -m benchmarks.bucket_reads`.

A server on this machine stands for the bucket and answers every request so many milliseconds late. Made samples (an
image of 160 x 120 pixels, a caption) lie there as ArrayRecord and as a tar, and are read as training reads them:
fetched, made to features, packed. Beside the number of requests that the pipeline keeps open stands the one that it
would have without (the two threads of `data.threads`). Samples are counted once the first batch is there.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from navil_jax.config import Config, DataConfig, ImageConfig, ModelConfig, SourceConfig
from navil_jax.data import pipeline
from navil_jax.data.convert import convert
from navil_jax.data.run import OpenRun, open_run
from navil_jax.data.sources import open_source
from navil_jax.data.streams import sample_counts
from navil_jax.errors import UserError, report_user_errors

TESTS = Path(__file__).parents[1] / "tests"
SIZE = (160, 120)  # of an image


def write_tar(path: Path, samples: int) -> None:
    """Made pairs of an image and a caption."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as archive:
        for number in range(samples):
            pixels = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize(SIZE)
            encoded = io.BytesIO()
            pixels.save(encoded, "JPEG", quality=90)
            for ending, content in (("jpg", encoded.getvalue()), ("txt", f"Image number {number}.".encode())):
                info = tarfile.TarInfo(f"{number:06}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def serve(folder: Path, orders: Connection) -> None:
    """A bucket with the files of a folder, in a process of its own; says how it is reached, and takes its latencies."""
    sys.path.insert(0, str(TESTS))
    from bucket_server import BucketServer

    server = BucketServer()
    for path in filter(Path.is_file, folder.iterdir()):
        server.put(f"bucket/{path.name}", path.read_bytes())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    orders.send(server.environment)
    with contextlib.suppress(EOFError):
        while True:
            server.latency = orders.recv()


def opened(kind: str) -> OpenRun:
    name = "a.tar" if kind == "webdataset" else "data-00000-of-00001.array_record"
    entry = SourceConfig("made", kind=kind, path=f"gs://bucket/{name}")
    slots = {"visual_slots": 512, "text_slots": 512, "patch_slots": 2048}
    data = DataConfig(sources=(entry,), rows=1, packing_lookahead=2, **slots)
    images = ImageConfig(min_patches=16, max_patches=64)
    return open_run(Config(model=ModelConfig(special_token_ids=()), images=images, data=data), None)


def samples_a_second(run: OpenRun, reads: int, seconds: float) -> float:
    """With so many requests at a time."""
    with mock.patch.object(pipeline, "READS", reads):
        batches = iter(pipeline.make_dataset(run.config, run.sources, run.tokenizer))
    next(batches)
    first, began = sample_counts(batches)["made/good"], time.perf_counter()
    while time.perf_counter() - began < seconds:
        next(batches)
    read = sample_counts(batches)["made/good"] - first
    spent = time.perf_counter() - began
    batches.close()
    return read / spent


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--latencies", type=float, nargs="+", default=[20, 50, 100], help="milliseconds (default: 20 50 100)")
    add("--samples", type=int, default=1000, help="made ones (default: 1000)")
    add("--seconds", type=float, default=10.0, help="of reading, each (default: 10)")
    options = parser.parse_args(argv)
    if min(options.latencies) < 0 or options.samples < 1 or options.seconds <= 0:
        raise UserError("--latencies cannot be negative, --samples and --seconds must be positive")
    print(f"| kind | added latency | 2 requests at a time | {pipeline.READS} |\n| --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "data")
        folder.mkdir()
        os.environ["NAVIL_CACHE"] = str(Path(name, "cache"))
        write_tar(folder / "a.tar", options.samples)
        made = SourceConfig("made", kind="webdataset", path=str(folder / "a.tar"))
        convert(open_source(made, "train"), str(folder), 1)
        orders, theirs = multiprocessing.Pipe()
        server = multiprocessing.get_context("spawn").Process(target=serve, args=(folder, theirs), daemon=True)
        server.start()
        os.environ.update(orders.recv())
        for kind in ("array_record", "webdataset"):
            orders.send(0.0)
            run = opened(kind)
            for latency in options.latencies:
                orders.send(latency / 1e3)
                rates = (samples_a_second(run, reads, options.seconds) for reads in (0, pipeline.READS))
                cells = (f"{rate:,.0f} samples/s" for rate in rates)
                print(f"| {kind} | {latency:g} ms | {' | '.join(cells)} |", flush=True)
        server.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
