"""Trains NaViL: `python -m navil_jax.train --config configs/x.py --config.workdir=runs/x`.

The same command goes on where a run was interrupted, and ends with the same parameters, optimizer state and losses, bit
for bit, as a run without interruption. `<workdir>` then holds

    checkpoints/<step>/   parameters, optimizer state, place in the data, config, tokenizer
    metrics.jsonl         a line per training step and per evaluation; also as TensorBoard events in tensorboard/
    timings.jsonl         speed, peak memory, and the share of time spent waiting for data
    profile/              xprof traces, if asked for by config.profile_steps
    quarantine.jsonl      samples that cannot be used, and why; no later run with this workdir reads them
    evaluation.md         accuracies on held-out samples beside baselines
    loss.png answers.png  the loss curve; held-out images with the model's answers at the last evaluation
"""

import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
from etils import epath
from jax.experimental import multihost_utils

from navil_jax.config import Config
from navil_jax.config.flags import parse
from navil_jax.data.pipeline import make_dataset, sample_counts
from navil_jax.data.quarantine import Quarantine
from navil_jax.data.run_tokenizer import complete, new_tokenizer
from navil_jax.data.sources import expand_sources, fingerprints, open_source
from navil_jax.data.tokenizers.base import Tokenizer
from navil_jax.data.watchdog import Watchdog
from navil_jax.errors import UserError, report_user_errors
from navil_jax.model.params import Params, flatten
from navil_jax.paths import RunFiles, path_of
from navil_jax.sharding import make_mesh, mesh_axes, named, start_hosts, use_rules
from navil_jax.train.checkpoint import Checkpoints, Record, check_continues, find_checkpoints, with_model_of
from navil_jax.train.evaluators import Evaluator, table
from navil_jax.train.host_memory import keep_freed_memory
from navil_jax.train.metrics import MetricsLog, plot_answers, plot_losses, read_log
from navil_jax.train.optimizer import split_trainable
from navil_jax.train.profiling import Profiler
from navil_jax.train.recorder import Recorder
from navil_jax.train.start import first_params
from navil_jax.train.step import (
    Running,
    TrainState,
    abstract_state,
    global_batch,
    initial_state,
    make_train_step,
)

FAIL_AT_STEP = "NAVIL_FAIL_AT_STEP"  # environment variable: the process kills itself before this step, to test resuming
SHOWN_ANSWERS = 16


