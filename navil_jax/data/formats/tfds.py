"""TensorFlow Datasets prepared as ArrayRecord, read and written without TensorFlow."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from navil_jax.data.formats import files
from navil_jax.data.formats.record_images import encoded
from navil_jax.data.formats.records import READING, Reading, RecordSource, check_columns
from navil_jax.data.sample import Source
from navil_jax.errors import UserError


class _Encoded(tfds.decode.Decoder):
    """Leaves an image as the bytes of its file."""

    def decode_example(self, serialized: Any) -> Any:
        return serialized

    decode_example_np = decode_batch_example_np = decode_example


class Tfds(RecordSource):
    """`FOLDER/NAME/VERSION`, or `FOLDER/NAME/VERSION#SPLIT` for another split than train, such as train[:90%].

    Its features have the names of a record's fields, see `records.to_sample`.
    """

    def __init__(self, path: str, reading: Reading = READING) -> None:
        folder, _, split = path.partition("#")
        super().__init__(path, reading, folder)
        try:
            builder = tfds.builder_from_directory(folder)
            features = self._features = builder.info.features
            raw = {name: _Encoded() for name, feature in features.items() if _is_image(feature)}
            self._data = builder.as_data_source(split or "train", decoders=raw)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # the package raises many types
            raise UserError(
                f"{path}: cannot be read as TFDS of ArrayRecord files: {' '.join(str(error).split())}"
            ) from error
        check_columns(path, list(features))
        if not len(self):
            raise UserError(f"{path}: has no samples")

    def versions(self) -> list[files.Version]:
        folder = self.path.partition("#")[0]
        return [files.version(file) for file in files.expand(folder, ("",))]

    def __len__(self) -> int:
        return len(self._data)

    def key(self, index: int) -> str:
        """`NAME/VERSION#NUMBER`, from 1."""
        folder = self.path.partition("#")[0].rstrip("/")
        return f"{'/'.join(folder.split('/')[-2:])}#{index + 1}"

    def record(self, index: int) -> dict[str, Any]:
        record = plain(self._features, self._data[index])
        if isinstance(system := record.get("system"), list):
            record["system"] = system[0] if system else None
        return record


def _is_image(feature: Any) -> bool:
    return isinstance(feature, tfds.features.Image) or (
        isinstance(feature, tfds.features.Sequence) and isinstance(feature.feature, tfds.features.Image)
    )


def plain(feature: Any, value: Any) -> Any:
    """Classes as their names; sequences of dicts, which TFDS keeps as a dict of sequences, as lists of dicts."""
    if isinstance(feature, tfds.features.ClassLabel):
        return feature.int2str(int(value)) if 0 <= int(value) < feature.num_classes else None
    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: plain(feature[name], entry) for name, entry in value.items()}
    if isinstance(feature, tfds.features.Sequence):
        inner = feature.feature
        if isinstance(value, dict):
            rows = zip(*value.values(), strict=True)
            return [plain(inner, dict(zip(value, row, strict=True))) for row in rows]
        if isinstance(inner, tfds.features.ClassLabel) or (isinstance(value, np.ndarray) and value.dtype == object):
            return [plain(inner, entry) for entry in value]
    return value


def prepare(source: Source, folder: str, name: str, split: str = "train") -> str:
    """Writes a source as a TFDS data set of ArrayRecord files, offline; gives its path for `Tfds`.

    Example: prepare(open_source("scenes", "train"), "data", "scenes") -> "data/scenes/1.0.0"
    """
    text = tfds.features.Text()

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # of its __init_subclass__
        VERSION = tfds.core.Version("1.0.0")
        RELEASE_NOTES = {"1.0.0": "made by navil_jax"}  # noqa: RUF012

        def _info(self) -> tfds.core.DatasetInfo:
            fields = {
                "key": text,
                "kind": text,
                "bbox_type": text,
                "system": tfds.features.Sequence(text),  # none or one
                "turns": tfds.features.Sequence({"question": text, "answer": text}),
                "images": tfds.features.Sequence(tfds.features.Image(shape=(None, None, None))),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(fields))

        def _split_generators(self, manager: Any) -> dict[str, Any]:
            return {split: self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            for number in range(len(source)):
                sample = source[number]
                yield (
                    number,
                    {
                        "key": sample.key,
                        "kind": sample.kind,
                        "bbox_type": "norm1000" if sample.grounded else "",
                        "system": [] if sample.system is None else [sample.system],
                        "turns": [{"question": question, "answer": answer} for question, answer in sample.turns],
                        "images": [io.BytesIO(encoded(image)) for image in sample.images],
                    },
                )

    Builder.name = name
    builder = Builder(data_dir=folder, file_format="array_record")
    builder.download_and_prepare(file_format="array_record")
    return str(builder.data_path)
