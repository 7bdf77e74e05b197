"""Engines: one job over many numbered tasks, in processes of this machine or as a pipeline of Apache Beam.

A job writes what it makes whole, under a name that says what it is, and finds it there when the same task is run again:
by a retry, by a copy of a slow worker, or by the next call after an interruption. So neither the engine nor the number
of its workers changes a byte.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import pickle
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

import fsspec

from navil_jax.config.ranges import Processes, read_as
from navil_jax.console import Progress
from navil_jax.data.pool import shared_object, start_pool, stop_pool
from navil_jax.errors import UserError
from navil_jax.paths import is_remote

RUNNERS = ("DirectRunner", "DataflowRunner", "FlinkRunner", "SparkRunner")
ATTEMPTS = 3  # of a task whose process dies
Result = TypeVar("Result", covariant=True)


class Job(Protocol[Result]):
    """What is done for each task; picklable. Its results are small, and the same whoever computes them."""

    def __call__(self, number: int) -> Result: ...

    def name(self, number: int) -> str:
        """What the task is about, for messages. Example: samples 0 to 9,999 of web"""
        ...


class Engine(Protocol):
    """Runs jobs."""

    def run(self, job: Job[Result], tasks: int, label: str) -> list[Result]:
        """The results of tasks 0..tasks-1, in this order.

        Args:
          label: of the progress.

        Raises:
          UserError: as the job does, the job cannot be copied, or its processes die.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Local:
    """So many processes of this machine; 0: this process alone."""

    workers: int = 0

    def run(self, job: Job[Result], tasks: int, label: str) -> list[Result]:
        with Progress(label, tasks, "tasks") as progress:
            results: dict[int, Result] = {}
            found = _in_processes(job, tasks, self.workers) if self.workers else ((n, job(n)) for n in range(tasks))
            for number, result in found:
                results[number] = result
                progress.update()
        return [results[number] for number in range(tasks)]


def _in_processes(job: Job[Result], tasks: int, workers: int) -> Iterator[tuple[int, Result]]:
    """(number, result) as they come. Tasks that a process died with are run again, one at a time."""
    _check_copies(job)
    left, suspects, deaths = deque(range(tasks)), deque[int](), Counter[int]()
    while left or suspects:
        pool = start_pool(min(workers, tasks), job, type(job).__module__)
        running: dict[Future[Result], int] = {}
        try:
            while left or suspects or running:
                queue, most = (suspects, 1) if suspects else (left, 2 * workers)
                while queue and len(running) < most:
                    number = queue.popleft()
                    running[pool.submit(_run_shared, number)] = number
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    yield running.pop(future), result
        except BrokenProcessPool as error:
            suspects.extendleft(sorted(running.values(), reverse=True))
            deaths.update(running.values())
            number, count = deaths.most_common(1)[0]
            if count >= ATTEMPTS:
                raise UserError(
                    f"a process died {count} times (out of memory, or a crash in a decoder) at {job.name(number)}; "
                    "fewer --workers need less memory, and the same command goes on from there"
                ) from error
        finally:
            stop_pool(pool)


def _run_shared(number: int) -> Any:
    """In a worker process."""
    job: Job[Any] = shared_object()
    return job(number)


def _check_copies(job: Job[object]) -> None:
    try:
        pickle.dumps(job)
    except Exception as error:  # pickle raises many types
        raise UserError(f"{job.name(0)}: cannot be copied into other processes ({error}); use --workers 0") from error


