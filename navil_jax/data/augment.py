"""Random changes of training pictures, for sources with `data_augment` (the switch of InternVL's meta files).

What is drawn follows from the seeds alone, so a sample looks the same in every epoch and after every restart.
"""

import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

QUALITIES = (75, 100)  # of JPEG, both ends included (InternVL)
SHARES = (0.5, 1.0)  # of both sides
SMALLEST_SIDE = 32  # pixels; pictures with a shorter side keep their size, for rounding would bend them


def augment(
    image: Image.Image, kind: Literal["jpeg", "resolution", "jpeg_and_resolution"], seeds: Sequence[int]
) -> Image.Image:
    """A changed copy of an RGB picture.

    Args:
      kind: "jpeg": what a JPEG of random quality keeps of it. "resolution": shrunk to a random share of its sides, the
        ratio of which stays. Together: first shrunk.
      seeds: whole numbers from 0 that name the picture, such as (data.seed, source, sample, picture).

    Example: augment(picture of 640 x 480, "resolution", (0, 0, 7, 0)) -> one of 553 x 415
    """
    random = np.random.default_rng(list(seeds))
    share, quality = random.uniform(*SHARES), int(random.integers(*QUALITIES, endpoint=True))
    if "resolution" in kind and min(image.size) >= SMALLEST_SIDE:
        width, height = image.size
        image = image.resize((round(width * share), round(height * share)), Image.Resampling.BICUBIC)
    if "jpeg" in kind:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        image = Image.open(buffer)
        image.load()
    return image
