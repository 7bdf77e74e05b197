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
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image

from navil_jax.config.flags import named_object
from navil_jax.data.pillow_resampling import resize_image
from navil_jax.data.sample import Sample
from navil_jax.errors import UserError

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


class TransformFailed(Exception):
    """A transform of the user's has a fault; the message names it and the fault."""


TRANSFORMS: dict[str, Transform] = {"jpeg": jpeg, "resolution": resolution}
for _transform in TRANSFORMS.values():
    _transform.keeps_boxes = True  # type: ignore[attr-defined]  # boxes in its samples are right after it


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
    """The sample after all transforms of these names, one after the other.

    Raises:
      UserError: a transform says so of the sample.
      TransformFailed: it raises anything else, or gives no sample.
    """
    for name in names:
        transform = find_transform(name)
        try:
            changed = transform(sample, seeds)
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            at = f" ({place.filename}:{place.lineno})" if len(traceback.extract_tb(error.__traceback__)) > 1 else ""
            raise TransformFailed(f"transform {name} raised {type(error).__name__}: {error}{at}") from error
        if sample.grounded and _moved(sample, changed) and not getattr(transform, "keeps_boxes", False):
            raise TransformFailed(
                f"transform {name} changes images of a sample with boxes; if they are right after it (see "
                f"data.grounding.map_boxes), say so: {name.rpartition(':')[2]}.keeps_boxes = True"
            )
        if not _is_sample(changed):
            raise TransformFailed(f"transform {name} gave {_short(changed)}, not a Sample with its images and turns")
        sample = changed
    return sample


def _moved(sample: Sample, changed: object) -> bool:
    """Whether the images are other ones, so that boxes may lie elsewhere."""
    images = getattr(changed, "images", ())
    return len(images) != len(sample.images) or any(a is not b for a, b in zip(images, sample.images, strict=True))


def _is_sample(value: object) -> bool:
    if not isinstance(value, Sample) or not isinstance(value.images, tuple) or not isinstance(value.turns, tuple):
        return False
    texts = [text for turn in value.turns if isinstance(turn, tuple) and len(turn) == 2 for text in turn]
    are_texts = len(texts) == 2 * len(value.turns) > 0 and all(isinstance(text, str) for text in texts)
    return are_texts and all(isinstance(image, Image.Image | bytes | Path) for image in value.images)


def _short(value: object) -> str:
    return "a Sample of other types" if isinstance(value, Sample) else type(value).__name__
