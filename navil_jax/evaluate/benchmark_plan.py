"""What of a benchmark is asked and how it is scored, decided before a model is loaded."""

import dataclasses
from pathlib import Path
from typing import Any

from navil_jax.errors import UserError
from navil_jax.evaluate.answers import lines_of
from navil_jax.evaluate.benchmarks.catalogue import benchmark_named, protocol_of
from navil_jax.evaluate.benchmarks.lines import first_fault
from navil_jax.evaluate.benchmarks.scoring import Benchmark
from navil_jax.evaluate.judge import ALWAYS, SOMETIMES, Judge
from navil_jax.evaluate.questions.layouts import Questions, read_questions
from navil_jax.evaluate.questions.prompts import Style, most_tokens, style_of


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured."""

    benchmark: Benchmark
    protocol: str
    questions: Questions
    limit: int
    judge: Judge | None

    @property
    def style(self) -> Style:
        return style_of(self.protocol)

    @property
    def most_tokens(self) -> int:
        return most_tokens(self.benchmark.name, self.style)


def make_plan(name: str, data: str, split: str, protocol: str, limit: int = 0, judge: Judge | None = None) -> Plan:
    """Reads the questions.

    Args:
      split, protocol: empty: the default ones.

    Raises:
      UserError: names the option of the command that is wrong; questions that cannot be read.
    """
    benchmark = benchmark_named(name)
    protocol = protocol_of(benchmark, protocol) if protocol else benchmark.primary
    if judge and benchmark.name in SOMETIMES:
        protocol = protocol if protocol.endswith("_judge") else f"{protocol.replace('_static', '')}_judge"
    if judge and (benchmark.name not in (*ALWAYS, *SOMETIMES) or protocol not in benchmark.protocols):
        raise UserError(f"--judge: {benchmark.name} asks no judge under the protocol {protocol}; leave it out")
    if not judge and protocol.endswith("_judge"):
        raise UserError(f"--protocol {protocol}: needs a judge; give --judge URL --judge-model NAME")
    questions = read_questions(benchmark.name, Path(data), split)
    if not questions.layout.hidden:
        _check_answers(benchmark, questions)
    return Plan(benchmark, protocol, questions, limit, judge)


def _check_answers(benchmark: Benchmark, questions: Questions) -> None:
    """Says before a model is asked what a scorer would miss."""
    replies: dict[str, Any] = {"judge_replies": []} if benchmark.name in ALWAYS else {}
    for line in lines_of(questions.records, {record.id: "" for record in questions.records}):
        if fault := first_fault({**line, **replies}, benchmark):
            files = ", ".join(map(str, questions.files))
            raise UserError(f"{files}: question {line['id']}: {fault}; answers are needed for a score")
