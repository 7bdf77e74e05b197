"""Golden cases: the checkpoint, the packed batch, and arrays brought from slot order to reading order."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

from navil_jax.batch import Batch, BatchSpec
from navil_jax.config import SPECIAL_TOKENS, ModelConfig
from navil_jax.data.images import window_order
from navil_jax.model.params import Params
from navil_jax.weights.convert import params_from_tensors, read_safetensors
from navil_jax.weights.released_config import model_config, read_config

FOLDER = Path(__file__).parent / "golden"
PICTURE_CASES = ("internlm2_small", "internlm2_windowed", "qwen3_small", "qwen3_small_tied")
TEXT_CASES = ("text_only_internlm2", "text_only_internlm2_linear", "text_only_qwen3")
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    config: ModelConfig
    params: Params
    arrays: dict[str, np.ndarray]
    info: dict

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(rows, columns) in patches of every scale, in order."""
        return [(int(rows), int(cols)) for _, rows, cols in self.arrays["inputs.image_grid_thw"]]


@functools.cache
def load_case(name: str) -> Case:
    folder = FOLDER / name
    info = json.loads((folder / "golden.json").read_text())
    special = info.get("special_tokens")
    ids = tuple(special[token] for token in SPECIAL_TOKENS) if special else ()
    config = model_config(read_config(folder), ids, compute_dtype="float32", remat="none")
    params = params_from_tensors(config, read_safetensors(folder))
    return Case(name, config, params, load_file(folder / "golden.safetensors"), info)


def patch_features(case: Case) -> dict[str, np.ndarray]:
    """Patches of the case in window order, as the pipeline gives them."""
    vision = case.config.vision
    unit, window_units = vision.unit_patches, vision.window_size // vision.merge_size
    pixels = case.arrays["inputs.pixel_u8"].reshape(-1, unit, vision.patch_dim)
    patches, coords, blocks, start = [], [], [], 0
    for number, (rows, cols) in enumerate(case.grids):
        order = window_order(rows // 2, cols // 2, window_units)
        patches.append(pixels[start : start + len(order)][order].reshape(-1, vision.patch_dim))
        coords.append(merge_block_coords(rows, cols)[order].reshape(-1, 2))
        blocks.append(np.full(rows * cols, number + 1))
        start += len(order)
    return {
        "patches": np.concatenate(patches),
        "patch_coords": np.concatenate(coords),
        "patch_blocks": np.concatenate(blocks),
    }


def merge_block_coords(rows: int, cols: int) -> np.ndarray:
    """[units, 4, 2] (row, column) of the patches of each 2x2 unit, units in raster order."""
    coords = np.stack(np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij"), axis=-1)
    return coords.reshape(rows // 2, 2, cols // 2, 2, 2).swapaxes(1, 2).reshape(-1, 4, 2)


def sample_features(config: ModelConfig, tokens: np.ndarray, patches: dict[str, np.ndarray] | None = None):
    """SampleFeatures of given token ids; targets and weights are left to the tests."""
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


def build_batch(config: ModelConfig, rows: list[list[dict]], spare: int = 3) -> Batch:
    """The batch of these samples, with `spare` empty slots in each block of the longest row."""

    def longest(name: str) -> int:
        return max(sum(len(sample[name]) for sample in row) for row in rows)

    vision = config.vision
    spec = BatchSpec(
        rows=len(rows),
        visual_slots=longest("visual_tokens") + spare if vision else 0,
        text_slots=longest("text_tokens") + spare,
        patch_slots=longest("patches") + 4 * spare if vision else 0,
        patch_dim=vision.patch_dim if vision else 1,
    )
    return spec.build(rows, config.special_id("<IMG_CONTEXT>") if vision else -1)


def picture_batch(case: Case) -> Batch:
    """The one row of a picture case."""
    return build_batch(
        case.config, [[sample_features(case.config, case.arrays["inputs.input_ids"][0], patch_features(case))]]
    )


def in_order(batch: Batch, x: jax.Array, row: int = 0, segment: int = 1) -> np.ndarray:
    """Values [B, L, ...] in slot order -> [n, ...] of one sample in reading order."""
    sequence = np.asarray(batch.sequence[row])
    return np.asarray(x[row])[sequence[np.asarray(batch.segment_ids[row])[sequence] == segment]]


def to_slots(batch: Batch, values: np.ndarray, fill: float) -> np.ndarray:
    """Values [n] of row 0's sample in reading order -> [B, L] in slot order."""
    result = np.full(batch.tokens.shape, fill, values.dtype)
    result[0, np.asarray(batch.sequence[0])[: len(values)]] = values
    return result
