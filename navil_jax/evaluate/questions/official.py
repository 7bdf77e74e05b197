"""Files as their makers publish them, with images in a folder: JSON, JSON lines, and MME's release."""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from navil_jax.data.formats.records import parse_json, reason
from navil_jax.errors import UserError
from navil_jax.evaluate.questions.record import Record, Row, make_record

IMAGE_NAMES = ("image", "image_local_name", "imagename")
CHOICES = "\nA. "  # where the options begin in the questions of InternVL's AI2D file


def read_json(path: Path, benchmark: str) -> list[Record]:
    """All questions of a .json or .jsonl file; images are looked for beside it, by the end of their path.

    Raises:
      UserError: broken, or of another form.
    """
    try:
        rows = list(_lines(path) if path.suffix == ".jsonl" else _whole(path))
    except ValueError as error:
        raise UserError(f"{path}: {reason(error)}") from None
    return [_record(path, benchmark, row, number) for number, row in enumerate(rows)]


def _lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                yield parse_json(line)
            except ValueError as error:
                raise UserError(f"{path}: line {number}: {reason(error)}") from None


def _whole(path: Path) -> Iterator[Row]:
    """{"data": [...]} of the document servers, or {id: {...}} of MM-Vet."""
    content = parse_json(path.read_bytes())
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        yield from content["data"]
    elif isinstance(content, dict) and all(isinstance(row, dict) for row in content.values()):
        yield from ({"question_id": key, **row} for key, row in content.items())
    else:
        raise UserError(f'{path}: is neither {{"data": [..]}} nor {{id: {{..}}}}')


def _record(path: Path, benchmark: str, row: Any, number: int) -> Record:
    where = f"{path}: entry {number + 1}"
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be a JSON object, not {json.dumps(row)[:60]}")
    name = next((row[key] for key in IMAGE_NAMES if isinstance(row.get(key), str)), None)
    images: list[Callable[[], Path]] = [functools.partial(_found, path, name, where)] if name else []
    row = {**row, "question": row.get("question", row.get("text"))}
    if row["question"] is None:
        raise UserError(f"{where}: has no question")
    if benchmark == "ai2d" and "options" not in row:
        row = {**row, **_with_options(row["question"], where)}
    if benchmark == "chartqa":
        row["type"] = "augmented_test" if "augmented" in path.name else "human_test"
    return make_record(benchmark, row, images, number, where)


def _with_options(question: str, where: str) -> dict[str, Any]:
    """Question and options of a text with both: `Which?\\nA. one\\nB. two\\nAnswer with ..`"""
    start = question.find(CHOICES)
    lines = question[start + 1 :].split("\n")[:-1] if start >= 0 else []
    options = [line[3:] for line, letter in zip(lines, "ABCDE", strict=False) if line.startswith(f"{letter}. ")]
    if not options or len(options) != len(lines):
        raise UserError(f"{where}: question: has no options in lines of the form A. ..")
    return {"question": question[:start], "options": options}


def _found(path: Path, name: str, where: str) -> Path:
    """The image file: under the folder of the list, its parents, or with fewer of its first folders."""
    parts = Path(name).parts
    for folder in (path.parent, *path.absolute().parents[1:3]):
        for start in range(len(parts)):
            if (file := folder.joinpath(*parts[start:])).is_file():
                return file
            if (file := folder.joinpath("images", *parts[start:])).is_file():
                return file
    raise UserError(f"{where}: image: {name} is not found beside {path}; put its folder there")


def read_mme_release(folder: Path) -> list[Record]:
    """MME as released: a text file for each category, a folder of images of the same name.

    Raises:
      UserError: a line without image, question and answer.
    """
    found: list[Record] = []
    lists = sorted((*folder.glob("Your_Results/*.txt"), *folder.glob("eval_tool/Your_Results/*.txt")))
    for path in lists:
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not text.strip():
                continue
            where = f"{path}: line {number}"
            cells = text.split("\t")
            if len(cells) < 3:
                raise UserError(f"{where}: needs image, question and answer with tabs between them")
            image, question, answer = cells[:3]
            row = {"question": question, "answer": answer, "category": path.stem, "question_id": f"{path.stem}/{image}"}
            place = folder / path.stem / image
            images = [functools.partial(_release_image, place, where)]
            found.append(make_record("mme", row, images, len(found), where))
    return found


def _release_image(place: Path, where: str) -> Path:
    inner = place.parent / "images" / place.name
    if not (place.is_file() or inner.is_file()):
        raise UserError(f"{where}: image: no such file {place}")
    return place if place.is_file() else inner
