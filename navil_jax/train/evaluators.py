"""Evaluators: what is measured of a model while it trains, at the end, and by `python -m navil_jax.evaluate`.

To add one, write a class like `Evaluator` and name it in `config.evaluators`: by a key of `EVALUATORS`, or as
"package.module:Class".
"""

import abc
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from PIL import Image

from navil_jax.config import Config, EvaluatorConfig
from navil_jax.config.flags import named_object
from navil_jax.console import say
from navil_jax.data.sample import Sample
from navil_jax.data.tokenizers import Tokenizer
from navil_jax.errors import UserError
from navil_jax.model.params import Params
from navil_jax.paths import RunFiles
from navil_jax.train.metrics import MetricsLog, read_log
from navil_jax.train.step import TrainState

EVALUATORS = {
    "held_out": "navil_jax.train.held_out:HeldOut",
    "generated": "navil_jax.evaluate.generated:Generated",
    "benchmark": "navil_jax.evaluate.benchmark_score:BenchmarkScore",
    "captions": "navil_jax.evaluate.captions:Captions",
}
OF_ENTRY = ("benchmark", "data", "split", "protocol")  # fields of an entry that say what is measured
CANDIDATES = 8  # that are looked at for each answer shown
Score = TypeVar("Score")
USED = {"benchmark": OF_ENTRY, "captions": ("data",)}  # by which evaluator


class Evaluator(abc.ABC):
    """Measures a model. It is made once for a run, from a config whose `evaluators` are its own entry alone."""

    @abc.abstractmethod
    def __init__(self, config: Config, mesh: jax.sharding.Mesh, tokenizer: Tokenizer) -> None: ...

    @abc.abstractmethod
    def score(self, params: Params, limit: int = 0) -> Any:
        """The scores of the first `limit` held-out samples of every source (0: all). Runs on every process."""

    @abc.abstractmethod
    def metrics(self, scores: Any) -> dict[str, float]:
        """What is logged: names that start with eval/."""

    def report(self, scores: Any, folder: Path, final: bool) -> str:
        """Writes files about the scores, on the first process; gives what is printed of them."""
        return "  ".join(f"{name} {value:.4f}" for name, value in self.metrics(scores).items())


def make_evaluator(entry: EvaluatorConfig, config: Config, mesh: jax.sharding.Mesh, tokenizer: Tokenizer) -> Evaluator:
    """The evaluator of an entry, whose name is one of `EVALUATORS` or "package.module:Class".

    Raises:
      UserError: there is no such evaluator, or it cannot use its entry.
    """
    for field in OF_ENTRY:
        if getattr(entry, field) and field not in USED.get(entry.name, OF_ENTRY if ":" in entry.name else ()):
            raise UserError(f"config.evaluators: {entry.name}: {field} has no effect; leave it out")
    own = dataclasses.replace(config, evaluators=(entry,))
    return named_object(entry.name, EVALUATORS, "config.evaluators")(own, mesh, tokenizer)


def draw(name: str, path: Path, *content: Any) -> None:
    """Draws a PNG with a function of `train.plots`; without matplotlib, which nothing else here needs, only says so."""
    try:
        from navil_jax.train import plots
    except ModuleNotFoundError as error:
        say(f"{path.name}: not drawn, as the package {error.name} is missing; pip install matplotlib")
        return
    getattr(plots, name)(path, *content)


def varied(scores: Sequence[Score], sample_of: Callable[[Score], Sample], count: int) -> list[Score]:
    """Some of the scores, evenly spread, whose images, questions and answers repeat as little as can be.

    Args:
      sample_of: the sample that a score is of; it is read for `CANDIDATES` times as many as are chosen.
    """
    places = np.unique(np.linspace(0, len(scores) - 1, min(len(scores), CANDIDATES * count)).astype(int)).tolist()
    candidates = [(scores[place], _seen_in(sample_of(scores[place]))) for place in places]
    seen: Counter[Hashable] = Counter()
    chosen: list[int] = []
    while len(chosen) < min(count, len(candidates)):
        left = (n for n in range(len(candidates)) if n not in chosen)
        best = min(left, key=lambda n: sum(seen[one] for one in candidates[n][1]))
        seen.update(candidates[best][1])
        chosen.append(best)
    return [candidates[n][0] for n in sorted(chosen)]


def _seen_in(sample: Sample) -> list[Hashable]:
    """What shall not be shown twice: image, question, truth."""
    images = (one.tobytes() if isinstance(one, Image.Image) else one for one in sample.images[:1])
    return [*(("image", hash(one)) for one in images), *zip(("question", "truth"), sample.turns[-1], strict=True)]


class Evaluations:
    """The evaluators of a run, when they are due, into its log and folder.

    Args:
      log: None on all processes but the first.
      say: prints a line.
    """

    def __init__(
        self,
        config: Config,
        mesh: jax.sharding.Mesh,
        tokenizer: Tokenizer,
        files: RunFiles,
        log: MetricsLog | None,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._files, self._log, self._say = config, files, log, say
        made = [(entry, make_evaluator(entry, config, mesh, tokenizer)) for entry in config.evaluators]
        self._evaluators: list[tuple[EvaluatorConfig, Evaluator]] = made

    def due(self, step: int) -> bool:
        """Whether an evaluator runs after this step."""
        return any(self._is_due(entry, step) for entry, _ in self._evaluators)

    def run(self, state: TrainState, step: int) -> dict[str, float]:
        """Scores some held-out samples with the evaluators that are due; gives what is logged, on the first process."""
        self._say(f"step {step}: evaluating")
        measured: dict[str, float] = {}
        for entry, evaluator in self._evaluators:
            if self._is_due(entry, step):
                samples = self._config.eval_samples if entry.samples is None else entry.samples
                scores = evaluator.score(self._params(state), samples)
                if self._log:
                    values = evaluator.metrics(scores)
                    measured |= values
                    self._log.write(step, values)
                    self._say(evaluator.report(scores, self._files.local, final=False))
        self._draw_losses(step)
        return measured

    def finish(self, state: TrainState) -> None:
        """Scores all held-out samples with every evaluator, and draws the loss curve."""
        self._say("evaluating on all held-out samples")
        began, step, folder = time.monotonic(), int(state.step), self._files.local
        for _, evaluator in self._evaluators:
            scores = evaluator.score(self._params(state))
            if self._log:
                values = evaluator.metrics(scores)
                before = [line for line in read_log(folder / "metrics.jsonl") if line["step"] == step]
                if {"step": step} | values not in before:
                    self._log.write(step, values)
                self._say(evaluator.report(scores, folder, final=True))
        self._draw_losses(step)
        if self._log:
            self._say(f"evaluated in {time.monotonic() - began:.0f} s")

    def _draw_losses(self, step: int) -> None:
        if self._log:
            title = f"{self._files.folder.name}, {step:,} steps"
            draw("plot_losses", self._files.local / "loss.png", read_log(self._files.local / "metrics.jsonl"), title)

    def _is_due(self, entry: EvaluatorConfig, step: int) -> bool:
        every = self._config.eval_every if entry.every is None else entry.every
        return every > 0 and step % every == 0

    def _params(self, state: TrainState) -> Params:
        return state.averaged_params if self._config.eval_ema else state.params
