"""Samples/s of `data convert` and `data doctor` in one process, in several, and in Beam's DirectRunner, in turns.

    python -m benchmarks.engines                             # one round on a small set: that all write the same bytes
    python -m benchmarks.engines --samples 4000 --rounds 3   # rates; a machine of 2 cores that does nothing else

Every round runs every engine on the same made tars, so that what else the machine does meets all of them: compare the
ratios. What an engine takes to open the tars, whose indices are there, is its start: shown beside, and taken off. The
files that are written are compared, byte for byte. Where a job takes no longer than a start there is no rate: take
more samples. Apache Beam is left out where it is not installed.
"""

import argparse
import hashlib
import importlib.util
import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from navil_jax.config import Config, DataConfig, ModelConfig, SourceConfig, VisionConfig
from navil_jax.console import markdown_table, say
from navil_jax.data.convert import convert
from navil_jax.data.engine import Beam, Engine, Local
from navil_jax.data.formats import open_format
from navil_jax.data.formats.many_files import IndexFiles
from navil_jax.data.formats.webdataset import WebDataset
from navil_jax.data.inspect.checkup import Checkup
from navil_jax.data.inspect.examination import examine
from navil_jax.data.inspect.token_map import row_budgets
from navil_jax.data.run import complete, make_tokenizer
from navil_jax.data.sample import Source

TARS, SHARDS = 8, 16
WIDTH, HEIGHT = 512, 384
PAIRS = 500_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # for Beam's processes
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NAVIL_CACHE"] = f"{folder}/cache"
        for number in range(TARS):
            make_tar(Path(folder, f"{number}.tar"), number, options.samples // TARS)
        source = open_format("webdataset", f"{folder}/*.tar")
        paths = tuple(str(path) for path in sorted(Path(folder).glob("*.tar")))
        start = IndexFiles(WebDataset, paths)
        Local(options.workers).run(start, TARS, "start")  # imports what the processes of all rounds are forked from
        measure(source, start, engines(options.workers, folder), options.rounds, Path(folder))


def engines(workers: int, folder: str) -> dict[str, Engine]:
    found: dict[str, Engine] = {"one process": Local(), f"{workers} processes": Local(workers)}
    if importlib.util.find_spec("apache_beam"):
        given = (f"--direct_num_workers={workers}", "--direct_running_mode=multi_processing")
        found[f"Beam DirectRunner, {workers} processes"] = Beam("DirectRunner", given, f"{folder}/beam")
    return found


def measure(source: Source, start: IndexFiles, chosen: dict[str, Engine], rounds: int, folder: Path) -> None:
    checkup = make_checkup(source)
    jobs: dict[str, Callable[[Engine, Path], object]] = {
        "convert": lambda engine, out: convert(source, str(out), SHARDS, "", None, engine),
        "convert --shuffle": lambda engine, out: convert(source, str(out), SHARDS, "", 1, engine),
        "doctor": lambda engine, out: examine(checkup.config, [checkup], out, engine),
    }
    pipelines = {"convert": 1, "convert --shuffle": 2, "doctor": 1}  # how often an engine is started
    seconds: dict[tuple[str, str], list[float]] = {}
    contents: dict[str, set[str]] = {job: set() for job in jobs}
    for turn in range(rounds):
        for name, engine in chosen.items():
            own = timed(lambda engine=engine: engine.run(start, TARS, "start"))
            seconds.setdefault((name, "start"), []).append(own)
            for job, run in jobs.items():
                out = folder / f"{turn}-{name}-{job}"
                out.mkdir()
                cpu = time.process_time()
                took = timed(lambda run=run, engine=engine, out=out: run(engine, out))
                seconds.setdefault((name, job), []).append(took - pipelines[job] * own)
                if name == "one process":
                    seconds.setdefault(("CPU", job), []).append(time.process_time() - cpu)
                contents[job].add(content(out))
                say(f"round {turn + 1}", name, job, f"{took:.1f} s, {pipelines[job] * own:.1f} of them its start")
    rows = [row(name, list(jobs), seconds, len(source)) for name in chosen]
    print(markdown_table(rows))
    for job, found in contents.items():
        print(f"{job}: {'the same bytes from all engines and rounds' if len(found) == 1 else 'DIFFERENT BYTES'}")
    for job in jobs:
        rate = len(source) / statistics.median(seconds["CPU", job])
        print(
            f"{job}: {rate:,.0f} samples per second of CPU; {PAIRS:,} such pairs: {PAIRS / rate / 3600:,.0f} core-hours"
        )


def row(name: str, jobs: list[str], seconds: dict[tuple[str, str], list[float]], samples: int) -> dict[str, str]:
    """Samples/s, and the median over rounds of the ratio to one process in the same round."""
    cells = {"engine": name, "start, s": f"{statistics.median(seconds[name, 'start']):.1f}"}
    for job in jobs:
        if min(seconds[name, job]) <= 0:
            cells[f"{job}, samples/s"] = "as short as a start"
            continue
        ratios = [one / own for one, own in zip(seconds["one process", job], seconds[name, job], strict=True)]
        rate = samples / statistics.median(seconds[name, job])
        cells[f"{job}, samples/s"] = f"{rate:,.0f} ({statistics.median(ratios):.2f}x)"
    return cells


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def content(out: Path) -> str:
    """A hash of all files that are told apart by their content alone."""
    digest = hashlib.sha256()
    for path in sorted(
        path for path in out.rglob("*") if path.is_file() and path.name not in (".lock", "sources.json")
    ):
        digest.update(str(path.relative_to(out)).encode() + path.read_bytes())
    return digest.hexdigest()


def make_tar(path: Path, number: int, samples: int) -> None:
    """Photograph-like images of about 45 kB, each with a caption."""
    rng = np.random.default_rng(number)
    with tarfile.open(path, "w") as tar:
        for index in range(samples):
            coarse = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
            image = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=85)
            for ending, member in (("jpg", buffer.getvalue()), ("txt", f"a made image, number {index}".encode())):
                info = tarfile.TarInfo(f"{number}-{index:06}.{ending}")
                info.size = len(member)
                tar.addfile(info, io.BytesIO(member))


def make_checkup(source: Source) -> Checkup:
    config = Config(model=ModelConfig(vision=VisionConfig()), data=DataConfig(sources=(SourceConfig("tars"),)))
    tokenizer = make_tokenizer(config, [source])
    config = complete(config, tokenizer)
    return Checkup(source, "tars", config, tokenizer, row_budgets(config))


if __name__ == "__main__":
    main()
