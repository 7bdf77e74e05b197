"""Every window of every image has a number of its own."""

import numpy as np
import pytest

from navil_jax.config import ImageConfig, VisionConfig
from navil_jax.data.images import plan_scales
from navil_jax.model.vision import window_ids


@pytest.mark.parametrize("side", [2, 4, 8])
@pytest.mark.parametrize(("height", "width"), [(224, 44_800), (44_800, 224), (480, 640)])
def test_windows_of_an_image_have_numbers_of_their_own(side, height, width):
    vision = VisionConfig(window_size=side)
    scales = plan_scales(height, width, ImageConfig(), vision)
    coords = [np.stack(np.indices((s.rows, s.cols)), -1).reshape(-1, 2) for s in scales]
    blocks = np.concatenate([np.full(len(c), number) for number, c in enumerate(coords, start=1)])
    coords = np.concatenate([*coords, np.zeros((8, 2), int)]).astype(np.int32)  # and empty slots
    blocks = np.concatenate([blocks, np.zeros(8, int)]).astype(np.int32)
    found = np.asarray(window_ids(coords[None], blocks[None], vision))[0]
    key = np.concatenate([blocks[:, None], coords // side], axis=1)
    right = np.unique(key[:-8], axis=0, return_inverse=True)[1]
    pairs = np.unique(np.stack([right, found[:-8]]), axis=1)
    assert pairs.shape[1] == len(np.unique(right)) == len(np.unique(found[:-8]))
    assert found[:-8].min() == 1 and found.max() <= len(blocks) and not found[-8:].any()
