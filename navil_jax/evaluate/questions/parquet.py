"""Parquet files of the Hugging Face hub, read by row group."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from navil_jax.errors import UserError
from navil_jax.evaluate.questions.record import Record, Row, make_record

IMAGES = ("image", "decoded_image", *(f"image_{number}" for number in range(1, 8)))
NAN = "nan"  # what stands for a missing cell in MMBench on the hub


def read_parquet(paths: Sequence[Path], benchmark: str, images_of: Sequence[Path] = ()) -> list[Record]:
    """All questions of the files of a split.

    Args:
      images_of: files with columns id and image, to which a column imageId points (GQA).

    Raises:
      UserError: pyarrow is not installed, or a file cannot be read.
    """
    elsewhere = {row["id"]: image for path in images_of for row, image in _rows(path)}
    found: list[Record] = []
    for path in paths:
        for number, (row, image) in enumerate(_rows(path)):
            where = f"{path}: row {number + 1}"
            images = _images(row, image)
            if not images and "imageId" in row:
                if elsewhere and row["imageId"] not in elsewhere:
                    raise UserError(f"{where}: imageId: no image of the id {row['imageId']!r}")
                images = _images({"image": True}, elsewhere[row["imageId"]]) if elsewhere else []
            clean = {name: None if value == NAN else value for name, value in row.items()}
            found.append(make_record(benchmark, clean, images, len(found), where))
    return found


Fetch = Callable[[str], bytes]


def _images(row: Row, fetch: Fetch) -> list[Callable[[], bytes]]:
    return [functools.partial(fetch, name) for name in IMAGES if row.get(name) is True]


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], Fetch]]:
    """The columns of each row, True in the place of an image, and what reads an image of the row."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError(f"{path}: needs a package that is not installed: pip install pyarrow") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        images = [
            name for name in IMAGES if name in names and pyarrow.types.is_struct(file.schema_arrow.field(name).type)
        ]
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=[name for name in names if name not in images]).to_pylist()
            paths = file.read_row_group(group, columns=_cheap(file, images)).to_pylist()
            for number, row in enumerate(rows):
                there = {name: True for name in images if paths[number][name] is not None}
                yield {**row, **there}, functools.partial(_image, path, group, number)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet: {error}") from None


def _cheap(file: Any, images: Sequence[str]) -> list[str]:
    """Columns that tell which rows have an image: without the bytes, where there is a path beside them."""
    fields = {name: file.schema_arrow.field(name).type for name in images}
    return [f"{name}.path" if kind.get_field_index("path") >= 0 else name for name, kind in fields.items()]


@functools.lru_cache(maxsize=2)
def _column(path: Path, group: int, name: str) -> list[Any]:
    """The images of a row group; two are kept, as questions are asked in their order."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path).read_row_group(group, columns=[name]).column(name).to_pylist()


def _image(path: Path, group: int, number: int, name: str) -> bytes:
    content = _column(path, group, name)[number]["bytes"]
    if content is None:
        raise UserError(f"{path}: row {number + 1} of row group {group + 1}: {name}: has a path and no bytes")
    return content
