"""Transforms: what changes training samples before they become tokens and patches, by the names in a source's config.

A transform is a function `(sample, seeds) -> sample`. To add one, put it into `TRANSFORMS`, or name your own function
in `config.data.sources.N.transforms` as "package.module:function" (docs/data.md has an example).

What is drawn follows from the seeds alone. They hold the sample's place in the endless stream of its source, so every
epoch (and every pass of a source that is repeated within one) draws anew, and what is drawn is the same after a restart
and for any number of threads, worker processes and hosts.
"""

import dataclasses
import functools
import io
from collections.abc import Callable, Iterable
from typing import cast

import numpy as np
from PIL import Image

from navil_jax.config.flags import named_object
from navil_jax.data.pillow_resampling import resize_image
from navil_jax.data.sample import Sample

Seeds = tuple[int, ...]  # data.seed, source, sample, place in the source's endless stream
Transform = Callable[[Sample, Seeds], Sample]  # the images of the sample are decoded, in RGB

QUALITIES = (75, 100)  # of JPEG, both ends included (InternVL)
SHARES = (0.5, 1.0)  # of both sides
SMALLEST_SIDE = 32  # pixels; images with a shorter side keep their size, for rounding would bend them


def jpeg(sample: Sample, seeds: Seeds) -> Sample:
    """What a JPEG of random quality keeps of each image."""

    def change(image: Image.Image, seeds: Seeds) -> Image.Image:
        _, quality = _draw(seeds)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        changed = Image.open(buffer, formats=("JPEG",))
        changed.load()
        return changed

    return _with_images(sample, change, seeds)


def resolution(sample: Sample, seeds: Seeds) -> Sample:
    """Each image shrunk to a random share of its sides, the ratio of which stays.

    Example: an image of 640 x 480 -> one of 512 x 384
    """

    def change(image: Image.Image, seeds: Seeds) -> Image.Image:
        share, _ = _draw(seeds)
        if min(image.size) < SMALLEST_SIDE:
            return image
        return resize_image(image, round(image.width * share), round(image.height * share))

    return _with_images(sample, change, seeds)


def _draw(seeds: Seeds) -> tuple[float, int]:
    """Share of the sides and quality for one image, drawn together so that neither depends on the other transform."""
    random = np.random.default_rng(list(seeds))
    return random.uniform(*SHARES), int(random.integers(*QUALITIES, endpoint=True))


def _with_images(sample: Sample, change: Callable[[Image.Image, Seeds], Image.Image], seeds: Seeds) -> Sample:
    decoded = cast(tuple[Image.Image, ...], sample.images)
    changed = tuple(change(image, (*seeds, number)) for number, image in enumerate(decoded))
    return dataclasses.replace(sample, images=changed)


TRANSFORMS: dict[str, Transform] = {"jpeg": jpeg, "resolution": resolution}


@functools.cache
def find_transform(name: str) -> Transform:
    """The transform of a name of `TRANSFORMS`, or of "package.module:function".

    Raises:
      UserError: there is no such transform.
    """
    if name in TRANSFORMS:
        return TRANSFORMS[name]
    return named_object(name, dict.fromkeys(TRANSFORMS, ""), "config.data.sources: transforms")


def apply(names: Iterable[str], sample: Sample, seeds: Seeds) -> Sample:
    """The sample after all transforms of these names, one after the other."""
    for name in names:
        sample = find_transform(name)(sample, seeds)
    return sample
