"""Files that the servers of hidden splits take."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from navil_jax.evaluate.benchmarks import choices
from navil_jax.evaluate.benchmarks.mmmu import OPEN
from navil_jax.evaluate.questions.prompts import Style
from navil_jax.evaluate.questions.record import Record, text_of

LIST_KEYS = {
    "docvqa": ("questionId", "answer"),
    "infovqa": ("questionId", "answer"),
    "textvqa": ("question_id", "answer"),
    "gqa": ("questionId", "prediction"),
}
WHERE = {
    "docvqa": "rrc.cvc.uab.es, challenge 17, task 1",
    "infovqa": "rrc.cvc.uab.es, challenge 17, task 3",
    "textvqa": "EvalAI",
    "gqa": "GQA's eval.py",
    "mmbench": "mmbench.opencompass.org.cn/mmbench-submission, which takes xlsx: save the table as that",
    "mmmu": "EvalAI",
    "mmvet": "the Hugging Face space whyu/MM-Vet_Evaluator",
    "mathvista": "MathVista's authors",
}


def write_submission(
    benchmark: str, style: Style, records: Sequence[Record], answers: Mapping[str | int, str], folder: Path
) -> Path | None:
    """Writes what the benchmark's server takes; None if there is no such server.

    Args:
      answers: by the id of a record.
    """
    if benchmark not in WHERE:
        return None
    if benchmark == "mmbench":
        return _table(style, records, answers, folder / "submission.csv")
    content: object
    if benchmark in LIST_KEYS:
        key, name = LIST_KEYS[benchmark]
        content = [{key: _number(benchmark, record.id), name: answers[record.id]} for record in records]
    else:
        content = {_name(benchmark, record): _said(benchmark, record, answers[record.id]) for record in records}
    path = folder / "submission.json"
    path.write_text(json.dumps(content, ensure_ascii=False))
    return path


def _number(benchmark: str, key: str | int) -> str | int:
    """Ids of the document servers are numbers, those of GQA texts."""
    return str(key) if benchmark == "gqa" else int(key)


def _name(benchmark: str, record: Record) -> str:
    if benchmark == "mmvet" and isinstance(record.id, int):
        return f"v1_{record.id}"
    return str(record.line.get("id", record.id))


def _said(benchmark: str, record: Record, answer: str) -> str:
    """MMMU takes letters of choices."""
    if benchmark == "mmmu" and record.line["question_type"] != OPEN and answer.strip():
        return choices.internvl(answer, record.options)
    return answer


def _table(style: Style, records: Sequence[Record], answers: Mapping[str | int, str], path: Path) -> Path:
    """index, question, options, prediction, and the rest of the columns; predictions cleaned as InternVL does."""
    first = ("index", "question", "A", "B", "C", "D")
    rest = [name for name in (records[0].row if records else ()) if name not in first]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*first, "prediction", *rest])
        for record in records:
            answer = answers[record.id]
            if style == "internvl" and answer.strip():
                answer = choices.internvl(answer, record.options)
            cells = [text_of(record.row.get(name)) for name in first]
            writer.writerow([*cells, answer, *(text_of(record.row.get(name)) for name in rest)])
    return path
