"""Golden folders: a tiny model, inputs, and what the released code makes of them.

A folder holds config.json, golden.safetensors (inputs and outputs), golden.json (what is no tensor) and, unless the
weights come from elsewhere, model.safetensors. Sizes, seeds and the number of texts and generations are read from it.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from navil_jax.batch import Batch, BatchSpec, SampleFeatures
from navil_jax.config import SPECIAL_TOKENS, ModelConfig, VisionConfig
from navil_jax.convert.hf_config import model_config, read_config
from navil_jax.convert.params import params_from_tensors
from navil_jax.convert.reader import TensorFolder
from navil_jax.convert.stored import parsed
from navil_jax.data.images import window_order
from navil_jax.errors import UserError
from navil_jax.model.params import Params

ARRAYS_FILE, INFO_FILE = "golden.safetensors", "golden.json"
SPARE_SLOTS = 3  # empty slots in each block of a batch, so that they are tested too


class Arrays(dict[str, np.ndarray]):
    """golden.safetensors; an absent tensor is a `UserError` that names the file."""

    def __init__(self, file: Path) -> None:
        try:
            super().__init__(load_file(file))
        except SafetensorError as error:
            raise UserError(f"{file}: not a readable safetensors file ({error})") from error
        self._file = file

    def __missing__(self, name: str) -> np.ndarray:
        raise UserError(f"{self._file}: has no {name}, which the other contents of the folder ask for")


@dataclasses.dataclass(frozen=True, eq=False)  # compared and cached by identity
class Case:
    """A golden folder with the parameters that are checked on it.

    Attributes:
      name: of the folder.
      config: its model, computed in float32.
      params: of that model.
      arrays: golden.safetensors.
      info: golden.json.
    """

    name: str
    config: ModelConfig
    params: Params
    arrays: Mapping[str, np.ndarray]
    info: dict[str, Any]

    @property
    def has_images(self) -> bool:
        return "inputs.pixel_u8" in self.arrays

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(rows, columns) in patches of every scale, in order."""
        return [(int(rows), int(cols)) for _, rows, cols in self.arrays["inputs.image_grid_thw"]]

    @property
    def texts(self) -> list[str]:
        """Names of the texts without images whose logits are known at every position."""
        return [
            name
            for name in self._with_inputs()
            if f"{name}.tokens" not in self.arrays and f"{name}.logits" in self.arrays
        ]

    @property
    def generations(self) -> list[str]:
        """Names of the generations; those whose name ends with `forced` had their tokens dictated."""
        return [name.removesuffix(".tokens") for name in sorted(self.arrays) if name.endswith(".tokens")]

    def prompts(self, generation: str) -> list[SampleFeatures]:
        """What the rows of a generation start from; one without a prompt of its own shares that of `gen`."""
        name = generation if f"{generation}.input_ids" in self.arrays else "gen"
        return self.samples(name, self.has_images)

    def real(self, name: str) -> np.ndarray:
        """[rows, n] bool: where `<name>.input_ids` are no padding."""
        tokens = self.arrays[f"{name}.input_ids"]
        mask = self.arrays.get(f"{name}.attention_mask")
        return np.ones(tokens.shape, bool) if mask is None else mask.astype(bool)

    def samples(self, name: str, images: bool = False) -> list[SampleFeatures]:
        """The rows of `<name>.input_ids`, if `images` with those of the row."""
        rows = zip(self.arrays[f"{name}.input_ids"], self.real(name), strict=True)
        return [
            sample_features(self.config, tokens[real], patch_features(self, row) if images else None)
            for row, (tokens, real) in enumerate(rows)
        ]

    def scales(self, row: int) -> tuple[int, list[tuple[int, int]]]:
        """(first of its patches, grids of its scales) of a row of `inputs`; rows take scales by their image tokens."""
        side, tokens = self.config.encoder.merge_size, self.arrays["inputs.input_ids"]
        wanted = np.count_nonzero(tokens == self.config.special_id("<IMG_CONTEXT>"), axis=1)
        units = [rows * cols // side**2 for rows, cols in self.grids]
        ends, limits = np.cumsum(units), np.cumsum(wanted)
        if not np.isin(limits, [0, *ends]).all() or limits[-1] != sum(units):
            raise UserError(f"{self.name}: {ARRAYS_FILE} has image tokens that are not those of inputs.image_grid_thw")
        first = limits[row] - wanted[row]
        own = [grid for grid, end in zip(self.grids, ends, strict=True) if first < end <= limits[row]]
        return int(first) * side**2, own

    def _with_inputs(self) -> Iterator[str]:
        return (name.removesuffix(".input_ids") for name in sorted(self.arrays) if name.endswith(".input_ids"))


def is_golden(folder: Path) -> bool:
    return (folder / ARRAYS_FILE).is_file() and (folder / INFO_FILE).is_file()


def golden_config(folder: Path) -> ModelConfig:
    """The model of a golden folder, with its special tokens, computed in float32.

    Raises:
      UserError: not a golden folder, or one of another architecture.
    """
    if not is_golden(folder):
        raise UserError(f"{folder}: not a golden folder; it needs {INFO_FILE} and {ARRAYS_FILE}")
    special = _read_info(folder).get("special_tokens") or {}
    ids = tuple(special[token] for token in SPECIAL_TOKENS if token in special)
    config = model_config(read_config(folder), ids, folder / "config.json", compute_dtype="float32", remat="none")
    if config.vision is not None and len(ids) < len(SPECIAL_TOKENS):
        lacking = [token for token in SPECIAL_TOKENS if token not in special]
        raise UserError(f"{folder / INFO_FILE}: special_tokens lacks the ids of {', '.join(lacking)}")
    return config


def load_case(folder: Path, params: Params | None = None) -> Case:
    """Reads a golden folder.

    Args:
      folder: in the format above.
      params: of the model to check; None: the weights of the folder itself.

    Raises:
      UserError: not a golden folder, an unreadable file, or weights of another model.
    """
    config = golden_config(folder)
    params = params_from_tensors(config, TensorFolder(folder)) if params is None else params
    return Case(folder.name, config, params, Arrays(folder / ARRAYS_FILE), _read_info(folder))


def _read_info(folder: Path) -> dict[str, Any]:
    try:
        return parsed((folder / INFO_FILE).read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / INFO_FILE}: line {error.lineno}: not valid JSON ({error.msg})") from error
    except ValueError as error:
        raise UserError(f"{folder / INFO_FILE}: cannot be read ({error})") from error


def window_index(case: Case) -> np.ndarray:
    """Order of the merged units of all scales: place i of the encoder holds unit window_index[i] of raster order."""
    return _window_index(case.config.encoder, case.grids)


def _window_index(vision: VisionConfig, grids: list[tuple[int, int]]) -> np.ndarray:
    parts, start, side = [np.zeros(0, np.int64)], 0, vision.merge_size
    for rows, cols in grids:
        order = window_order(rows // side, cols // side, vision.window_size // side)
        parts.append(start + order)
        start += len(order)
    return np.concatenate(parts)


def patch_features(case: Case, row: int = 0) -> dict[str, np.ndarray]:
    """Patches of a row of the case in window order, as the pipeline gives them."""
    vision, (first, grids) = case.config.encoder, case.scales(row)
    order, unit = _window_index(vision, grids), vision.unit_patches
    coords = [np.zeros((0, unit, 2), np.int64), *(merge_block_coords(*grid, vision.merge_size) for grid in grids)]
    pixels = case.arrays["inputs.pixel_u8"][first : first + len(order) * unit]
    return {
        "patches": pixels.reshape(-1, unit, vision.patch_dim)[order].reshape(-1, vision.patch_dim),
        "patch_coords": np.concatenate(coords)[order].reshape(-1, 2),
        "patch_blocks": np.repeat(np.arange(len(grids)) + 1, [rows * cols for rows, cols in grids]),
    }


def merge_block_coords(rows: int, cols: int, side: int) -> np.ndarray:
    """[units, side * side, 2] (row, column) of the patches of each merged unit, units in raster order."""
    coords = np.stack(np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij"), axis=-1)
    return coords.reshape(rows // side, side, cols // side, side, 2).swapaxes(1, 2).reshape(-1, side * side, 2)


def sample_features(
    config: ModelConfig, tokens: np.ndarray, patches: dict[str, np.ndarray] | None = None
) -> SampleFeatures:
    """Features of given token ids [n]; their targets and weights have no meaning."""
    visual = np.isin(tokens, config.visual_token_ids) if config.vision else np.zeros(len(tokens), bool)
    places = np.arange(len(tokens))
    empty = np.zeros(np.count_nonzero(~visual), np.int32)
    dim = config.vision.patch_dim if config.vision else 1
    none = {"patches": np.zeros((0, dim)), "patch_coords": np.zeros((0, 2)), "patch_blocks": np.zeros(0)}
    return {
        "visual_tokens": tokens[visual],
        "visual_positions": places[visual],
        "text_tokens": tokens[~visual],
        "text_positions": places[~visual],
        "text_targets": empty,
        "text_weights": empty,
        "text_source_ids": empty,
        "text_sample_ids": empty,
        **(none if patches is None else patches),
    }


def build_batch(config: ModelConfig, rows: list[list[SampleFeatures]]) -> Batch:
    """The batch of these samples, with `SPARE_SLOTS` empty slots in each block of the longest row."""

    def longest(name: str) -> int:
        return max(sum(len(sample[name]) for sample in row) for row in rows)

    vision = config.vision
    spec = BatchSpec(
        rows=len(rows),
        visual_slots=longest("visual_tokens") + SPARE_SLOTS if vision else 0,
        text_slots=longest("text_tokens") + SPARE_SLOTS,
        patch_slots=longest("patches") + vision.unit_patches * SPARE_SLOTS if vision else 0,
        patch_dim=vision.patch_dim if vision else 1,
        unit_patches=vision.unit_patches if vision else 1,
    )
    return spec.build(rows, config.special_id("<IMG_CONTEXT>") if vision else -1)


def image_batch(case: Case) -> Batch:
    """The rows of a case with images."""
    return build_batch(case.config, [[sample] for sample in case.samples("inputs", images=True)])


def text_batch(case: Case, text: str) -> Batch:
    """The rows of a text of the case."""
    return build_batch(case.config, [[sample] for sample in case.samples(text)])


def in_order(batch: Batch, x: jax.Array, row: int = 0, segment: int = 1) -> np.ndarray:
    """Values [B, L, ...] in slot order -> [n, ...] of one sample in reading order."""
    sequence = np.asarray(batch.reading_order[row])
    return np.asarray(x[row])[sequence[np.asarray(batch.segment_ids[row])[sequence] == segment]]


def in_rows(batch: Batch, x: jax.Array, real: np.ndarray, golden: np.ndarray | None = None) -> np.ndarray:
    """Values [B, L, ...] in slot order -> [rows, n, ...] in reading order; padding has the golden values, or zeros.

    Args:
      real: [rows, n], see `Case.real`.
      golden: [rows, n, ...].
    """
    values = [in_order(batch, x, row) for row in range(len(real))]
    result = np.zeros((*real.shape, *values[0].shape[1:]), values[0].dtype)
    if golden is not None and golden.shape == result.shape:
        result[~real] = golden[~real]
    for row, value in enumerate(values):
        result[row, real[row]] = value
    return result


def to_slots(batch: Batch, values: np.ndarray, fill: float, real: np.ndarray) -> np.ndarray:
    """Values [rows, n] in reading order -> [B, L] in slot order; those of padding are left out."""
    result = np.full(batch.tokens.shape, fill, values.dtype)
    for row, chosen in enumerate(real):
        result[row, np.asarray(batch.reading_order[row])[: np.count_nonzero(chosen)]] = values[row, chosen]
    return result
