"""Evaluator "benchmark": a benchmark while a run trains, asked and scored as `evaluate --benchmark` does."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from navil_jax.errors import UserError
from navil_jax.evaluate.answers import Ask, first_questions, lines_of
from navil_jax.evaluate.asking import Asking, Said, faults_of
from navil_jax.evaluate.benchmark_plan import Plan, make_plan
from navil_jax.evaluate.benchmarks.lines import report, scores_of
from navil_jax.evaluate.benchmarks.scoring import Score, headline
from navil_jax.evaluate.judge import ALWAYS
from navil_jax.evaluate.questions.prompts import make_prompt
from navil_jax.evaluate.questions.record import Record
from navil_jax.model.params import Params


class Scored(NamedTuple):
    """Lines with predictions, the score of each, the benchmark's own total, and what was said to each question."""

    lines: list[dict[str, Any]]
    scores: list[Score]
    total: float
    said: Sequence[Said]


@dataclasses.dataclass(frozen=True)
class BenchmarkScore(Asking):
    """Scores by the benchmark, data, split and protocol of its entry in the config."""

    def __post_init__(self) -> None:
        if self.plan.questions.layout.hidden or self.plan.benchmark.name in ALWAYS:
            why = "answers of this split are hidden" if self.plan.questions.layout.hidden else "it needs a judge"
            name = f"{self.plan.benchmark.name}, {self.plan.questions.split}"
            raise UserError(f"config.evaluators: {name}: {why}; use `python -m navil_jax.evaluate --benchmark`")

    @functools.cached_property
    def plan(self) -> Plan:
        (entry,) = self.config.evaluators
        if not entry.benchmark or not entry.data:
            raise UserError(
                "config.evaluators: benchmark: which one? Its entry needs `benchmark`, such as docvqa, and `data`"
            )
        try:
            return make_plan(entry.benchmark, entry.data, entry.split, entry.protocol)
        except UserError as error:
            raise UserError(f"config.evaluators: {str(error).removeprefix('--')}") from None

    @property
    def name(self) -> str:
        return f"{self.plan.benchmark.name}-{self.plan.questions.split}"

    def score(self, params: Params, limit: int = 0) -> Scored:
        """Asks the first `limit` questions, with all their rotations (0: all)."""
        plan = self.plan
        records = first_questions(plan.questions.records, limit)
        said = self.answers(params, records, self._ask, plan.most_tokens)
        texts = {record.id: one.text for record, one in zip(records, said, strict=True)}
        lines = lines_of(records, texts)
        total = headline(report(plan.benchmark, lines, plan.protocol)["total"])
        return Scored(lines, scores_of(plan.benchmark, lines, plan.protocol), total, said)

    def _ask(self, record: Record) -> Ask:
        prompt = make_prompt(self.plan.benchmark.name, self.plan.style, record)
        return Ask(record.id, prompt, tuple(image() for image in record.images))

    def metrics(self, scores: Scored) -> dict[str, float]:
        """eval/<benchmark>-<split>/<protocol>, on the benchmark's own scale."""
        return {f"eval/{self.name}/{self.plan.protocol}": scores.total}

    def report(self, scores: Scored, folder: Path, final: bool) -> str:
        """Writes <benchmark>-<split>-<protocol>.jsonl: each question with the newest prediction and its score."""
        lines = [line | {"score": score} for line, score in zip(scores.lines, scores.scores, strict=True)]
        path = folder / f"{self.name}-{self.plan.protocol}.jsonl"
        text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
        path.write_text(text, errors="replace")
        return "\n".join([super().report(scores, folder, final), *faults_of(scores.said)])
