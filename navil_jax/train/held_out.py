"""Evaluator "held_out": teacher-forced losses and accuracies of held-out samples, and their table.

A sample's answer is right if every target with a loss weight is the likeliest token when the true tokens before it are
given. That is exactly when greedy decoding writes the whole answer, with the token that ends it: up to the first wrong
token both see the same tokens, and one wrong token makes either wrong. What decoding would write after the first wrong
token is not known, so a wrong answer is kept up to that token.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from navil_jax.config import Config
from navil_jax.console import Progress
from navil_jax.data.images import load_image
from navil_jax.data.pipeline import check_held_out, evaluation_batches
from navil_jax.data.prompt import response_text
from navil_jax.data.sample import Source, usable_samples
from navil_jax.data.sources import has_split, open_source
from navil_jax.data.tokenizers import Tokenizer
from navil_jax.data.toy.baselines import commonest_answer, question_only
from navil_jax.data.watchdog import Watchdog
from navil_jax.model.params import Params
from navil_jax.train.evaluators import Evaluator, draw, varied
from navil_jax.train.metrics import Answer
from navil_jax.train.step import EvalScores, global_batch, make_eval_step

SHOWN_ANSWERS = 16
NO_BETTER = "It answers no better than without the image"
MASTERED, GUESSED = 0.6, 0.1  # of what the baselines leave open: from here on it is learned, and up to here it is not


@dataclasses.dataclass(frozen=True)
class SampleScore:
    """One held-out sample."""

    source: int  # number in config.data.sources
    sample: int  # index in its source
    right: bool
    loss: float  # sum over targets of weight * cross-entropy
    weight: float  # sum of weights
    answer: tuple[int, ...]  # likeliest tokens at the targets with a weight, up to the first wrong one
    tokens: tuple[int, int]  # targets with a weight: how many of them are the likeliest token, and how many there are


def score_samples(scores: EvalScores) -> list[SampleScore]:
    """Groups the slots of a batch by sample, in packing order.

    Args:
      scores: arrays [B, T] on the host.

    Example: one row, segments 1 1 2 0, weights 1 1 1 0, targets 5 6 7 -1, predictions 5 0 7 3
      -> sample of segment 1 wrong with answer (5, 0), sample of segment 2 right with answer (7,)
    """
    found = []
    for row in range(len(scores.segment_ids)):
        for segment in range(1, scores.segment_ids[row].max(initial=0) + 1):
            slots = (scores.segment_ids[row] == segment) & (scores.loss_weights[row] > 0)
            if not slots.any():
                continue
            weights, answer = scores.loss_weights[row, slots], scores.predictions[row, slots]
            correct = answer == scores.targets[row, slots]
            known = len(answer) if correct.all() else int(np.argmin(correct)) + 1
            found.append(
                SampleScore(
                    source=int(scores.source_ids[row, slots][0]),
                    sample=int(scores.sample_ids[row, slots][0]),
                    right=bool(correct.all()),
                    loss=float(np.sum(weights * scores.cross_entropy[row, slots], dtype=np.float64)),
                    weight=float(np.sum(weights, dtype=np.float64)),
                    answer=tuple(answer[:known].tolist()),
                    tokens=(int(correct.sum()), len(correct)),
                )
            )
    return found


class HeldOut(Evaluator):
    """Scores the held-out split of every source of a config."""

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, tokenizer: Tokenizer):
        self._config, self._mesh, self._tokenizer = config, mesh, tokenizer
        held_out = {i: entry for i, entry in enumerate(config.data.sources) if has_split(entry, "test")}
        self._names = {i: entry.name for i, entry in held_out.items()}
        self._sources: dict[int, Source] = {i: open_source(entry, "test") for i, entry in held_out.items()}
        check_held_out(config, self._sources, tokenizer)
        self._step = make_eval_step(config, mesh)
        self._left_out: dict[str, tuple[int, int]] = {}  # of the last scores: source -> samples without, and asked for
        self._kinds: dict[tuple[int, int], str] = {}

    def score(self, params: Params, limit: int = 0) -> list[SampleScore]:
        """Scores the first `limit` held-out samples of every source (0: all). Every process gets all scores."""
        place = (jax.process_index(), jax.process_count())
        found: list[SampleScore] = []
        asked = {number: min(limit or len(source), len(source)) for number, source in self._sources.items()}
        bar = Progress("held out", sum(asked.values()), "samples", shown=place[0] == 0)
        with Watchdog() as watchdog, bar as progress:
            for number, source in self._sources.items():
                before = len(found)
                batches = evaluation_batches(self._config, source, self._tokenizer, number, limit, *place)
                for batch in watchdog.over(batches):
                    scores = score_samples(jax.device_get(self._step(params, global_batch(batch, self._mesh))))
                    found += scores
                    progress.update(len(scores))
                without = asked[number] - (len(found) - before)
                progress.update(without)
                self._left_out[self._names[number]] = without, asked[number]
        return found

    def metrics(self, scores: Sequence[SampleScore]) -> dict[str, float]:
        """eval/<source>/loss, /accuracy (of whole answers), /token_accuracy, and eval/<source>/<kind>/accuracy."""
        values = losses(scores, self._names) | token_accuracies(scores, self._names)
        totals: defaultdict[int, np.ndarray] = defaultdict(lambda: np.zeros(2))
        for (source, kind), (right, asked) in accuracies(scores, self._kinds_of(scores)).items():
            totals[source] += (right, asked)
            values[f"eval/{self._names[source]}/{kind}/accuracy"] = right / asked
        return values | {f"eval/{self._names[s]}/accuracy": right / asked for s, (right, asked) in totals.items()}

    def report(self, scores: Sequence[SampleScore], folder: Path, final: bool) -> str:
        """Draws answers.png; at the end writes evaluation.md too, and gives its table. Else the accuracies by kind."""
        draw("plot_answers", folder / "answers.png", self.answers(scores, SHOWN_ANSWERS))
        if not final:
            kinds = {name: value for name, value in self.metrics(scores).items() if name.count("/") == 2}
            return "  ".join([*(f"{name} {value:.4f}" for name, value in kinds.items()), *self._gaps()])
        rows = self.rows(scores)
        text = "\n\n".join([table(rows), *learned(rows), *self._gaps()])
        (folder / "evaluation.md").write_text(text + "\n")
        return text

    def _gaps(self) -> Iterator[str]:
        """What is to be said of samples that could not be scored."""
        for name, (without, asked) in self._left_out.items():
            if without:
                yield f"{name}: {without:,} of {asked:,} held-out samples are not scored, as they are bad or fit no row"

    def rows(self, scores: Sequence[SampleScore]) -> list["Row"]:
        """The table of accuracies, beside what can be scored without looking at the images."""
        counts = accuracies(scores, self._kinds_of(scores))
        rows = []
        for number, name in self._names.items():
            held_out = [self._sources[number][score.sample] for score in scores if score.source == number]
            source = open_source(self._config.data.sources[number], "train")
            train = itertools.islice(usable_samples(source), self._config.eval_baseline_samples)
            commonest, blind = commonest_answer(held_out), question_only(train, held_out)
            for (of, kind), (right, asked) in counts.items():
                if of == number:
                    rows.append(Row(name, kind, asked, right / asked, commonest[kind], blind[kind]))
        return rows

    def answers(self, scores: Sequence[SampleScore], count: int) -> list[Answer]:
        """Some scores of each source, as images with the model's answers."""
        shown = []
        for number, source in self._sources.items():
            of_source = [score for score in scores if score.source == number]
            each = -(-count // len(self._sources))
            for score in varied(of_source, lambda one, source=source: source[one.sample], each):  # type: ignore[misc]
                sample = source[score.sample]
                image = load_image(sample.images[0]) if sample.images else None
                question, truth = sample.turns[-1]
                answer = response_text(self._tokenizer, score.answer) + ("" if score.right else " ...")
                shown.append(Answer(image, question, answer, truth, score.right))
        return shown

    def _kinds_of(self, scores: Sequence[SampleScore]) -> dict[tuple[int, int], str]:
        for score in scores:
            if (score.source, score.sample) not in self._kinds:
                self._kinds[score.source, score.sample] = self._sources[score.source][score.sample].kind
        return self._kinds


def losses(scores: Sequence[SampleScore], sources: Mapping[int, str]) -> dict[str, float]:
    """Weighted loss of every source that has samples: {"eval/<source>/loss": ...}."""
    sums: defaultdict[int, np.ndarray] = defaultdict(lambda: np.zeros(2))
    for score in scores:
        sums[score.source] += (score.loss, score.weight)
    return {f"eval/{sources[source]}/loss": float(loss / weight) for source, (loss, weight) in sorted(sums.items())}


def token_accuracies(scores: Sequence[SampleScore], sources: Mapping[int, str]) -> dict[str, float]:
    """Share of targets that are the likeliest token, which says more of long texts than whole answers do."""
    sums: defaultdict[int, np.ndarray] = defaultdict(lambda: np.zeros(2))
    for score in scores:
        sums[score.source] += score.tokens
    return {f"eval/{sources[s]}/token_accuracy": float(right / asked) for s, (right, asked) in sorted(sums.items())}


def accuracies(scores: Sequence[SampleScore], kinds: Mapping[tuple[int, int], str]) -> dict[tuple[int, str], tuple]:
    """(source, kind) -> (right answers, samples); `kinds` says the kind of (source, sample)."""
    counts: defaultdict[tuple[int, str], np.ndarray] = defaultdict(lambda: np.zeros(2, int))
    for score in scores:
        counts[score.source, kinds[score.source, score.sample]] += (score.right, 1)
    return {key: (int(right), int(asked)) for key, (right, asked) in sorted(counts.items())}


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table of accuracies; shares lie between 0 and 1."""

    source: str
    kind: str
    samples: int
    accuracy: float
    commonest_answer: float  # of the best constant answer
    question_only: float  # of the most frequent training answer to the same question

    @property
    def gained(self) -> float:
        """How much of what the baselines leave open is right: 1 all of it, 0 or less: no better than without images."""
        baseline = max(self.commonest_answer, self.question_only)
        return (self.accuracy - baseline) / (1 - baseline) if baseline < 1 else float(self.accuracy == 1) - 1


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| source | kind | samples | accuracy | commonest answer | question only |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        shares = " | ".join(f"{100 * share:.1f}%" for share in (row.accuracy, row.commonest_answer, row.question_only))
        lines.append(f"| {row.source} | {row.kind} | {row.samples} | {shares} |")
    return "\n".join(lines)


def learned(rows: Iterable[Row]) -> list[str]:
    """What a model can do and what not, in up to three sentences: all rows by what they gain on the baselines."""
    found: dict[str, list[str]] = {"It answers": [], "It answers in part": [], NO_BETTER: []}
    for row in sorted(rows, key=lambda row: -row.gained):
        part = "It answers" if row.gained >= MASTERED else "It answers in part" if row.gained > GUESSED else NO_BETTER
        found[part].append(f"{row.source} {row.kind} ({row.accuracy:.0%})")
    return [f"{part}: {', '.join(names)}." for part, names in found.items() if names]
