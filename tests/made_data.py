"""Small files of the formats that users have."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from navil_jax.data.sample import BadSample, Sample, Source


def jpeg(red: int = 200) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), (red, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def talk(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """LLaVA's conversation of questions and answers in turn."""
    roles = ("human", "gpt")
    turns = [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]
    return turns if system is None else [{"from": "system", "value": system}, *turns]


def write_lines(path: Path, records: Iterable[Any]) -> str:
    """Records as JSON lines; bytes are written as they are."""
    lines = (record if isinstance(record, bytes) else json.dumps(record).encode() for record in records)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def tar_bytes(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def outcomes(source: Source) -> list[Sample | str]:
    """Every sample, or the reason why it is bad."""
    found: list[Sample | str] = []
    for index in range(len(source)):
        try:
            found.append(source[index])
        except BadSample as error:
            found.append(error.reason)
    return found
