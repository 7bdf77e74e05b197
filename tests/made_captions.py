"""Images with captions in JSON lines, for tests."""

import json
from pathlib import Path

from PIL import Image


def made_captions(folder: Path, count: int = 5, damaged: int = 2) -> Path:
    """The file; the image of line `damaged` is none."""
    folder.mkdir()
    lines = []
    for number in range(1, count + 1):
        image = folder / f"{number}.png"
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(image)
        if number == damaged:
            image.write_bytes(b"no image")
        captions = [f"A red square of shade {number}.", "A square."]
        lines.append(json.dumps({"id": number, "image": image.name, "captions": captions}))
    path = folder / "captions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