@report_user_errors
def main(argv: list[str] | None = None) -> int:
    keep_freed_memory()
    start_hosts()
    config, _ = parse(sys.argv[1:] if argv is None else argv, __doc__)
    return run(config)


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last."""

    config: Config
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    origin: dict[str, Any]  # what the first parameters were converted from
    fingerprints: dict[str, str]  # of the training data
    files: RunFiles
    checkpoints: Checkpoints
    iterator: grain.DatasetIterator


def run(config: Config) -> int:
    """Trains until the run has its length, or until a signal; returns the exit status (128 + signal if stopped)."""
    if not config.workdir:
        raise UserError("config.workdir: no folder for the run is given, use --config.workdir=FOLDER")
    workdir = path_of(config.workdir)
    use_rules(config.mesh.rules)
    mesh = make_mesh(config.mesh)
    _check_rows(config, mesh)
    with (
        Checkpoints(workdir / "checkpoints", config.keep_checkpoints) as checkpoints,
        RunFiles(workdir) as files,
        _signals() as stopped,
        Watchdog() as watchdog,
    ):
        earlier = _earlier_record(config, checkpoints)
        config = expand_sources(with_model_of(config, earlier.config) if config.init_model else config)
        tokenizer = (
            Tokenizer.from_files(earlier.tokenizer) if earlier else new_tokenizer(config, _tokenizer_folder(config))
        )
        config = complete(config, tokenizer)
        sources = [open_source(source, "train") for source in config.data.sources]
        place = jax.process_index(), jax.process_count()
        quarantine = Quarantine(files.local, config.data.quarantine, jax.process_index())
        iterator = iter(make_dataset(config, sources, tokenizer, *place, quarantine))
        origin = earlier.origin if earlier else {}
        this = Run(config, mesh, tokenizer, origin, fingerprints(sources), files, checkpoints, iterator)
        status = _train(this, *_start(this), stopped, watchdog)
    multihost_utils.sync_global_devices("end")  # the first process still writes reports when the others are done
    return status


def _train(
    run: Run, state: TrainState, metrics: dict[str, float], stopped: Callable[[int], int], watchdog: Watchdog
) -> int:
    """The steps; `metrics` are those of the step that the run goes on from."""
    config, mesh, step = run.config, run.mesh, int(state.step)
    log = MetricsLog(run.files.local, step) if jax.process_index() == 0 else None
    recorder = Recorder(config, log, flatten(state.trainable), metrics)
    evaluator = Evaluator(config, mesh, run.tokenizer)
    profiler = Profiler(config.profile_steps, run.files.local / "profile" if log else None)
    train_step = make_train_step(config, mesh)
    _announce(config, mesh, state)
    ended = recorder.ended(step)
    while not ended:
        step += 1
        _fail_if_asked(step)
        began = time.monotonic()
        with watchdog.waiting():
            batch = next(run.iterator)
        waited = time.monotonic() - began
        profiler.begin(step)
        state, metrics = train_step(state, global_batch(batch, mesh))
        profiler.end(step, metrics)
        recorder.add(step, metrics, batch, waited, sample_counts(run.iterator))
        ended = recorder.ended(step)
        if config.eval_every and step % config.eval_every == 0 and not ended:
            recorder.flush()
            _evaluate(run, evaluator, state, log, step)
            recorder.restart_clock()
        received = stopped(step)
        if received or ended or step % config.checkpoint_every == 0:
            recorder.flush()  # a step that is not finite must not be saved, and saved steps must be in the log
            run.files.upload()
            record = Record(config, run.tokenizer.files(), recorder.last, run.origin, run.fingerprints)
            run.checkpoints.save(step, state.params, record, state.optimizer, run.iterator, state.ema)
        if received:
            run.checkpoints.wait()
            of = f"{recorder.samples_seen:,} samples" if config.batch_samples else f"step {step} of {config.steps}"
            _say(f"stopped after {of}, saved; the same command goes on from here")
            return 128 + received
    compiled = train_step._cache_size()
    if compiled > 1:
        raise RuntimeError(
            f"the training step was compiled {compiled} times: shapes or shardings of its inputs changed"
        )
    _report(run, evaluator, state, log, recorder.last)
    return 0


def _check_rows(config: Config, mesh: jax.sharding.Mesh) -> None:
    parts = lambda axis: math.prod(mesh.shape[name] for name in mesh_axes(axis))  # noqa: E731
    shards = parts("batch")
    turns = config.optimizer.microbatches
    if config.data.rows % (shards * turns):
        each = f", {turns} times (optimizer.microbatches)" if turns > 1 else ""
        raise UserError(
            f"config.data.rows: {config.data.rows} rows do not divide by the {shards} devices that share them "
            f"(mesh axes {' x '.join(mesh_axes('batch'))}){each}; change data.rows or mesh.tensor"
        )
    unit = config.model.vision.unit_patches if config.model.vision else 1
    for key, count in (
        ("visual_slots", parts("slots")),
        ("text_slots", parts("slots")),
        ("patch_slots", parts("patches") * unit),
    ):
        if getattr(config.data, key) % count:
            raise UserError(f"config.data.{key}: {getattr(config.data, key)} does not divide by {count} (mesh.context)")
    places = named(mesh, "batch").addressable_devices_indices_map((config.data.rows,))
    own = {row for (part,) in places.values() for row in range(config.data.rows)[part]}
    if len(own) * jax.process_count() != config.data.rows:
        raise UserError(
            f"config.mesh: {jax.process_count()} processes cannot each hold rows of their own "
            f"(process {jax.process_index()} would hold {len(own)} of {config.data.rows}); "
            f"mesh.tensor must split the {jax.local_device_count()} devices of one process only"
        )


def _earlier_record(config: Config, checkpoints: Checkpoints) -> Record | None:
    """That of the run so far, or of the run to start from; None for a fresh start."""
    if checkpoints.latest_step is not None:
        return checkpoints.record()
    if config.init_from:
        with Checkpoints(find_checkpoints(config.init_from)) as other:
            return other.record()
    return None


def _tokenizer_folder(config: Config) -> epath.Path | None:
    return path_of(config.workdir) / "tokenizer" if jax.process_index() == 0 else None


def _start(run: Run) -> tuple[TrainState, dict[str, float]]:
    """The state after the newest checkpoint's step (the iterator is put there too) and its metrics, or a new one."""
    config, checkpoints = run.config, run.checkpoints
    wanted = abstract_state(config, run.mesh)
    if checkpoints.latest_step is None:
        return initial_state(config, run.mesh, first_params(config, run.mesh, _say)), {}
    record = checkpoints.record()
    data = record.fingerprints, run.fingerprints
    for key, (before, now) in check_continues(record.config, config, checkpoints.folder, data).items():
        _say(f"from here on, as config.resume_with says: {key} was {before} and is {now}")
    params, optimizer, ema = checkpoints.restore(wanted.params, wanted.optimizer, wanted.ema, run.iterator)
    if checkpoints.latest_step > config.steps and not config.batch_samples:
        raise UserError(
            f"config.steps: {config.steps}, but {checkpoints.folder} is already at {checkpoints.latest_step}"
        )
    scalars = jnp.int32(checkpoints.latest_step), Running.after(record.metrics)
    step, running = jax.device_put(scalars, (wanted.step.sharding, jax.tree.map(lambda x: x.sharding, wanted.running)))
    _say(f"going on after step {checkpoints.latest_step} of {checkpoints.folder}")
    return TrainState(step, *split_trainable(config.optimizer, params), optimizer, ema, running), record.metrics


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[int], int]]:
    """Gives a function of the step that says which signal asked to stop (0: none); a second Ctrl-C stops at once.

    Several processes must stop after the same step, so there it is JAX's preemption notice (SIGTERM) that counts.
    """
    if jax.process_count() > 1:
        yield lambda step: int(signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(step) else 0
        return
    received = []

    def note(number: int, _: object) -> None:
        received.append(number)
        _say("stopping at the end of this step")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda step: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail_if_asked(step: int) -> None:
    if os.environ.get(FAIL_AT_STEP) == str(step):
        os.kill(os.getpid(), signal.SIGKILL)


def _announce(config: Config, mesh: jax.sharding.Mesh, state: TrainState) -> None:
    total, trainable = (sum(x.size for x in flatten(p).values()) for p in (state.params, state.trainable))
    axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
    _say(f"{total:,} parameters, {trainable:,} of them trained; {mesh.size} {jax.devices()[0].device_kind} ({axes})")
    _say(f"compiling the training step of {config.data.rows} rows")


def _evaluate(run: Run, evaluator: Evaluator, state: TrainState, log: MetricsLog | None, step: int) -> None:
    """Scores some held-out samples of every source, into the log and answers.png."""
    _say(f"step {step}: evaluating")
    scores = evaluator.score(_evaluated(run.config, state), run.config.eval_samples)
    values = evaluator.metrics(scores)
    if log:
        log.write(step, values)
        plot_answers(run.files.local / "answers.png", evaluator.answers(scores, SHOWN_ANSWERS))
    _say("  ".join(f"{name} {value:.4f}" for name, value in values.items() if name.count("/") == 2))


def _evaluated(config: Config, state: TrainState) -> Params:
    return state.averaged_params if config.eval_ema else state.params


def _report(
    run: Run, evaluator: Evaluator, state: TrainState, log: MetricsLog | None, metrics: dict[str, float]
) -> None:
    """Evaluates on all held-out samples, and writes the table and the images."""
    _say("evaluating on all held-out samples")
    began, step, config = time.monotonic(), int(state.step), run.config
    scores = evaluator.score(_evaluated(config, state))
    if log is None:
        return
    folder, values = run.files.local, evaluator.metrics(scores)
    before = [line for line in read_log(folder / "metrics.jsonl") if line["step"] == step]
    if {"step": step} | values not in before:
        log.write(step, values)
    log.close()
    text = table(evaluator.rows(scores))
    (folder / "evaluation.md").write_text(text + "\n")
    plot_losses(folder / "loss.png", read_log(folder / "metrics.jsonl"), f"{run.files.folder.name}, {step} steps")
    plot_answers(folder / "answers.png", evaluator.answers(scores, SHOWN_ANSWERS))
    for name, count in sorted(sample_counts(run.iterator).items()):
        if not name.endswith("/good"):
            _say(f"samples read as {name}: {count:,}")
    planned = f" ({config.steps * config.batch_samples:,} planned)" if config.batch_samples else ""
    tokens, texts = (int(metrics.get(f"{name}_seen", 0)) for name in ("tokens", "text_tokens"))
    samples = int(metrics.get("samples_seen", 0))
    _say(f"trained on {samples:,} samples{planned}, {tokens:,} tokens, {texts:,} of them text, in {step:,} steps")
    took = f"evaluated in {time.monotonic() - began:.0f} s"
    _say(f"{text}\n{took}; see loss.png, answers.png, evaluation.md in {config.workdir}")


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
