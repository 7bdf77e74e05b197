"""Random changes of training images, for sources with `data_augment` (the switch of InternVL's meta files).

What is drawn follows from the seeds alone. In training they hold the sample's place in the endless stream of its
source, so every epoch (and every pass of a source that is repeated within one) draws anew, and what is drawn is the
same after a restart and for any number of threads, worker processes and hosts.
"""

import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from navil_jax.data.pillow_resampling import resize_image

QUALITIES = (75, 100)  # of JPEG, both ends included (InternVL)
SHARES = (0.5, 1.0)  # of both sides
SMALLEST_SIDE = 32  # pixels; images with a shorter side keep their size, for rounding would bend them


def augment(
    image: Image.Image, kind: Literal["jpeg", "resolution", "jpeg_and_resolution"], seeds: Sequence[int]
) -> Image.Image:
    """A changed copy of an RGB image.

    Args:
      kind: "jpeg": what a JPEG of random quality keeps of it. "resolution": shrunk to a random share of its sides, the
        ratio of which stays. Together: first shrunk.
      seeds: whole numbers from 0 that name the image, such as (data.seed, source, sample, place in the source's
        endless stream, image).

    Example: augment(image of 640 x 480, "resolution", (0, 0, 7, 31, 0)) -> one of 512 x 384
    """
    random = np.random.default_rng(list(seeds))
    share, quality = random.uniform(*SHARES), int(random.integers(*QUALITIES, endpoint=True))
    if "resolution" in kind and min(image.size) >= SMALLEST_SIDE:
        width, height = image.size
        image = resize_image(image, round(width * share), round(height * share))
    if "jpeg" in kind:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        image = Image.open(buffer)
        image.load()
    return image
