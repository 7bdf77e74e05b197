"""Metrics on their way from the devices to the log, and the watch over them."""

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from navil_jax.batch import Batch
from navil_jax.config import Config
from navil_jax.errors import UserError
from navil_jax.training.metrics import MetricsLog, Throughput, progress_line

IN_FLIGHT = 2  # steps that the devices may be behind, so that they never wait for the host


@dataclasses.dataclass(frozen=True)
class _Step:
    number: int
    metrics: dict[str, jax.Array]
    ids: np.ndarray  # [3, B, L]: segment_ids, source_ids, sample_ids of this process's rows
    counts: Mapping[str, int]  # of samples read so far, to be logged with the step


class Recorder:
    """Writes the metrics of every step to the log, some steps late, and stops the run where they are not finite.

    Args:
      config: the run's.
      log: None on all processes but the first.
    """

    def __init__(self, config: Config, log: MetricsLog | None):
        self._config, self._log = config, log
        self._pending: list[_Step] = []
        self._done: list[dict[str, np.ndarray]] = []  # since the last progress line
        self._clock: float | None = None
        self._waited = 0.0  # seconds for data since the last progress line
        self.last: dict[str, float] = {}  # the newest step's scalars, for the checkpoint

    def add(
        self, step: int, metrics: dict[str, jax.Array], batch: Batch, waited: float, counts: Mapping[str, int]
    ) -> None:
        """Takes what a step returned, and waits for the step `IN_FLIGHT` before it; prints every `log_every` steps.

        Args:
          waited: seconds that the host waited for the batch.
          counts: samples read so far by `<source>/<what became of them>`; every `log_every` steps they are logged.
        """
        ids = np.stack([batch.segment_ids, batch.source_ids, batch.sample_ids])
        shown = counts if step % self._config.log_every == 0 else {}
        self._pending.append(_Step(step, metrics, ids, shown))
        self._waited += waited
        if self._clock is None:
            self.flush()
            self.restart_clock()
        elif len(self._pending) > IN_FLIGHT:
            jax.block_until_ready(self._pending[-IN_FLIGHT - 1].metrics)
        if step % self._config.log_every == 0:
            self.flush(IN_FLIGHT)

    def restart_clock(self) -> None:
        """Leaves out of the throughput what happened since the last progress line (compilation, evaluation)."""
        self._clock, self._done, self._waited = time.monotonic(), [], 0.0

    def flush(self, keep: int = 0) -> None:
        """Fetches, checks and logs all steps but the newest `keep`.

        Raises:
          UserError: a loss or gradient is not finite; names the step and its samples.
        """
        ready, self._pending = self._pending[: len(self._pending) - keep], self._pending[len(self._pending) - keep :]
        for step, metrics in zip(ready, jax.device_get([step.metrics for step in ready]), strict=True):
            self._check(step, metrics)
            self.last = self._scalars(metrics) | {f"samples/{name}": n for name, n in step.counts.items()}
            if self._log:
                self._log.write(step.number, self.last)
            self._done.append(metrics)
        if self._clock is not None and self._done and ready:
            self._print(ready[-1].number)

    def _scalars(self, metrics: dict[str, np.ndarray]) -> dict[str, float]:
        """Scalars by name; the loss of each source that the batch holds as `loss/<source>`."""
        scalars = {name: float(value) for name, value in metrics.items() if value.ndim == 0 and np.isfinite(value)}
        for source, loss, weight in zip(
            self._config.data.sources, metrics["source_loss"], metrics["source_weight"], strict=True
        ):
            if weight > 0:
                scalars[f"loss/{source.name}"] = float(loss)
        return scalars

    def _print(self, step: int) -> None:
        now, data, count = time.monotonic(), self._config.data, len(self._done)
        sums = {name: int(sum(metrics[name] for metrics in self._done)) for name in ("tokens", "images", "patches")}
        slots = count * data.rows
        done = Throughput(
            seconds=now - self._clock,
            steps=count,
            token_slots=slots * (data.visual_slots + data.text_slots),
            patch_slots=slots * data.patch_slots,
            data_wait=self._waited,
            **sums,
        )
        if self._log:
            self._log.write_timing(step, done)
        if jax.process_index() == 0:
            last = self.last
            print(progress_line(step, self._config.steps, last["loss"], last["learning_rate"], done), flush=True)
        self._clock, self._done, self._waited = now, [], 0.0

    def _check(self, step: _Step, metrics: dict[str, np.ndarray]) -> None:
        bad = [name for name in ("loss", "gradient_norm") if not math.isfinite(metrics[name])]
        if not bad:
            return
        samples = _samples(step.ids, self._config)
        path = Path(self._config.workdir) / f"not_finite_step_{step.number}_process_{jax.process_index()}.json"
        path.write_text(json.dumps({"step": step.number, "samples": samples}))
        shown = ", ".join(samples[:8]) + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
        raise UserError(
            f"step {step.number}: {bad[0]} is {metrics[bad[0]]}; samples of its batch: {shown} (all in {path}); "
            "nothing was saved since; look at these, or lower config.optimizer.peak_learning_rate in a new workdir"
        )


def _samples(ids: np.ndarray, config: Config) -> list[str]:
    """`<source>/<index>` of all samples in a batch."""
    segments, sources, samples = ids
    pairs = np.unique(np.stack([sources[segments > 0], samples[segments > 0]], axis=1), axis=0)
    return [f"{config.data.sources[source].name}/{sample}" for source, sample in pairs.tolist()]