@dataclasses.dataclass(frozen=True)
class Beam:
    """A pipeline of Apache Beam.

    Attributes:
      runner: one of `RUNNERS`.
      options: of the pipeline, as Beam names them. Example: ("--project=p", "--region=us-central1")
      folder: where the job and its results are handed over; an address, unless all workers are on this machine.
    """

    runner: str
    options: tuple[str, ...]
    folder: str

    def run(self, job: Job[Result], tasks: int, label: str) -> list[Result]:
        try:
            import apache_beam as beam
            from apache_beam.options.pipeline_options import PipelineOptions
        except ModuleNotFoundError as error:
            raise UserError("--runner: needs Apache Beam: pip install 'apache-beam[gcp]>=2.77,<3'") from error
        _check_copies(job)
        given = PipelineOptions([f"--runner={self.runner}", *self.options])
        place = f"{self.folder}/{uuid.uuid4().hex}"
        with _handed_over(f"{place}.job", job), _removed(f"{place}.results"):
            with _failing_in_a_line(self.runner), beam.Pipeline(options=given) as pipeline:
                _ = (
                    pipeline
                    | "Number of tasks" >> beam.Create([tasks])
                    | "Tasks" >> beam.FlatMap(lambda count: range(count))
                    | "Share out" >> beam.Reshuffle()
                    | label >> beam.Map(functools.partial(_run_handed_over, f"{place}.job"))
                    | "Gather" >> beam.CombineGlobally(beam.combiners.ToListCombineFn())
                    | "Hand back" >> beam.Map(functools.partial(_write, f"{place}.results"))
                )
            results = dict(_read(f"{place}.results"))
        for number in range(tasks):
            if isinstance(results[number], _Refused):
                raise UserError(results[number].message)
        return [results[number] for number in range(tasks)]


@contextlib.contextmanager
def _failing_in_a_line(runner: str) -> Iterator[None]:
    """What a runner raises, which is of any type and long, as a `UserError`."""
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" \t\"'")]
        said = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else repr(error))
        raise UserError(
            f"{runner}: the pipeline failed: {said[:300]}; its log says more, and the same command goes on from there"
        ) from error


@dataclasses.dataclass(frozen=True)
class _Refused:
    """A `UserError` of a task, which no retry would mend."""

    message: str


def _run_handed_over(path: str, number: int) -> tuple[int, object]:
    """In a worker of Beam. Workers share the indices of files, unless another folder is named for them."""
    os.environ.setdefault("NAVIL_INDICES", path.rpartition("/")[0])
    try:
        return number, _job(path)(number)
    except UserError as error:
        return number, _Refused(str(error))


@functools.lru_cache(maxsize=1)
def _job(path: str) -> Job[object]:
    return _read(path)


@contextlib.contextmanager
def _handed_over(path: str, job: Job[object]) -> Iterator[None]:
    _write(path, job)
    with _removed(path):
        yield


@contextlib.contextmanager
def _removed(path: str) -> Iterator[None]:
    """Removes the file in the end, if there is one."""
    try:
        yield
    finally:
        system, bare = fsspec.core.url_to_fs(path)
        with contextlib.suppress(OSError):
            system.rm_file(bare)


def _write(path: str, content: object) -> None:
    with fsspec.open(path, "wb", auto_mkdir=True) as file:
        pickle.dump(content, file)


def _read(path: str) -> Any:
    with fsspec.open(path, "rb") as file:
        return pickle.load(file)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `engine_of`."""
    cores = os.cpu_count() or 1
    text = f"processes of this machine; 0: this one alone (default: {cores})"
    parser.add_argument("--workers", type=read_as(Processes), default=cores, metavar="N", help=text)
    parser.add_argument(
        "--runner",
        choices=RUNNERS,
        metavar="NAME",
        help=f"run as a pipeline of Apache Beam, by {', '.join(RUNNERS)}; its own options follow behind --, such as "
        "-- --region=us-central1",
    )


def split_options(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before and behind --. Example: ["--out", "a", "--", "--x=1"] -> ["--out", "a"], ["--x=1"]"""
    own = list(argv)
    if "--" not in own:
        return own, []
    place = own.index("--")
    return own[:place], own[place + 1 :]


def engine_of(options: argparse.Namespace, pipeline: Sequence[str], folder: str) -> Engine:
    """The engine that the command line asks for.

    Args:
      pipeline: options of Beam.
      folder: as of `Beam`.

    Raises:
      UserError: options of Beam without --runner, or a local folder for workers elsewhere.
    """
    if options.runner:
        if options.runner == "DataflowRunner" and not is_remote(folder):
            raise UserError(f"--runner: workers of Dataflow do not see {folder}; give a folder at an address (gs://)")
        return Beam(options.runner, tuple(pipeline), folder)
    if pipeline:
        raise UserError(f"{pipeline[0]}: what stands behind -- are options of Apache Beam; give --runner, too")
    return Local(options.workers)
