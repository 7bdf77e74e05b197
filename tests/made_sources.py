"""Sources of made samples, a config that packs them, and what stands in the batches."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from navil_jax.batch import Batch
from navil_jax.config import Config, DataConfig, ImageConfig, ModelConfig, SourceConfig
from navil_jax.data.sample import Sample
from navil_jax.data.tokenizers import load_tokenizer

TOKENIZER_FOLDER = Path(__file__).parent / "golden" / "prompts" / "tokenizer"
TOKENIZER = load_tokenizer(TOKENIZER_FOLDER)
CONTEXT = TOKENIZER.token_id("<IMG_CONTEXT>")
BUDGETS = {"visual_slots": 48, "text_slots": 160, "patch_slots": 160}


@dataclasses.dataclass(frozen=True)
class MadeSource:
    """Samples of given (width, height, answer length); width 0: text only; height 0: a broken image."""

    sizes: tuple[tuple[int, int, int], ...]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Sample:
        width, height, length = self.sizes[index]
        images: tuple = ()
        if width and height:
            pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), np.uint8)
            images = (Image.fromarray(pixels),)
        elif width:
            images = (b"broken",)
        return Sample(f"made/{index}", images, ((f"Question {index}", "a" * length),))

    def texts(self) -> list[str]:
        return []


def made(number: int, seed: int = 0) -> MadeSource:
    rng = np.random.default_rng(seed)
    sizes = rng.integers((0, 8, 1), (3, 100, 40), (number, 3)) * (40, 1, 1)
    return MadeSource(tuple(map(tuple, sizes.tolist())))


def config(number: int = 1, **changes: object) -> Config:
    data = DataConfig(
        sources=tuple(SourceConfig(f"source{i}", weight=1 + i) for i in range(number)),
        rows=2,
        packing_lookahead=4,
        system_message="S",
        **BUDGETS,
    )
    return Config(
        model=ModelConfig(special_token_ids=TOKENIZER.special_token_ids),
        images=ImageConfig(min_patches=4, max_patches=24),
        data=dataclasses.replace(data, **changes),
    )


def doctor_config(**changes: object) -> Config:
    """The config of a training run on the files that the tests of the doctor write."""
    changes = {"sources": (SourceConfig("train.jsonl"),)} | changes
    return dataclasses.replace(config(**changes), images=ImageConfig(min_patches=4, max_patches=256))


def samples_of(batch: Batch) -> list[tuple[int, int]]:
    """(source, sample) of every segment, row by row."""
    found = []
    for row in range(len(batch.tokens)):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            here = batch.segment_ids[row] == segment
            numbers = set(zip(batch.source_ids[row, here].tolist(), batch.sample_ids[row, here].tolist(), strict=True))
            assert len(numbers) == 1
            found.append(numbers.pop())
    return found


def assert_equal(a: Batch, b: Batch) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)
