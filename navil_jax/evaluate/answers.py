"""Answers of a model to the questions of a benchmark, kept in a file as they come."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from navil_jax.console import Progress
from navil_jax.data.images import load_image
from navil_jax.errors import UserError
from navil_jax.evaluate.journal import Journal
from navil_jax.evaluate.processes import on_first, preempted, together
from navil_jax.evaluate.questions.prompts import Style, make_prompt
from navil_jax.evaluate.questions.record import ROTATION, Record
from navil_jax.generate.assistant import Assistant, Question

BLOCK = 1 << 20  # bytes of a file that are hashed at once


@dataclasses.dataclass(frozen=True)
class Ask:
    """One question as the model gets it."""

    id: str | int
    prompt: str
    images: tuple[bytes | Path | Image.Image, ...]


def generate(assistant: Assistant, asks: Iterable[Ask], most_tokens: int) -> Iterator[tuple[Ask, str]]:
    """Greedy answers in order, without blanks around them. The one place where a benchmark meets the engine."""

    def question(ask: Ask) -> Question:
        images = [assistant.read_image(load_image(image, f"image of question {ask.id}")) for image in ask.images]
        return Question(assistant.prompt((), ask.prompt, images), max_new_tokens=most_tokens)

    for ask, answer in assistant.answers((ask, question(ask)) for ask in asks):
        yield ask, answer.text.strip()


def answered(
    assistant: Assistant,
    benchmark: str,
    style: Style,
    records: Sequence[Record],
    most_tokens: int,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[dict[str, Any]]:
    """What the journal keeps of every question, in order, on every process; `stopped` as in `processes.together`."""

    def work(records: Sequence[Record]) -> Iterator[dict[str, Any]]:
        asks = (
            Ask(record.id, make_prompt(benchmark, style, record), tuple(image() for image in record.images))
            for record in records
        )
        for ask, answer in generate(assistant, asks, most_tokens):
            yield {"id": ask.id, "prompt": ask.prompt, "images": len(ask.images), "prediction": answer}

    return together(records, work, stopped)


def answer_all(
    assistant: Assistant, benchmark: str, style: Style, records: Sequence[Record], most_tokens: int, path: Path
) -> dict[str | int, str]:
    """Answers by id, on every process; what the file has, which the first one writes, is not asked again."""
    with contextlib.ExitStack() as stack:
        journals: list[Journal] = []  # one on the first process, else none

        def known() -> list[tuple[str | int, str]]:
            journals.append(stack.enter_context(Journal(path)))
            found = ((record.id, journals[0].get(record.id)) for record in records)
            return [(key, entry["prediction"]) for key, entry in found if entry is not None]

        answers = dict(on_first(known))
        new = [record for record in records if record.id not in answers]
        bar = (
            Progress(benchmark, len(records), "questions", done=len(answers)) if journals else contextlib.nullcontext()
        )
        with bar as progress:
            for entry in answered(assistant, benchmark, style, new, most_tokens, preempted):
                answers[entry["id"]] = entry["prediction"]
                if progress is not None:
                    journals[0].add(entry)
                    progress.update(1)
    return {record.id: answers[record.id] for record in records}


def first_questions(records: Sequence[Record], limit: int) -> list[Record]:
    """The first questions with all their rotations; 0: all."""
    if not limit:
        return list(records)
    groups = dict.fromkeys(group_of(record) for record in records)
    kept = set(list(groups)[:limit])
    return [record for record in records if group_of(record) in kept]


def group_of(record: Record) -> str | int:
    """What rotations of one question share."""
    index = record.line.get("index")
    return index % ROTATION if isinstance(index, int) else record.id


def lines_of(records: Sequence[Record], answers: Mapping[str | int, str]) -> list[dict[str, Any]]:
    """Lines for the scorer; the rotations of a question are rows of one."""
    lines: dict[str | int, dict[str, Any]] = {}
    for record in records:
        line = {**record.line, "prediction": answers[record.id]}
        if "index" not in line:
            lines[record.id] = {"id": record.id, **line}
            continue
        about: dict[str, Any] = {key: line.pop(key) for key in ("question", "category", "l2-category") if key in line}
        group = lines.setdefault(group_of(record), {"id": group_of(record), "hint": record.hint, **about, "passes": []})
        if line["index"] < ROTATION:
            group |= about
        group["passes"].append(line)
    return list(lines.values())


def hash_of(files: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        try:
            with path.open("rb") as file:
                while block := file.read(BLOCK):
                    digest.update(block)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()
