"""Folders that the Hugging Face `datasets` package saved."""

from typing import Any

import datasets

from navil_jax.data.formats import files
from navil_jax.data.formats.records import READING, Reading, RecordSource, check_columns
from navil_jax.errors import UserError


class HuggingFace(RecordSource):
    """A folder of `Dataset.save_to_disk`, mapped into memory. Images stay encoded.

    Its columns have the names of a record's fields, see `records.to_sample`.
    """

    def __init__(self, path: str, reading: Reading = READING) -> None:
        super().__init__(path, reading, path)
        try:
            data = datasets.load_from_disk(path)
        except Exception as error:  # of the network, of Arrow, of the package
            raise UserError(
                f"{path}: no folder of Dataset.save_to_disk: {error}; data of the hub are read by data convert alone"
            ) from error
        if isinstance(data, datasets.DatasetDict):
            raise UserError(
                f"{path}: holds the splits {', '.join(data)}; give one of them, such as {path}/{next(iter(data))}"
            )
        check_columns(path, data.column_names)
        self._features = data.features
        self._data = data.with_format("arrow")  # decodes nothing
        if not len(self):
            raise UserError(f"{path}: has no rows")

    def versions(self) -> list[files.Version]:
        return [files.version(file) for file in files.expand(self.path, (".arrow",))]

    def __len__(self) -> int:
        return len(self._data)

    def key(self, index: int) -> str:
        """`FOLDER#ROW`, from 1."""
        return f"{files.name_of(self.path)}#{index + 1}"

    def record(self, index: int) -> dict[str, Any]:
        (row,) = self._data[index].to_pylist()
        return {name: with_names(self._features[name], value) for name, value in row.items()}


def with_names(feature: Any, value: Any) -> Any:
    """A value of the feature with the names of classes in the place of their numbers; -1 is no class."""
    if isinstance(feature, datasets.ClassLabel) and isinstance(value, int):
        return feature.int2str(value) if 0 <= value < feature.num_classes else None
    if isinstance(feature, datasets.List | datasets.LargeList) and isinstance(value, list):
        return [with_names(feature.feature, entry) for entry in value]
    if isinstance(feature, dict) and isinstance(value, dict):
        return {name: with_names(feature[name], entry) for name, entry in value.items()}
    return value
