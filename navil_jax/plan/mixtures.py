"""Distributions of sizes that stand for data: of a sample's image in pixels, and of its answer in tokens."""

from collections.abc import Callable

import numpy as np

Mixture = Callable[[np.random.Generator], tuple[tuple[int, int] | None, int]]


def _captions(rng: np.random.Generator) -> tuple[tuple[int, int] | None, int]:
    height, width = np.exp(rng.normal(np.log(900), 0.45, 2)).clip(200, 3000)
    return (int(height), int(width)), int(np.exp(rng.normal(np.log(40), 0.5)))


def _instructions(rng: np.random.Generator) -> tuple[tuple[int, int] | None, int]:
    if rng.random() < 0.25:
        return None, int(np.exp(rng.normal(np.log(500), 0.9)).clip(30, 8000))
    height, width = np.exp(rng.normal(np.log(1000), 0.6, 2)).clip(200, 4000)
    return (int(height), int(width)), int(np.exp(rng.normal(np.log(200), 1.0)).clip(10, 4000))


# Name -> (what it is, draws the (height, width) in pixels of a sample's image and the tokens of its answer)
MIXTURES: dict[str, tuple[str, Mixture]] = {
    "captions": (
        "web images with sides of median 900 pixels (log-normal, sigma 0.45, 200 to 3,000), one per sample, and "
        "captions of median 40 tokens (sigma 0.5)",
        _captions,
    ),
    "instructions": (
        "a quarter texts of median 500 tokens, else images with sides of median 1,000 pixels (sigma 0.6, 200 to "
        "4,000) and answers of median 200 tokens (sigma 1.0)",
        _instructions,
    ),
}
