"""Lines of requests -> lines of answers, in order, resumable."""

import dataclasses
import fcntl
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from navil_jax.config.plain import unique_keys
from navil_jax.console import Progress
from navil_jax.data.images import ImagePatches
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
            read = self._read(talk.images)
            return self.assistant.with_system(talk.system).prompt(talk.history, talk.question, read)
        prompt = fields["prompt"]
        if not isinstance(prompt, str):
            raise UserError("prompt: must be a text")
        check_unicode(prompt, "prompt")
        if not prompt.strip() and not images:
            raise UserError("prompt: is empty; give a text or an image")
        return self.assistant.prompt((), prompt, self._read(images))

    def _read(self, names: Sequence[str]) -> list[ImagePatches]:
        for name in names:
            if not name or "://" in name or name.startswith("data:"):
                raise UserError(f"image {name[:80]!r}: must be the path of a file")
        return [self.assistant.read_image(self.folder / name) for name in names]


def parse_line(text: bytes) -> dict[str, Any]:
    """The object of a line. Raises `UserError`."""
    try:
        fields = json.loads(text.decode("utf-8-sig"), object_pairs_hook=unique_keys, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(fields, dict):
        raise UserError("must be a JSON object")
    return fields


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


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
        self._file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        self._file.flush()
        self.done += 1
        self.failed += "error" in line


def answer_lines(lines: Lines, path: Path, output: Output) -> None:
    """Answers all requests of a file that the output does not have yet."""
    total = sum(1 for _ in _requests(path))
    if not total:
        raise UserError(f"{path}: holds no requests; give one JSON object a line")
    if output.done > total:
        raise UserError(f"the output has {output.done:,} lines, {path} has {total:,}; give another --out")
    errors: dict[int, dict[str, Any]] = {}
    with Progress("generate", total, "requests", done=output.done) as progress:
        for place, line in _answered(lines, path, output.done, errors):
            while output.done < place:
                output.add(errors.pop(output.done))
                progress.update(1)
            if line is not None:
                output.add(line)
                progress.update(1)


def _requests(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers from 1, but for blank ones, which hold nothing."""
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                yield number, text


def _answered(
    lines: Lines, path: Path, done: int, errors: dict[int, dict[str, Any]]
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Places of requests, from 0, with their answers; errors of others are put into a dict. The end has none."""
    count = done

    def questions() -> Iterator[tuple[tuple[int, Any], Question]]:
        nonlocal count
        for place, (number, text) in enumerate(_requests(path)):
            if place < done:
                continue
            try:
                key, question = lines.read(text)
                yield (place, number if key is None else key), question
            except UserError as error:
                errors[place] = {"error": str(error), "id": _id_of(text, number)}
            count = place + 1

    for (place, key), answer in lines.assistant.answers(questions()):
        yield place, {"id": key, **_told(lines.assistant, answer)}
    yield count, None


def _id_of(text: bytes, number: int) -> Any:
    """The id of a line that cannot be used; where it has none, its number."""
    try:
        key = parse_line(text).get("id")
    except UserError:
        key = None
    return number if key is None else key


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
