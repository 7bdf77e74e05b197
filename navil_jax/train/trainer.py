"""The trainer: opens a run, restores or starts it, takes its steps, evaluates, saves and reports.

`<workdir>` holds

    checkpoints/<step>/   parameters, optimizer state, place in the data, config, tokenizer
    metrics.jsonl         a line per training step and per evaluation; also as TensorBoard events in tensorboard/
    timings.jsonl         speed, peak memory, the share of time spent waiting for data, and that of steps that count
    goodput.jsonl         a line for each start of the run: what its wall time went to
    profile/              xprof traces, if asked for by config.profile_steps
    run.json              config, command and hardware of the last start
    quarantine.jsonl      samples that cannot be used, and why; no later run with this workdir reads them
    evaluation.md         accuracies on held-out samples beside baselines
    loss.png answers.png  the loss curve; held-out images with the model's answers at the last evaluation
"""

import contextlib
import dataclasses
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
from jax.experimental import multihost_utils

from navil_jax.config import Config
from navil_jax.console import say
from navil_jax.data.pipeline import make_dataset
from navil_jax.data.quarantine import Quarantine
from navil_jax.data.run import open_run
from navil_jax.data.sources import fingerprints, held_out_fingerprints
from navil_jax.data.streams import sample_counts, with_streams
from navil_jax.data.tokenizers import Tokenizer
from navil_jax.data.watchdog import Watchdog
from navil_jax.errors import UserError
from navil_jax.model.params import flatten
from navil_jax.paths import RunFiles, path_of
from navil_jax.sharding import axis_size, make_mesh, mesh_axes, named, row_place, use_rules
from navil_jax.train.checkpoint import Checkpoints, Record, saved_streams
from navil_jax.train.evaluators import Evaluations
from navil_jax.train.goodput import CHECKPOINT, DATA_WAIT, EVALUATION, Goodput, goodput_table
from navil_jax.train.lock import WorkdirLock, check_same_settings
from navil_jax.train.metrics import MetricsLog
from navil_jax.train.optimizer import check_warmup
from navil_jax.train.overview import write_run
from navil_jax.train.peers import Peers
from navil_jax.train.profiling import Profiler, compilations
from navil_jax.train.recorder import Recorder
from navil_jax.train.saving import Saving, keep
from navil_jax.train.start import Start, fresh_state, newest_state
from navil_jax.train.step import TrainState, global_batch, make_train_step
from navil_jax.train.writers import make_writers

