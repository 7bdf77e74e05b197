"""Folders that the Hugging Face `datasets` package saved."""

from typing import Any

import datasets

from navil_jax.data.formats import files
from navil_jax.data.formats.records import RecordSource, used_columns
from navil_jax.errors import UserError


class HuggingFace(RecordSource):
    """A folder of `Dataset.save_to_disk`, mapped into memory. Images stay encoded.

    Its columns have the names of a record's fields, see `records.to_sample`.
    """

    def __init__(self, path: str, root: str = "", prompt: str = "") -> None:
        super().__init__(path, root or path, prompt)
        try:
            data = datasets.load_from_disk(path)
        except Exception as error:  # of the network, of Arrow, of the package
            raise UserError(f"{path}: no folder of Dataset.save_to_disk: {error}") from error
        if isinstance(data, datasets.DatasetDict):
            raise UserError(
                f"{path}: holds the splits {', '.join(data)}; give one of them, such as {path}/{next(iter(data))}"
            )
        data = data.select_columns(used_columns(path, data.column_names))
        for name, feature in data.features.items():
            data = data.cast_column(name, _undecoded(feature))
        self._data = data
        if not len(self):
            raise UserError(f"{path}: has no rows")

    def __len__(self) -> int:
        return len(self._data)

    def key(self, index: int) -> str:
        """`FOLDER#ROW`, from 1."""
        return f"{files.name_of(self.path)}#{index + 1}"

    def record(self, index: int) -> dict[str, Any]:
        return self._data[index]


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List):
        return datasets.List(_undecoded(feature.feature))
    return feature
