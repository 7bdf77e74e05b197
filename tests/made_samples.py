"""Samples of features made at random, with very uneven rows, for tests of the step."""

from collections.abc import Sequence

import numpy as np

from navil_jax.config import ModelConfig


def make_features(
    random: np.random.Generator,
    model: ModelConfig,
    scales: Sequence[tuple[int, int]],
    words: int,
    answer: int,
    number: int = 0,
    weight: float | None = None,
) -> dict[str, np.ndarray]:
    """Words, an image with these scales (rows, columns in merged units), words, and an answer that is learnt.

    Patches stand in window order; the weight of a target is `weight`, or 1 / sqrt(answer).
    """
    context, image = model.visual_token_ids
    breaks = model.special_id("<IMG_LINE_BREAK>"), model.special_id("<IMG_FRAME_BREAK>")
    merge, window = model.vision.merge_size, model.vision.window_size // model.vision.merge_size
    text = lambda count: random.integers(3, 80, count).tolist()  # noqa: E731
    ids, coords, blocks = [1, *text(words // 2)], [], []
    if scales:
        ids.append(image)
        for block, (rows, cols) in enumerate(scales, start=1):
            ids += ([context] * cols + [breaks[0]]) * rows + [breaks[1]]
            units = sorted((r // window, c // window, r, c) for r in range(rows) for c in range(cols))
            for _, _, row, col in units:
                coords += [(row * merge + i, col * merge + j) for i in range(merge) for j in range(merge)]
            blocks += [block] * rows * cols * merge**2
        ids.append(model.special_id("</img>"))
    ids = np.array([*ids, *text(words - words // 2), *text(answer)], np.int32)
    weights = np.zeros(len(ids) + 1, np.float32)
    weights[len(ids) - answer : -1] = answer**-0.5 if weight is None else weight
    visual, positions = np.isin(ids, (context, image)), np.arange(len(ids), dtype=np.int32)
    return {
        "visual_tokens": ids[visual],
        "visual_positions": positions[visual],
        "text_tokens": ids[~visual],
        "text_positions": positions[~visual],
        "text_targets": np.append(ids[1:], -1).astype(np.int32)[~visual],
        "text_weights": weights[1:][~visual],
        "text_source_ids": np.zeros((~visual).sum(), np.int32),
        "text_sample_ids": np.full((~visual).sum(), number, np.int32),
        "patches": random.integers(0, 256, (len(coords), model.vision.patch_dim)).astype(np.uint8),
        "patch_coords": np.array(coords, np.int32).reshape(-1, 2),
        "patch_blocks": np.array(blocks, np.int32),
    }


def uneven_rows(model: ModelConfig, seed: int = 0) -> list[list[dict[str, np.ndarray]]]:
    """Eight rows: one full of images, one empty, some of a word or two."""
    random = np.random.default_rng(seed)
    shapes = [
        [([(1, 1), (3, 3), (4, 5)], 8, 30), ([], 6, 3), ([(2, 3)], 5, 2)],
        [([], 4, 1)],
        [([(3, 1), (5, 3)], 3, 2), ([(1, 2)], 4, 1)],
        [],
        [([], 3, 40)],
        [([(6, 6)], 4, 1)],
        [([(2, 2)], 4, 5)],
        [([], 4, 2), ([], 4, 2), ([(3, 2)], 2, 1)],
    ]
    return [[make_features(random, model, *shape) for shape in row] for row in shapes]