STOP_SECONDS = 300.0  # for a checkpoint to be written after a signal
RECOMPILED = "its input changed in shape, dtype or sharding; JAX_EXPLAIN_CACHE_MISSES=1 says where"


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last."""

    config: Config
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    origin: dict[str, Any]  # what the first parameters were converted from
    fingerprints: dict[str, str]  # of the data
    files: RunFiles
    lock: WorkdirLock
    checkpoints: Checkpoints
    iterator: grain.DatasetIterator
    began: float  # time.monotonic()


@dataclasses.dataclass(frozen=True)
class _Stop:
    """A signal that asks to stop.

    Attributes:
      since: `time.monotonic()` when it came; of several processes when all knew, up to some steps later.
    """

    number: int
    since: float


def run(config: Config, start: Start | None = None) -> int:
    """Trains until the run has its length, or until a signal; returns the exit status (128 + signal if stopped).

    Args:
      config: of the run.
      start: the newest checkpoint of `config.workdir`, else what `config.init_from` names (`opened.open_start`); None
        for a run from fresh parameters.

    Raises:
      UserError: the config, the data or the checkpoint cannot be used, or a step asks for a stop.
    """
    if not config.workdir:
        raise UserError("config.workdir: no folder for the run is given, use --config.workdir=FOLDER")
    check_warmup(config.optimizer, config.steps)
    use_rules(config.mesh.rules)
    check_same_settings(config)
    with Peers():
        status = _open_and_train(config, start)
        multihost_utils.sync_global_devices("end")  # the first process writes reports when the others are done
    return status


def _open_and_train(config: Config, start: Start | None) -> int:
    """See `run`."""
    began, workdir = time.monotonic(), path_of(config.workdir)
    # 1. Devices.
    mesh = make_mesh(config.mesh)
    # 2. What the run reads: config and tokenizer of the checkpoint or of the recipe, then the sources.
    opened = open_run(config, start)
    config = with_streams(opened.config, jax.process_count(), saved_streams(workdir / "checkpoints"))
    _check_rows(config, mesh)
    with (
        WorkdirLock(workdir) as lock,
        Checkpoints(workdir / "checkpoints", keep(config)) as checkpoints,
        RunFiles(workdir) as files,
        _signals() as stopped,
    ):
        if opened.trained and jax.process_index() == 0:
            opened.tokenizer.save(workdir / "tokenizer")
        if jax.process_index() == 0:
            write_run(workdir, config, mesh)
        for name in checkpoints.strangers():
            _say(f"{checkpoints.folder / name}: is no checkpoint, as its name is no step; it is left alone")
        # 3. The stream of batches, from its beginning.
        quarantine = Quarantine(files.local, config.data.quarantine, jax.process_index())
        place = row_place(mesh), jax.process_count()
        iterator = iter(make_dataset(config, opened.sources, opened.tokenizer, *place, quarantine))
        # 4. The state: after the newest checkpoint's step, with the stream put to its place; else that of step 0.
        data = fingerprints(opened.sources) | held_out_fingerprints(config)
        if checkpoints.latest_step is not None:
            state, metrics = newest_state(config, mesh, checkpoints, iterator, data, _say)
        else:
            state, metrics = fresh_state(config, mesh, start, _say)
        # 5. The steps.
        origin = start.origin if start is not None else {}
        this = Run(config, mesh, opened.tokenizer, origin, data, files, lock, checkpoints, iterator, began)
        status = _train(this, state, metrics, stopped)
        iterator.close()
    return status


@dataclasses.dataclass(frozen=True)
class _Instruments:
    """What measures a run from its first step to its last."""

    log: MetricsLog | None  # of the first process
    recorder: Recorder
    goodput: Goodput
    saving: Saving
    evaluations: Evaluations

    def note_cost(self) -> None:
        """Logs what a checkpoint cost, once it is complete."""
        cost = self.saving.finished()
        if cost and self.log:
            self.log.write_times(cost.step, cost.values())
            _say(str(cost))


def _instruments(run: Run, state: TrainState, before: dict[str, float]) -> _Instruments:
    config, step = run.config, int(state.step)
    folder, first = run.files.local, jax.process_index() == 0
    log = MetricsLog(folder, step, make_writers(config, folder, step)) if first else None
    if log and log.dropped:
        _say(f"metrics.jsonl: {log.dropped:,} lines of steps after {step:,}, of an earlier attempt, are dropped")
    if log and log.damaged:
        _say(f"metrics.jsonl: {log.damaged:,} lines are damaged, of a crash or a full disk, and dropped")
    return _Instruments(
        log,
        Recorder(config, log, flatten(state.trainable), before),
        Goodput(folder if first else None, step, run.began),
        Saving(config, run.checkpoints, _say),
        Evaluations(config, run.mesh, run.tokenizer, run.files, log, _say),
    )


def _train(run: Run, state: TrainState, before: dict[str, float], stopped: Callable[[int], _Stop | None]) -> int:
    """The steps; `before` are the metrics of the step that the run goes on from."""
    config, mesh, step = run.config, run.mesh, int(state.step)
    by = _instruments(run, state, before)
    recorder, goodput = by.recorder, by.goodput
    profiler = Profiler(config.profile_steps, run.files.local / "profile" if by.log else None)
    train_step = make_train_step(config, mesh)
    _announce(config, mesh, state)
    with Watchdog() as watchdog, compilations("train_step") as compiled:
        ended = recorder.ended(step)
        while not ended:
            step += 1
            by.note_cost()
            began = time.monotonic()
            with watchdog.waiting(), goodput.phase(DATA_WAIT):
                batch = next(run.iterator)
            waited = time.monotonic() - began
            profiler.begin(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = train_step(state, global_batch(batch, mesh))
            profiler.end(step, metrics)
            if len(compiled) > 1:
                goodput.compiled(compiled[-1])
                _say(f"step {step}: the training step was compiled again, {compiled.pop():.1f} s ({RECOMPILED})")
            recorder.add(step, metrics, batch, waited, sample_counts(run.iterator))
            goodput.taken(step)
            ended, evaluated = recorder.ended(step), None
            if by.evaluations.due(step) and not ended:
                recorder.flush()
                with goodput.phase(EVALUATION):
                    evaluated = by.evaluations.run(state, step)
                recorder.restart_clock()
            if step % config.log_every == 0:
                goodput.write()
            received = stopped(step)
            if received or ended or by.saving.due(step):
                _save(run, by, state, step, evaluated, hurried=bool(received))
            if received:
                return _stop(run, by, step, received)
    _finish(run, by, state)
    return 0


def _save(
    run: Run, by: _Instruments, state: TrainState, step: int, evaluated: dict[str, float] | None, hurried: bool
) -> None:
    """Starts to write a checkpoint; `evaluated`: what was measured after this step, if something was."""
    by.recorder.flush()  # a step that is not finite must not be saved, and saved steps must be in the log
    shares, began = by.goodput.write(), time.monotonic()
    with by.goodput.phase(CHECKPOINT):
        if not hurried:  # a spot host has some 15 s from here, which are for the checkpoint
            run.files.upload()
        run.lock.check()
        run.checkpoints.check()
        by.note_cost()  # of the one before
        record = Record(run.config, run.tokenizer.files(), by.recorder.last, run.origin, run.fingerprints)
        metric = by.saving.metric(step, evaluated, by.recorder.last)
        run.checkpoints.save(step, state.params, record, state.optimizer, run.iterator, state.ema, metric)
    by.saving.began(step, time.monotonic() - began, (state.params, state.optimizer, state.ema))
    if by.log:
        by.log.write_times(step, {f"goodput/{part}": share for part, share in shares.items()})
    if by.log and by.log.was_cut():
        _say("metrics.jsonl: was emptied or removed while the run goes on; its loss curve begins here")


def _stop(run: Run, by: _Instruments, step: int, received: _Stop) -> int:
    """Waits for the checkpoint of the last step after a signal; gives the exit status."""
    by.recorder.close()
    with by.goodput.phase(CHECKPOINT):
        run.checkpoints.hurry(STOP_SECONDS)
        run.checkpoints.wait()
    by.note_cost()
    by.goodput.write()
    seconds = time.monotonic() - received.since
    what = "the signal" if jax.process_count() == 1 else "all processes knew of the signal"
    if by.log:
        by.log.write_times(step, {"checkpoint/stop_seconds": seconds})
    config, samples = run.config, by.recorder.samples_seen
    of = f"{samples:,} samples" if config.batch_samples else f"step {step} of {config.steps}"
    _say(f"stopped after {of}, saved {seconds:.1f} s after {what}; the same command goes on from here")
    return 128 + received.number


def _finish(run: Run, by: _Instruments, state: TrainState) -> None:
    """Evaluates on all held-out samples, and says what the run has read and what its time went to."""
    by.recorder.close()
    with by.goodput.phase(EVALUATION):
        by.evaluations.finish(state)
    with by.goodput.phase(CHECKPOINT):
        run.checkpoints.wait()
    by.note_cost()
    by.goodput.write()
    if by.log:
        by.log.close()
        _report(run, state, by.recorder)
        _say(goodput_table(by.goodput.attempts))


def _check_rows(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raises a `UserError` if rows or slots do not divide by the devices that share them."""
    shards, microbatches = axis_size(mesh, "batch"), config.optimizer.microbatches
    if config.data.rows % (shards * microbatches):
        each = f" in each of {microbatches} microbatches (optimizer.microbatches)" if microbatches > 1 else ""
        raise UserError(
            f"config.data.rows: {config.data.rows} rows do not divide by the {shards} devices that share them "
            f"(mesh axes {' x '.join(mesh_axes('batch'))}){each}; change data.rows or mesh.tensor"
        )
    unit = config.model.vision.unit_patches if config.model.vision else 1
    for key, count in (
        ("visual_slots", axis_size(mesh, "slots")),
        ("text_slots", axis_size(mesh, "slots")),
        ("patch_slots", axis_size(mesh, "patches") * unit),
    ):
        if getattr(config.data, key) % count:
            raise UserError(f"config.data.{key}: {getattr(config.data, key)} does not divide by {count} (mesh.context)")
    places = named(mesh, "batch").addressable_devices_indices_map((config.data.rows,))
    own = {row for index in places.values() if index for row in range(config.data.rows)[index[0]]}
    if len(own) * jax.process_count() != config.data.rows:
        raise UserError(
            f"config.mesh: {jax.process_count()} processes cannot each hold a shard of the rows of their own "
            f"(process {jax.process_index()} would hold {len(own)} of {config.data.rows}); "
            f"mesh.tensor must split the {jax.local_device_count()} devices of one process only"
        )


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[int], _Stop | None]]:
    """Gives a function of the step that says whether a signal asked to stop; a second Ctrl-C stops at once.

    Several processes must stop after the same step, so there it is JAX's preemption notice (SIGTERM) that counts.
    """
    if jax.process_count() > 1:

        def noticed(step: int) -> _Stop | None:
            came = multihost_utils.reached_preemption_sync_point(step)
            return _Stop(int(signal.SIGTERM), time.monotonic()) if came else None

        yield noticed
        return
    received: list[_Stop] = []

    def note(number: int, _: object) -> None:
        received.append(_Stop(number, time.monotonic()))
        _say("stopping at the end of this step")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda step: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _announce(config: Config, mesh: jax.sharding.Mesh, state: TrainState) -> None:
    total, trainable = (sum(x.size for x in flatten(p).values()) for p in (state.params, state.trainable))
    axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
    _say(f"{total:,} parameters, {trainable:,} of them trained; {mesh.size} {jax.devices()[0].device_kind} ({axes})")
    _say(f"compiling the training step of {config.data.rows} rows")


