"""Metrics on their way from the devices to the log, and the watch over them."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Collection, Mapping, Sequence

import jax
import numpy as np

from navil_jax.batch import Batch
from navil_jax.config import Config
from navil_jax.console import Progress, is_terminal, say
from navil_jax.errors import UserError
from navil_jax.model.flops import Counts, count_batch, peak_flops, total, useful_flops
from navil_jax.paths import path_of
from navil_jax.train.coordinator import data_waits
from navil_jax.train.metrics import MetricsLog, Throughput, progress_fields
from navil_jax.train.profiling import peak_memory

ALARM_FROM = 10  # losses, before their mean says something
IN_FLIGHT = 2  # steps that the devices may be behind, so that they never wait for the host
SUMMED = ("tokens", "text_tokens", "samples")  # metrics whose sums over the run are logged as <name>_seen


@dataclasses.dataclass(frozen=True)
class _Step:
    number: int
    metrics: dict[str, jax.Array]
    ids: np.ndarray  # [3, B, L]: segment_ids, source_ids, sample_ids of this process's rows
    counts: Mapping[str, int]  # of samples read so far, to be logged with the step
    real: Counts  # what is no padding in this process's rows
    most_samples: int  # that the step can hold


class Recorder:
    """Writes the metrics of every step to the log, some steps late, and watches over them.

    Args:
      config: the run's.
      log: None on all processes but the first.
      trained: names of the trained parameters, for counting FLOPs.
      before: the scalars of the step that the run goes on from; {} at its start.
    """

    def __init__(self, config: Config, log: MetricsLog | None, trained: Collection[str], before: Mapping[str, float]):
        self._config, self._log, self._trained = config, log, frozenset(trained)
        self._pending: list[_Step] = []
        self._done: list[dict[str, np.ndarray]] = []  # since the last progress line
        self._real: list[Counts] = []  # as many
        self._newest = 0  # step that `last` is of
        self._clock: float | None = None
        self._waited = 0.0  # seconds for data since the last progress line
        self._skipped = 0  # steps in a row
        self._lowest = math.inf  # mean loss so far
        self.alarm = ""  # what is wrong with the loss now
        self.last = dict(before)  # the newest step's scalars, for the checkpoint
        self._round: tuple[int, dict[str, float]] | None = None  # newest step to be shown, with its scalars
        self._bar: Progress | None = None

    def add(
        self, step: int, metrics: dict[str, jax.Array], batch: Batch, waited: float, counts: Mapping[str, int]
    ) -> None:
        """Takes what a step returned, and waits for the step `IN_FLIGHT` before it; prints of each `log_every`th step.

        Args:
          waited: seconds that the host waited for the batch.
          counts: samples read so far by `<source>/<what became of them>`; every `log_every` steps they are logged.
        """
        ids = np.stack([batch.segment_ids, batch.source_ids, batch.sample_ids])
        shown = counts if step % self._config.log_every == 0 else {}
        most = most_samples(ids[0], self._config)
        self._pending.append(_Step(step, metrics, ids, shown, count_batch(batch, self._config.model), most))
        self._waited += waited
        if self._clock is None:
            self.flush()
            self.restart_clock()
        elif len(self._pending) > IN_FLIGHT:
            jax.block_until_ready(self._pending[-IN_FLIGHT - 1].metrics)
        if (step - IN_FLIGHT) % self._config.log_every == 0:
            self.flush(IN_FLIGHT)
        self._show(step)

    def _show(self, step: int) -> None:
        """Moves the bar on, where there is a terminal."""
        if jax.process_index() or not is_terminal(sys.stderr) or not is_terminal(sys.stdout):
            return
        planned = self._config.steps * self._config.batch_samples
        now = self.samples_seen if planned else step
        if self._bar is None:
            unit = "samples" if planned else "steps"
            self._bar = Progress("train", planned or self._config.steps, unit, done=now)
        self._bar.set_postfix_str(f"loss {self.last.get('loss', math.nan):.4f}", refresh=False)
        self._bar.update(now - self._bar.n)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.leave = False
            self._bar.close()

    def restart_clock(self) -> None:
        """Leaves out of the throughput what happened since the last progress line (compilation, evaluation)."""
        self._clock, self._done, self._real, self._waited = time.monotonic(), [], [], 0.0
        self._round = None

    def flush(self, keep: int = 0) -> None:
        """Fetches, checks and logs all steps but the newest `keep`; prints a line if one to be shown is among them.

        Raises:
          UserError: a step is such that the run must stop; names it and its samples.
        """
        self._collect(keep)
        if self._newest and self._is_over(self._newest):
            self._round = self._newest, self.last
        if self._clock is not None and self._done and self._round:
            self._print(*self._round)

    def ended(self, step: int) -> bool:
        """Whether the run has its length after `step`.

        A run counted in samples ends with the first step at which it has them all. While steps in flight cannot hold as
        many, nothing is waited for.
        """
        planned = self._config.steps * self._config.batch_samples
        if planned and self.samples_seen + sum(step.most_samples for step in self._pending) >= planned:
            self._collect()
        return self._is_over(step)

    def _is_over(self, step: int) -> bool:
        """As `ended`, of a step that is collected if the run is counted in samples."""
        planned = self._config.steps * self._config.batch_samples
        return self.samples_seen >= planned if planned else step >= self._config.steps

    @property
    def samples_seen(self) -> int:
        return int(self.last.get("samples_seen", 0))

    def _collect(self, keep: int = 0) -> None:
        """Fetches, checks and logs all steps but the newest `keep`."""
        ready, self._pending = self._pending[: len(self._pending) - keep], self._pending[len(self._pending) - keep :]
        for step, metrics in zip(ready, jax.device_get([step.metrics for step in ready]), strict=True):
            self._check(step, metrics)
            sums = {f"{name}_seen": self.last.get(f"{name}_seen", 0) + int(metrics[name]) for name in SUMMED}
            counts = {f"samples/{name}": n for name, n in step.counts.items()}
            self._newest, self.last = step.number, self._scalars(metrics) | sums | counts
            if self._log:
                self._log.write(step.number, self.last)
            self._done.append(metrics)
            self._real.append(step.real)
            if step.number % self._config.log_every == 0:
                self._round = step.number, self.last

    def _scalars(self, metrics: dict[str, np.ndarray]) -> dict[str, float]:
        """Scalars by name; the loss of each source that the batch holds as `loss/<source>`."""
        scalars = {name: float(value) for name, value in metrics.items() if value.ndim == 0 and np.isfinite(value)}
        for source, loss, weight in zip(
            self._config.data.sources, metrics["source_loss"], metrics["source_weight"], strict=True
        ):
            if weight > 0 and np.isfinite(loss):
                scalars[f"loss/{source.name}"] = float(loss)
        return scalars

    def _print(self, step: int, last: Mapping[str, float]) -> None:
        """Of a step, with its scalars; speed is that of all steps since the last line."""
        now, config, count = time.monotonic(), self._config, len(self._done)
        assert self._clock is not None  # since the first step
        data = config.data
        sums = {name: int(sum(metrics[name] for metrics in self._done)) for name in ("tokens", "images", "patches")}
        slots = count * data.rows
        real = Counts(*np.sum([dataclasses.astuple(counts) for counts in self._real], axis=0))
        done = Throughput(
            seconds=now - self._clock,
            steps=count,
            token_slots=slots * (data.visual_slots + data.text_slots),
            patch_slots=slots * data.patch_slots,
            data_wait=self._waited,
            flops=total(useful_flops(config.model, real, self._trained)) / jax.local_device_count(),
            peak=peak_flops(jax.local_devices()[0].device_kind),
            memory=peak_memory(),
            **sums,
        )
        waits = data_waits(self._waited / max(done.seconds, 1e-9))
        if self._log:
            self._log.write_timing(step, done)
            self._log.write_times(step, slowest_host(waits))
        steps, samples = config.steps, ""
        if planned := config.steps * config.batch_samples:
            seen = int(last["samples_seen"])
            steps = max(step, math.ceil(step * planned / max(1, seen)))
            samples = f"{seen:,} of {planned:,} samples"
        if jax.process_index() == 0:
            loss, rate = last.get("loss", math.nan), last["learning_rate"]
            say(*progress_fields(step, steps, loss, rate, done, samples))
        self._clock, self._done, self._real, self._waited, self._round = now, [], [], 0.0, None

    def _check(self, step: _Step, metrics: dict[str, np.ndarray]) -> None:
        """Notes, passes over or stops at what a good step does not have, as the config says.

        Raises:
          UserError: the run must stop; names the step and its samples.
        """
        policy = self._config.optimizer
        bad = [name for name in ("loss", "gradient_norm") if not math.isfinite(metrics[name])]
        self._skipped = self._skipped + 1 if metrics["skipped"] else 0
        self._watch_loss(step.number, metrics)
        if not bad and not metrics["spike"]:
            return
        samples = self._note(step, "not_finite" if bad else "spike")
        if bad:
            said, key = f"{bad[0]} is {metrics[bad[0]]}", "not_finite"
        else:
            usual = f"{metrics['loss_mean']:.4f} +- {math.sqrt(metrics['loss_variance']):.4f}"
            said, key = f"loss {metrics['loss']:.4f} is a spike (the last ones: {usual})", "spikes"
        said = f"step {step.number}: {said}; samples of its batch: {samples}"
        if getattr(policy, key) == "stop" or self._skipped > policy.max_skipped:
            again = f"{self._skipped} steps in a row were skipped" if metrics["skipped"] else "nothing was saved since"
            skip = "" if metrics["skipped"] else f"pass over such steps with config.optimizer.{key}=skip, "
            look = "look at these, "
            if bad and not self._newest:
                look = "the parameters that the run starts from are as likely to blame as these: look at both, "
            raise UserError(
                f"{said}; {again}; {look}{skip}or lower config.optimizer.peak_learning_rate in a new workdir"
            )
        if jax.process_index() == 0:
            say(f"{said}{'; skipped' if metrics['skipped'] else ''}")

    def _watch_loss(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        """Says it when the mean loss leaves its range: above what guessing gives, or twice as high as it was."""
        mean, guessing = float(metrics["loss_mean"]), math.log(self._config.model.decoder.vocab_size)
        if int(metrics["losses"]) < ALARM_FROM or not math.isfinite(mean):
            return
        self._lowest = min(self._lowest, mean)
        alarm = ""
        if mean > 1.5 * guessing:
            alarm = f"worse than guessing ({guessing:.2f})"
        elif mean > max(2 * self._lowest, self._lowest + 1):
            alarm = f"once it was {self._lowest:.2f}"
        if alarm and not self.alarm and jax.process_index() == 0:
            look = "look at the learning rate, the parameters that the run starts from, and the data"
            say(f"step {step}: the mean loss is {mean:.2f}, {alarm}; {look}")
        self.alarm = alarm

    def _note(self, step: _Step, what: str) -> str:
        """Writes the samples of this process's rows to a file, and gives the first ones and the file's name."""
        samples = _samples(step.ids, self._config)
        path = path_of(self._config.workdir) / f"{what}_step_{step.number}_process_{jax.process_index()}.json"
        path.write_text(json.dumps({"step": step.number, "samples": samples}))
        shown = ", ".join(samples[:8]) + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
        return f"{shown} (all in {path})"


def slowest_host(waits: Sequence[float]) -> dict[str, float]:
    """Which process waits most for data, its share and the median of the others; {} if there is one process.

    Example: [0.02, 0.4, 0.0] -> {"slowest_host": 1, "slowest_host_data_wait": 0.4, ..."others_data_wait": 0.01}
    """
    if len(waits) < 2:
        return {}
    slowest = int(np.argmax(waits))
    others = float(np.median(np.delete(waits, slowest)))
    values = {"slowest_host": slowest, "slowest_host_data_wait": waits[slowest]}
    return values | {"slowest_host_others_data_wait": others}


def most_samples(segment_ids: np.ndarray, config: Config) -> int:
    """The most samples that a global batch can hold of which this process knows its own rows, [rows, L].

    Other processes' rows may hold one in every text slot, so of several processes each knows another number; none is
    below the true one.
    """
    own = int(segment_ids.max(axis=1, initial=0).sum())
    return own + (config.data.rows - len(segment_ids)) * config.data.text_slots


def _samples(ids: np.ndarray, config: Config) -> list[str]:
    """`<source>/<index>` of all samples in a batch."""
    segments, sources, samples = ids
    pairs = np.unique(np.stack([sources[segments > 0], samples[segments > 0]], axis=1), axis=0)
    return [f"{config.data.sources[source].name}/{sample}" for source, sample in pairs.tolist()]
