"""The text that a study's language models learn: a book (`data.book`), without the pieces that `pages` shows."""

import json
from pathlib import Path

from navil_jax.data.toy.book import HELD_OUT_EVERY, pieces
from navil_jax.data.toy.pages import is_for_pages
from navil_jax.errors import UserError


def write_corpus(folder: Path, most_bytes: int) -> None:
    """Writes train.jsonl and held_out.jsonl, a record {"text": ...} per piece; nothing if they are there.

    Raises:
      UserError: the text cannot be read, or the folder holds another one.
    """
    found = pieces(most_bytes)
    rest = [piece for number, piece in enumerate(found) if number % HELD_OUT_EVERY and not is_for_pages(number)]
    parts = {folder / "held_out.jsonl": found[::HELD_OUT_EVERY], folder / "train.jsonl": rest}
    texts = {path: "".join(json.dumps({"text": piece}) + "\n" for piece in part) for path, part in parts.items()}
    if (folder / "train.jsonl").exists():
        for path, text in texts.items():
            if not path.exists() or path.read_text() != text:
                raise UserError(f"{path}: is not the text of this study, which was made otherwise; use another --out")
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(path)