def _report(run: Run, state: TrainState, recorder: Recorder) -> None:
    """Says what the run has read."""
    for name, count in sorted(sample_counts(run.iterator).items()):
        if not name.endswith("/good"):
            _say(f"samples read as {name}: {count:,}")
    config, step, metrics = run.config, int(state.step), recorder.last
    planned = f" ({config.steps * config.batch_samples:,} planned)" if config.batch_samples else ""
    tokens, texts = (int(metrics.get(f"{name}_seen", 0)) for name in ("tokens", "text_tokens"))
    samples = int(metrics.get("samples_seen", 0))
    _say(f"trained on {samples:,} samples{planned}, {tokens:,} tokens, {texts:,} of them text, in {step:,} steps")
    if recorder.alarm:
        _say(f"the mean loss is {metrics['loss_mean']:.2f} at the end, {recorder.alarm}")
    _say(f"see loss.png, answers.png, evaluation.md in {config.workdir}")
    _say("next:\n" + "\n".join(f"  python -m navil_jax.{command}" for command in _next_commands(config.workdir)))


def _next_commands(workdir: str) -> Iterator[str]:
    workdir = shlex.quote(workdir)
    yield f"chat --checkpoint {workdir} --image IMAGE.png"
    yield f"serve --checkpoint {workdir}"
    yield f"train report {workdir}"


def _say(text: str) -> None:
    if jax.process_index() == 0:
        say(text)
