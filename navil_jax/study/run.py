"""Makes the runs of a study, several at a time, and collects what they measured.

Every run is a process of the real trainer with its own workdir. A finished run is not made again, and one that was cut
off goes on from its newest checkpoint.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from navil_jax.config import SPECIAL_TOKENS, Config, ModelConfig
from navil_jax.config.plain import to_json
from navil_jax.data.run import make_tokenizer
from navil_jax.data.sources import open_source
from navil_jax.errors import UserError
from navil_jax.model import params as model_params
from navil_jax.study.grid import Run, Study, language_config, run_config
from navil_jax.study.results import Row, read_results, write_results
from navil_jax.study.text import write_corpus
from navil_jax.train.metrics import read_log

POLL = 0.2  # seconds
SHOWN_LINES = 5  # of the log of a run that failed


def parse_shard(text: str) -> tuple[int, int]:
    """ "1/4" -> (1, 4). Raises `UserError` for anything that is not I/N with 0 <= I < N."""
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or not int(parts[0]) < int(parts[1]):
        raise UserError(f"--shard: {text!r} is not I/N with I from 0 to N-1, such as 0/4")
    return int(parts[0]), int(parts[1])


@dataclasses.dataclass(frozen=True)
class Job:
    """A process to start."""

    name: str
    config: Config
    language: str = ""  # folder of a language model to start from


def run_study(study: Study, folder: Path, jobs: int, shard: tuple[int, int] = (0, 1)) -> int:
    """Makes all runs of a shard; returns the exit status: 0, or 1 if some failed.

    Args:
      folder: of the study; the results are in `results.jsonl` there, or in `results-I-of-N.jsonl` of a shard.
      jobs: runs at a time.
      shard: (i, n): only every n-th run, from run i.

    Several shards may work in one folder at the same time; on several machines, if the file system has locks that all
    of them see (NFS has).

    Raises:
      UserError: the file system has no locks.
      KeyboardInterrupt: after SIGINT or SIGTERM; the runs in flight have saved where they are.
    """
    index, count = shard
    results = folder / ("results.jsonl" if count == 1 else f"results-{index}-of-{count}.jsonl")
    runs = study.runs[index::count]
    rows = read_results(results) if results.exists() else []
    missing = [run for run in runs if not _is_finished(study, run, rows)]
    print(f"{study.name}: {len(runs)} runs, {len(runs) - len(missing)} finished; results in {results}", flush=True)
    if not missing:
        return 0
    languages = [name for name in study.llms if any(run.initialised and run.llm == name for run in missing)]
    texts = [_language_job(study, name, folder) for name in languages if name not in study.language_models]
    with _sigterm_interrupts(), _alone(folder):
        _prepare(study, folder)
        if _work([job for job in texts if not _is_trained(job.config)], jobs, folder, _text_loss):
            return 1
    made = {run.name: run for run in missing}

    def collect(job: Job) -> str:
        found = run_rows(study, made[job.name], folder)
        rows.extend(found)
        write_results(results, rows)
        return f"loss {found[-1].loss:.4f} after {found[-1].samples:,.0f} samples"

    return 1 if _work([_run_job(study, run, folder) for run in missing], jobs, folder, collect) else 0


def _is_finished(study: Study, run: Run, rows: Sequence[Row]) -> bool:
    return any(row.run == run.name and row.step == study.base.steps for row in rows)


def _is_trained(config: Config) -> bool:
    log = read_log(Path(config.workdir) / "metrics.jsonl")
    return bool(log) and log[-1]["step"] == config.steps and any(key.startswith("eval/") for key in log[-1])


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process makes what all shards of a study share.

    The jobs that are started meanwhile hold the lock too, so that it ends with them if this process is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "shared.lock").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting: another process makes the text, the tokenizer and the language models", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(f"{folder}: its file system has no locks ({error}); give another folder") from error
        yield


def _prepare(study: Study, folder: Path) -> None:
    """The text, and one tokenizer for all runs, trained on the text and the captions."""
    sources = study.base.data.sources
    if study.language is not None:
        write_corpus(folder / "text", study.text_bytes)
        sources = (*language_config(study, next(iter(study.llms)), folder).data.sources, *sources)
    if study.base.data.tokenizer or (folder / "tokenizer").exists():
        return
    config = dataclasses.replace(study.base, data=dataclasses.replace(study.base.data, sources=sources))
    partial = folder / "tokenizer.partial"
    make_tokenizer(config, [open_source(source, "train") for source in sources]).save(partial)
    partial.rename(folder / "tokenizer")


def _language_job(study: Study, llm: str, folder: Path) -> Job:
    return Job(f"language-{llm}", language_config(study, llm, folder))


def _run_job(study: Study, run: Run, folder: Path) -> Job:
    own = str(folder / "language" / run.llm)
    language = study.language_models.get(run.llm, own) if run.initialised else ""
    return Job(run.name, run_config(study, run, folder), language)


def _text_loss(job: Job) -> str:
    last = read_log(Path(job.config.workdir) / "metrics.jsonl")[-1]
    return f"held-out text loss {last['eval/text/loss']:.4f}"


def _work(jobs: Sequence[Job], at_a_time: int, folder: Path, finished: Callable[[Job], str]) -> int:
    """Runs jobs, some at a time, and tells of each; how many failed.

    Args:
      finished: is called with every job that ended well; what it returns is shown.
    """
    waiting = list(jobs)
    running: dict[subprocess.Popen, tuple[Job, float]] = {}
    failed, done, began = 0, 0, time.monotonic()
    with _sigterm_interrupts():
        try:
            while waiting or running:
                while waiting and len(running) < at_a_time:
                    job = waiting.pop(0)
                    running[_start(job, folder, at_a_time)] = job, time.monotonic()
                time.sleep(POLL)
                for process in [process for process in running if process.poll() is not None]:
                    job, started = running.pop(process)
                    done += 1
                    if process.returncode:
                        failed += 1
                        said = f"FAILED with status {process.returncode}:\n{_end_of(_log(folder, job))}"
                    else:
                        said = finished(job)
                    seconds = time.monotonic() - began
                    left = datetime.timedelta(seconds=round(seconds / done * (len(jobs) - done)))
                    took = time.monotonic() - started
                    print(f"{done}/{len(jobs)} {job.name}: {said}; {took:.0f} s, ETA {left}", flush=True)
        finally:
            for process in running:
                process.terminate()  # the trainer saves where it is
            for process in running:
                process.wait()
    return failed


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _start(job: Job, folder: Path, at_a_time: int) -> subprocess.Popen:
    """Starts the process of a job; compiled programs are kept for runs of the same shapes."""
    file = folder / "jobs" / f"{job.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"config": to_json(job.config), "language": job.language}))
    _log(folder, job).parent.mkdir(exist_ok=True)
    cores = max(1, (os.cpu_count() or 1) // at_a_time)
    settings = {
        "NPROC": str(cores),  # threads of XLA on a CPU: runs side by side shall not wait for each other
        "JAX_COMPILATION_CACHE_DIR": str((folder / "compiled").resolve()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with _log(folder, job).open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "navil_jax.study.job", str(file)],
            env=settings | os.environ,
            stdout=log,
            stderr=subprocess.STDOUT,
            close_fds=False,  # passes on the lock of `_alone`, the only inheritable file
            start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the others
        )


def _log(folder: Path, job: Job) -> Path:
    return folder / "logs" / f"{job.name}.txt"


def _end_of(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
    return "\n".join(f"    {line}" for line in lines)


def run_rows(study: Study, run: Run, folder: Path) -> list[Row]:
    """One row per evaluation of a finished run.

    Raises:
      UserError: the log holds no evaluation of the study's sources.
    """
    config = run_config(study, run, folder)
    path = Path(config.workdir) / "metrics.jsonl"
    names = study.metric or tuple(source.name for source in config.data.sources)
    rows = []
    seen: dict[str, float] = {}
    depth, width = run.encoder
    for line in read_log(path):
        seen |= {key: line[key] for key in ("samples_seen", "tokens_seen") if key in line}
        losses = {name: line[f"eval/{name}/loss"] for name in names if f"eval/{name}/loss" in line}
        if not losses:
            continue
        row = Row(
            llm=llm_parameters(config),
            run=run.name,
            study=study.name,
            encoder=12.0 * depth * width**2,
            depth=depth,
            width=width,
            ffn_experts=run.ffn_experts,
            attention_experts=run.attention_experts,
            initialised=run.initialised,
            data_share=run.data_share,
            seed=run.seed,
            step=line["step"],
            samples=seen["samples_seen"],
            tokens=seen["tokens_seen"],
            loss=sum(losses.values()) / len(losses),
            losses=losses,
        )
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no held-out loss of {', '.join(names)}")
    return rows


def llm_parameters(config: Config) -> float:
    """Parameters of the decoder without visual experts and special tokens' embeddings."""
    shapes = model_params.flatten(model_params.shapes(_any_ids(config)))
    kept = (x for name, x in shapes.items() if name.startswith("decoder/") and "/visual/" not in name)
    special = sum(x.size for name, x in shapes.items() if name.startswith("decoder/special_embed/"))
    return float(sum(x.size for x in kept) - special)


def _any_ids(config: Config) -> ModelConfig:
    """The model with special tokens, which a recipe leaves to the tokenizer; only their number matters."""
    return dataclasses.replace(config.model, special_token_ids=tuple(range(len(SPECIAL_TOKENS))))
