"""Lines of requests -> lines of answers, in order, resumable."""

import dataclasses
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from navil_jax.console import Progress
from navil_jax.errors import UserError
from navil_jax.generate.assistant import Answer, Assistant, Question
from navil_jax.generate.messages import check_unicode, read_messages, read_number, read_stops
from navil_jax.generate.sampling import Sampler

SAMPLING = {"temperature": float, "top_k": int, "top_p": float, "seed": int, "repetition_penalty": float}
FIELDS = {"id", "prompt", "messages", "images", "max_new_tokens", "stop", "logprobs", *SAMPLING}


@dataclasses.dataclass(frozen=True)
class Lines:
    """Reads requests, one JSON object a line; see `docs/serving.md`.

    Args:
      folder: where the paths of images start.
      sampler, max_new_tokens: of requests that do not say them.
    """

    assistant: Assistant
    folder: Path
    sampler: Sampler
    max_new_tokens: int

    def read(self, text: bytes) -> tuple[Any, Question]:
        """A line's id, None if it has none, and what it asks. Raises `UserError` for what cannot be used."""
        fields = parse_line(text)
        if unknown := sorted(fields.keys() - FIELDS):
            raise UserError(f"{unknown[0]}: no such field; there are {', '.join(sorted(FIELDS))}")
        if ("prompt" in fields) == ("messages" in fields):
            raise UserError('give either "prompt" or "messages"')
        given = {name: read_number(fields, name, kind, None) for name, kind in SAMPLING.items()}
        given = {name: value for name, value in given.items() if value is not None}
        question = Question(
            self._prompt(fields),
            dataclasses.replace(self.sampler, **given),
            read_number(fields, "max_new_tokens", int, self.max_new_tokens),
            read_stops(fields.get("stop")),
            read_number(fields, "logprobs", int, None),
        )
        self.assistant.check(question)
        return fields.get("id"), question

    def _prompt(self, fields: dict[str, Any]) -> Any:
        images = fields.get("images", [])
        if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
            raise UserError("images: must be a list of paths")
        if "messages" in fields:
            talk = read_messages(fields["messages"])
            if images:
                raise UserError('images: go beside "prompt"; in "messages" an image is a part of its message')
            read = [self.assistant.read_image(self.folder / name) for name in talk.images]
            return self.assistant.with_system(talk.system).prompt(talk.history, talk.question, read)
        prompt = fields["prompt"]
        if not isinstance(prompt, str):
            raise UserError("prompt: must be a text")
        check_unicode(prompt, "prompt")
        if not prompt.strip() and not images:
            raise UserError("prompt: is empty; give a text or an image")
        return self.assistant.prompt((), prompt, [self.assistant.read_image(self.folder / name) for name in images])


def parse_line(text: bytes) -> dict[str, Any]:
    """The object of a line. Raises `UserError`."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(fields, dict):
        raise UserError("must be a JSON object")
    return fields


class Output:
    """The file of answers: whole lines of a command that was stopped stay, a half one is cut off.

    Raises:
      UserError: another process writes there.
    """

    def __init__(self, path: Path):
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another command writes there; wait for its end, or give another --out") from None
        self._file.seek(0)
        self.done = self.failed = 0  # lines, and those of them that hold an error
        size = 0
        for line in self._file:
            if line.endswith(b"\n"):
                size += len(line)
                self.done += 1
                self.failed += line.startswith(b'{"error": ')
        self._file.truncate(size)

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def add(self, line: dict[str, Any]) -> None:
        """Writes one line to the disk."""
        self._file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self._file.flush()
        self.done += 1
        self.failed += "error" in line


def answer_lines(lines: Lines, path: Path, output: Output) -> None:
    """Answers all lines of a file that the output does not have yet."""
    with path.open("rb") as file:
        total = sum(1 for _ in file)
    if output.done > total:
        raise UserError(f"the output has {output.done:,} lines, {path} has {total:,}; give another --out")
    errors: dict[int, dict[str, Any]] = {}
    with Progress("generate", total, "requests", done=output.done) as progress:
        for number, line in _answered(lines, path, output.done, errors):
            while output.done < number:
                output.add(errors.pop(output.done))
                progress.update(1)
            if line is not None:
                output.add(line)
                progress.update(1)


def _answered(
    lines: Lines, path: Path, done: int, errors: dict[int, dict[str, Any]]
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Numbers of lines, from 0, with their answers; errors of other lines are put into a dict. The end has none."""
    count = done

    def questions() -> Iterator[tuple[tuple[int, Any], Question]]:
        nonlocal count
        with path.open("rb") as file:
            for number, text in enumerate(file):
                if number < done:
                    continue
                try:
                    key, question = lines.read(text)
                    yield (number, number + 1 if key is None else key), question
                except UserError as error:
                    errors[number] = {"error": str(error), "id": _id_of(text, number)}
                count = number + 1

    for (number, key), answer in lines.assistant.answers(questions()):
        yield number, {"id": key, **_told(lines.assistant, answer)}
    yield count, None


def _id_of(text: bytes, number: int) -> Any:
    """The id of a line that cannot be used; where it has none, its number from 1."""
    try:
        return parse_line(text).get("id", number + 1)
    except UserError:
        return number + 1


def _told(assistant: Assistant, answer: Answer) -> dict[str, Any]:
    told: dict[str, Any] = {
        "text": answer.text,
        "reason": answer.reason,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": len(answer.tokens),
    }
    if answer.request.logprobs is not None:
        told["logprobs"] = [
            {
                "token": assistant.token_text(token.id),
                "logprob": token.logprob,
                "top": [[assistant.token_text(other), logprob] for other, logprob in token.top],
            }
            for token in answer.tokens
        ]
    return told
