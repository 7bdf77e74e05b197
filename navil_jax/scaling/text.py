"""The text that a study's language models learn: Python's documentation, without the pieces that `pages` shows."""

import json
from pathlib import Path

from navil_jax.data.documentation import HELD_OUT_EVERY, pieces
from navil_jax.data.pages import is_for_pages


def write_corpus(folder: Path, most_bytes: int) -> None:
    """Writes train.jsonl and held_out.jsonl, a record {"text": ...} per piece; nothing if they are there.

    Raises:
      UserError: this Python brings no documentation.
    """
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    if train.exists():
        return
    found = pieces(most_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    held_out.write_text("".join(_line(piece) for piece in found[::HELD_OUT_EVERY]))
    rest = (piece for number, piece in enumerate(found) if number % HELD_OUT_EVERY and not is_for_pages(number))
    temporary = train.with_suffix(".tmp")
    temporary.write_text("".join(_line(piece) for piece in rest))
    temporary.replace(train)


def _line(piece: str) -> str:
    return json.dumps({"text": piece}) + "\n"
