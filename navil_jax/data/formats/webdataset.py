"""Tars of webdataset: members with the same key are one sample. Nothing is unpacked."""

import io
import tarfile
from typing import Any

from navil_jax.data.formats import files
from navil_jax.data.formats.index import FileIndex, tar_key
from navil_jax.data.formats.record_images import IMAGE_SUFFIXES
from navil_jax.data.formats.records import RecordSource, parse_json, reason


class WebDataset(RecordSource):
    """One tar. Members of a sample stand side by side.

    A sample has images (by their extensions, several as KEY.0.jpg, KEY.1.jpg in the order of the tar) and its text as
    KEY.json (a record such as those of JSON lines), KEY.txt (a caption) or KEY.cls (a class, taken for a caption).
    The text of a .json counts before that of a .txt.
    """

    suffixes = (".tar",)

    def __init__(self, path: str, root: str = "", prompt: str = "") -> None:
        super().__init__(path, root, prompt)
        self._index = FileIndex(path, "tar")

    def __len__(self) -> int:
        return len(self._index)

    def key(self, index: int) -> str:
        """`FILE.tar#NUMBER`, from 1; where the sample can be read, `FILE.tar/KEY`."""
        return f"{files.name_of(self.path)}#{index + 1}"

    def record(self, index: int) -> dict[str, Any]:
        begin, end = self._index[index]
        if end == self._index.size:
            raise ValueError("the tar is cut off here: nothing marks its end")
        content = files.read_range(self.path, begin, end)
        images, found, key = [], {}, ""
        try:
            with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
                for member in archive:
                    if member.isfile():
                        key, extension = tar_key(member.name)
                        opened = archive.extractfile(member)
                        assert opened is not None  # it is a file
                        data = opened.read()
                        if f".{extension}".endswith(IMAGE_SUFFIXES):
                            images.append(data)
                        elif extension in ("json", "txt", "cls"):
                            found[extension] = data
                if archive.offset != len(content):
                    raise ValueError("a broken member follows this sample; nothing behind it in the tar can be read")
        except tarfile.TarError as error:
            raise ValueError(f"the tar is broken here: {error}") from error
        return _record(images, found, f"{files.name_of(self.path)}/{key}")


def _record(images: list[bytes], found: dict[str, bytes], key: str) -> dict[str, Any]:
    try:
        record = parse_json(found.pop("json", b"{}"))
    except ValueError as error:
        raise ValueError(f"{key}.json: {reason(error)}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{key}.json: a record must be an object, not {type(record).__name__}")
    texts = {name: text.decode().strip() for name, text in found.items()}
    return {**texts, **record, "key": key, **({"images": images} if images else {})}
