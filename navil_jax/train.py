"""Trains NaViL: `python -m navil_jax.train --config configs/x.py --config.workdir=runs/x`.

The same command goes on where a run was interrupted, and ends with the same parameters, optimizer state and losses, bit
for bit, as a run without interruption. `<workdir>` then holds

    checkpoints/<step>/   parameters, optimizer state, place in the data, config, tokenizer
    metrics.jsonl         a line per training step and per evaluation; also as TensorBoard events in tensorboard/
    timings.jsonl         speed, and the share of time spent waiting for data
    quarantine.jsonl      samples that cannot be used, and why; no later run with this workdir reads them
    evaluation.md         accuracies on held-out samples beside baselines
    loss.png answers.png  the loss curve; held-out pictures with the model's answers
"""

import contextlib
import dataclasses
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from navil_jax.config import Config, validate
from navil_jax.config_flags import parse
from navil_jax.data.pipeline import make_dataset, sample_counts
from navil_jax.data.prompt import role_texts
from navil_jax.data.quarantine import Quarantine
from navil_jax.data.sentencepiece_tokenizer import train_tokenizer
from navil_jax.data.sources import expand_sources, open_source
from navil_jax.data.stall import StallWatch
from navil_jax.data.tokenizer import Tokenizer
from navil_jax.errors import UserError, report_user_errors
from navil_jax.model.params import Params, flatten
from navil_jax.sharding import make_mesh, named, start_hosts
from navil_jax.training.checkpoint import Checkpoints, Record, check_continues, check_same_model, find_checkpoints
from navil_jax.training.evaluation import Evaluator, table
from navil_jax.training.metrics import MetricsLog, plot_answers, plot_losses, read_log
from navil_jax.training.optimizer import split_trainable
from navil_jax.training.recorder import Recorder
from navil_jax.training.step import (
    TrainState,
    abstract_state,
    global_batch,
    initial_params,
    initial_state,
    make_train_step,
)

FAIL_AT_STEP = "NAVIL_FAIL_AT_STEP"  # environment variable: the process kills itself before this step, to test resuming
SHOWN_ANSWERS = 16


@report_user_errors
def main(argv: list[str] | None = None) -> int:
    start_hosts()
    config, _ = parse(sys.argv[1:] if argv is None else argv, __doc__)
    return run(config)


def run(config: Config) -> int:
    """Trains to `config.steps`, or until a signal; returns the exit status (128 + signal if stopped by one)."""
    if not config.workdir:
        raise UserError("config.workdir: no folder for the run is given, use --config.workdir=FOLDER")
    if "://" in config.workdir:
        raise UserError(f"config.workdir: {config.workdir} is an address; mount the bucket (gcsfuse) and give its path")
    config = expand_sources(config)
    mesh = make_mesh(config.mesh)
    _check_rows(config, mesh)
    with (
        Checkpoints(Path(config.workdir) / "checkpoints", config.keep_checkpoints) as checkpoints,
        _signals() as stopped,
        StallWatch() as stall_watch,
    ):
        earlier = _earlier_record(config, checkpoints)
        tokenizer = (
            Tokenizer.from_files(earlier.tokenizer) if earlier else new_tokenizer(config, _tokenizer_folder(config))
        )
        config = complete(config, tokenizer)
        sources = [open_source(source, "train") for source in config.data.sources]
        place = jax.process_index(), jax.process_count()
        quarantine = Quarantine(config.workdir, config.data.quarantine, jax.process_index())
        iterator = iter(make_dataset(config, sources, tokenizer, *place, quarantine))
        state = _start(config, mesh, checkpoints, iterator)
        origin = earlier.origin if earlier else {}
        status = _train(config, mesh, tokenizer, origin, checkpoints, iterator, state, stopped, stall_watch)
    multihost_utils.sync_global_devices("end")  # the first process still writes reports when the others are done
    return status


def _train(
    config: Config,
    mesh: jax.sharding.Mesh,
    tokenizer: Tokenizer,
    origin: dict[str, Any],
    checkpoints: Checkpoints,
    iterator: grain.DatasetIterator,
    state: TrainState,
    stopped: Callable[[int], int],
    stall_watch: StallWatch,
) -> int:
    start = int(state.step)
    log = MetricsLog(config.workdir, start) if jax.process_index() == 0 else None
    recorder, evaluator = Recorder(config, log), Evaluator(config, mesh, tokenizer)
    train_step = make_train_step(config, mesh)
    _announce(config, mesh, state)
    for step in range(start + 1, config.steps + 1):
        _fail_if_asked(step)
        began = time.monotonic()
        with stall_watch.waiting():
            batch = next(iterator)
        waited = time.monotonic() - began
        state, metrics = train_step(state, global_batch(batch, mesh))
        recorder.add(step, metrics, batch, waited, sample_counts(iterator))
        if config.eval_every and step % config.eval_every == 0 and step < config.steps:
            recorder.flush()
            _say(f"step {step}: evaluating")
            scores = evaluator.metrics(evaluator.score(state.params, config.eval_samples))
            if log:
                log.write(step, scores)
            _say("  ".join(f"{name} {value:.4f}" for name, value in scores.items() if name.count("/") == 2))
            recorder.restart_clock()
        received = stopped(step)
        if received or step == config.steps or step % config.checkpoint_every == 0:
            recorder.flush()  # a step that is not finite must not be saved, and saved steps must be in the log
            record = Record(config, tokenizer.files(), recorder.last, origin)
            checkpoints.save(step, state.params, record, state.optimizer, iterator)
        if received:
            checkpoints.wait()
            _say(f"stopped after step {step} of {config.steps}, saved; the same command goes on from here")
            return 128 + received
    compiled = train_step._cache_size()
    if compiled > 1:
        raise RuntimeError(
            f"the training step was compiled {compiled} times: shapes or shardings of its inputs changed"
        )
    _report(config, evaluator, state.params, log, sample_counts(iterator))
    return 0


