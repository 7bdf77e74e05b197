"""Record: one question of a benchmark, from whatever file, and what a scorer needs of it."""

import ast
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from navil_jax.errors import UserError
from navil_jax.evaluate.benchmarks.mmmu import OPEN
from navil_jax.evaluate.benchmarks.scoring import letters

Row = Mapping[str, Any]  # a line of a file: column -> text, number, list, or None where it is missing
ROTATION = 1_000_000  # added to the index of a question for each rotation of its options
LETTERS = "ABCDEFGHI"


@dataclasses.dataclass(frozen=True)
class Record:
    """A question to ask.

    Attributes:
      id: unique in its split.
      images: give a file's bytes or a path when they are called; in order.
      question: as published.
      hint: text that goes before the question; "" without one.
      options: letter -> text; empty for a question without a choice.
      line: what a scorer needs beside the prediction; without answers where they are hidden.
      row: all columns that are no image, as published: submission files repeat some.
    """

    id: str | int
    images: tuple[Callable[[], bytes | Path], ...]
    question: str
    line: Mapping[str, Any]
    hint: str = ""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    row: Row = dataclasses.field(default_factory=dict)


def text_of(value: Any) -> str:
    """A cell as text; "" for one that is missing."""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def literal_list(value: Any) -> list | None:
    """A list, or a text that is a Python list; None for all others."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return list(value) if isinstance(value, (list, tuple)) else None


def texts_of(value: Any) -> list[str]:
    """All answers of a cell: of a list, or the one that it is."""
    found = literal_list(value)
    return [str(one) for one in found] if found is not None else [str(value)]


def options_of(row: Row) -> dict[str, str]:
    """Options by letter: of the columns A to I, where missing ones are left out, or of a list."""
    listed = next((found for key in ("options", "choices") if (found := literal_list(row.get(key))) is not None), None)
    if listed is not None:
        return letters([str(one) for one in listed])
    return {letter: str(row[letter]) for letter in LETTERS if row.get(letter) is not None}


def letter_of(row: Row, options: Mapping[str, str]) -> str:
    """The right letter; files with a list of options give its place."""
    answer = text_of(row["answer"])
    return "ABCDEFGHI"[int(answer)] if answer.isdecimal() and answer not in options else answer


def _answers(row: Row) -> dict[str, Any]:
    value = row.get("answers", row.get("answer"))
    types = {key: row[key] for key in ("answer_type", "evidence", "operation/reasoning") if row.get(key) is not None}
    return {**types, **({} if value is None or literal_list(value) == [] else {"answers": texts_of(value)})}


def _answer(row: Row) -> dict[str, Any]:
    types = {"types": row["types"]} if row.get("types") else {}
    return {"answer": str(row["answer"]), **types} if row.get("answer") is not None else types


def _chart(row: Row) -> dict[str, Any]:
    listed = texts_of(row["answer"]) if row.get("image") is not None else []
    kind = text_of(row.get("type") or row.get("split"))
    names = {"test_human": "human_test", "test_augmented": "augmented_test"}
    return {"answer": listed[0] if len(listed) == 1 else str(row["answer"]), "type": names.get(kind, kind)}


def _choice(row: Row) -> dict[str, Any]:
    options = options_of(row)
    subject = row.get("subject") or row.get("l2-category")
    said = {"subject": str(subject)} if subject else {}
    return {"options": _listed(options), "answer": letter_of(row, options), **said}


def _listed(options: dict[str, str]) -> list[str] | dict[str, str]:
    """The texts; with their letters where one is missing between."""
    texts = list(options.values())
    return texts if letters(texts) == options else options


def _rotated(row: Row) -> dict[str, Any]:
    """A row of a question with rotations."""
    found: dict[str, Any] = {"index": int(row["index"]), **dict.fromkeys("ABCD"), **options_of(row)}
    kinds = {"l2-category": row.get("l2-category", row.get("L2-category")), "category": row.get("category")}
    answer = {"answer": str(row["answer"])} if row.get("answer") is not None else {}
    return found | answer | {key: str(value) for key, value in kinds.items() if value}


def _yes_no(row: Row) -> dict[str, Any]:
    image = row.get("question_id", row.get("image_path"))
    return {"answer": str(row["answer"]), "category": str(row["category"]), "question_id": str(image)}


def _ocr(row: Row) -> dict[str, Any]:
    dataset = {"dataset": row["dataset"]} if row.get("dataset") else {}
    return {
        "answer": texts_of(row["answer"]),
        "question_type": str(row.get("question_type") or row.get("category")),
        **dataset,
    }


def _exam(row: Row) -> dict[str, Any]:
    options, kind = options_of(row), row.get("question_type")
    kind = kind or ("multiple-choice" if options else OPEN)
    answer = row.get("answer")
    shown = {} if answer in (None, "?") else {"answer": str(answer)}  # "?" stands in the hidden split
    return {"id": str(row["id"]), "question_type": kind, "options": _listed(options), **shown}


def _maths(row: Row) -> dict[str, Any]:
    about = row.get("metadata") or row
    choices = literal_list(row.get("choices"))
    answer = text_of(row.get("answer"))
    option = row.get("answer_option")
    if option is None and choices and answer in choices:
        option = next(letter for letter, text in letters(choices).items() if text == answer)
    precision = text_of(row.get("precision"))
    return {
        "question_type": row["question_type"],
        "answer_type": row["answer_type"],
        "choices": choices or None,
        **({"answer": answer, "answer_option": option or ""} if answer else {}),
        "precision": float(precision) if precision else None,
        "task": text_of(about.get("task")),
        "skills": literal_list(about.get("skills")) or [],
    }


def _graded(row: Row) -> dict[str, Any]:
    kinds = row.get("capability") or row.get("category")
    answer = {"answer": str(row["answer"])} if row.get("answer") is not None else {}
    return {**answer, "capability": ",".join(kinds) if isinstance(kinds, list) else text_of(kinds)}


# Benchmark -> what its scorer needs of a row.
LINES: Mapping[str, Callable[[Row], dict[str, Any]]] = {
    "mmvet": _graded,
    "mmmu": _exam,
    "mmbench": _rotated,
    "mme": _yes_no,
    "mathvista": _maths,
    "ocrbench": _ocr,
    "ccbench": _rotated,
    "textvqa": _answers,
    "scienceqa": _choice,
    "gqa": _answer,
    "docvqa": _answers,
    "ai2d": _choice,
    "chartqa": _chart,
    "infovqa": _answers,
}
IDS = ("questionId", "question_id", "pid", "id", "index")


def make_record(
    benchmark: str, row: Row, images: Sequence[Callable[[], bytes | Path]], number: int, where: str, key: str = ""
) -> Record:
    """A record of a row.

    Args:
      number: of the row in its split, from 0: the id of rows that have none of their own.
      where: file and row, for messages.
      key: the column with the id; "": the first of `IDS` that there is, but for pairs that share one.

    Raises:
      UserError: a column is missing or holds something else.
    """
    shared = benchmark == "mme"  # two questions have one question_id
    key = key or next((name for name in IDS if row.get(name) is not None and not (shared and name != "index")), "")
    try:
        line = {"question": str(row["question"]), **LINES[benchmark](row)}
        options = {} if benchmark == "mathvista" else options_of(row)
    except KeyError as error:
        raise UserError(f"{where}: has no {error.args[0]}, which {benchmark} needs") from None
    except (ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise UserError(f"{where}: cannot be read as a question of {benchmark}: {error}") from None
    return Record(
        id=row[key] if key else number,
        images=tuple(images),
        question=str(row["question"]),
        line=line,
        hint=text_of(row.get("hint")),
        options=options,
        row={name: value for name, value in row.items() if not name.startswith(("image", "decoded_image"))},
    )