def _check_rows(config: Config, mesh: jax.sharding.Mesh) -> None:
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.data.rows % shards:
        raise UserError(
            f"config.data.rows: {config.data.rows} rows do not divide by the {shards} devices that share them "
            "(mesh axes data x fsdp); change data.rows or mesh.tensor"
        )
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


def _tokenizer_folder(config: Config) -> Path | None:
    return Path(config.workdir) / "tokenizer" if jax.process_index() == 0 else None


def new_tokenizer(config: Config, folder: Path | None) -> Tokenizer:
    """That of `config.data.tokenizer`, or one trained on the sources' texts and written to `folder` (None: nowhere)."""
    if config.data.tokenizer:
        return Tokenizer.load(config.data.tokenizer)
    around = role_texts(config.data.template)
    texts = (text for source in config.data.sources for text in open_source(source, "train").texts())
    corpus = itertools.chain.from_iterable((text, *around) for text in texts)
    return train_tokenizer(corpus, config.data.tokenizer_size, folder)


def complete(config: Config, tokenizer: Tokenizer) -> Config:
    """Takes the special tokens' ids from the tokenizer where the recipe of a model with vision leaves them out."""
    if config.model.vision is not None and not config.model.special_token_ids:
        model = dataclasses.replace(config.model, special_token_ids=tokenizer.special_token_ids)
        config = dataclasses.replace(config, model=model)
        validate(config)
    return config


def _start(
    config: Config, mesh: jax.sharding.Mesh, checkpoints: Checkpoints, iterator: grain.DatasetIterator
) -> TrainState:
    """The state after the newest checkpoint's step (the iterator is put there too), or a new one."""
    wanted = abstract_state(config, mesh)
    if checkpoints.latest_step is None:
        return initial_state(config, mesh, _first_params(config, mesh, wanted.params))
    check_continues(checkpoints.record().config, config, checkpoints.folder)
    params, optimizer = checkpoints.restore(wanted.params, wanted.optimizer, iterator)
    if checkpoints.latest_step > config.steps:
        raise UserError(
            f"config.steps: {config.steps}, but {checkpoints.folder} is already at {checkpoints.latest_step}"
        )
    step = jax.device_put(jnp.int32(checkpoints.latest_step), wanted.step.sharding)
    _say(f"going on after step {checkpoints.latest_step} of {checkpoints.folder}")
    return TrainState(step, *split_trainable(config.optimizer, params), optimizer)


def _first_params(config: Config, mesh: jax.sharding.Mesh, wanted: Params) -> Params:
    if not config.init_from:
        return initial_params(config, mesh)
    with Checkpoints(find_checkpoints(config.init_from)) as other:
        check_same_model(other.record().config, config, other.folder)
        _say(f"parameters of step {other.latest_step} of {other.folder}")
        return other.restore_params(wanted)


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


def _report(
    config: Config, evaluator: Evaluator, params: Params, log: MetricsLog | None, samples: dict[str, int]
) -> None:
    """Evaluates on all held-out samples, and writes the table and the pictures."""
    _say("evaluating on all held-out samples")
    began = time.monotonic()
    scores = evaluator.score(params)
    if log is None:
        return
    folder, values = Path(config.workdir), evaluator.metrics(scores)
    before = [line for line in read_log(folder / "metrics.jsonl") if line["step"] == config.steps]
    if {"step": config.steps} | values not in before:
        log.write(config.steps, values)
    log.close()
    text = table(evaluator.rows(scores))
    (folder / "evaluation.md").write_text(text + "\n")
    plot_losses(folder / "loss.png", read_log(folder / "metrics.jsonl"), f"{folder.name}, {config.steps} steps")
    plot_answers(folder / "answers.png", evaluator.answers(scores, SHOWN_ANSWERS))
    for name, count in sorted(samples.items()):
        if not name.endswith("/good"):
            _say(f"samples read as {name}: {count:,}")
    _say(f"{text}\nevaluated in {time.monotonic() - began:.0f} s; see loss.png, answers.png, evaluation.md in {folder}")


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
