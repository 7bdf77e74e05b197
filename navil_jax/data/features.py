"""Samples -> `batch.SampleFeatures`, and what becomes of samples that cannot be used."""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from navil_jax.batch import SampleFeatures
from navil_jax.config import Config
from navil_jax.data import transforms
from navil_jax.data.images import ImagePatches, image_patches, load_image
from navil_jax.data.prompt import ImageTokens, encode_conversation, image_tokens
from navil_jax.data.sample import BadSample, Sample, Source
from navil_jax.data.tokenizers import Tokenizer
from navil_jax.errors import UserError

PAUSES = (1.0, 5.0, 20.0)  # seconds before what disk or network refused is tried again
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Usable:
    """A sample that is trained on."""

    source: str
    features: SampleFeatures
    resized: bool = False  # whether its images are smaller than they would be in a longer row


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A sample that is left out: bad, or longer than a whole packed row."""

    source: str
    samples: int  # of the source
    index: int
    key: str
    reason: str
    too_long: bool = False
    known: bool = False  # it was on a list of bad samples and was not read


class TooLong(Exception):
    """A sample that fits no row; the message says what does not fit."""


def sample_features(
    sample: Sample,
    config: Config,
    tokenizer: Tokenizer,
    source_id: int = 0,
    sample_id: int = 0,
    place: int | None = None,
) -> SampleFeatures:
    """One sample's tokens and patches, however many.

    Args:
      source_id: place of the source in config.data.sources.
      sample_id: place of the sample in its source.
      place: in the endless stream of its source: the source's transforms change it, at random ones in another way at
        every place. None: it stays as it is.

    Returns:
      All features that `batch.SampleFeatures` lists. A sample without images has patches of shape [0, D].

    Raises:
      UserError: an image cannot be read, or the conversation does not fit its images.
    """
    return fitting_features(sample, config, tokenizer, None, source_id, sample_id, place)[0]


def fitting_features(
    sample: Sample,
    config: Config,
    tokenizer: Tokenizer,
    budgets: Mapping[str, int] | None,
    source_id: int = 0,
    sample_id: int = 0,
    place: int | None = None,
) -> tuple[SampleFeatures, bool]:
    """`sample_features` of a sample that fits a row, and whether its images had to shrink for that.

    With config.data.oversize "resize" the images of a sample that is too long get smaller: one lower max_patches for
    all of them, the largest that will do. An image's tokens are never cut.

    Args:
      budgets: feature -> most that fits in a row; None: any length is right.

    Raises:
      UserError: as `sample_features`.
      TooLong: fits no row.
    """
    sample = decoded(sample, config, source_id, sample_id, place)
    features, config, resized = tokenised(sample, config, tokenizer, budgets)
    length = len(features["text_tokens"])
    numbers = {
        "text_source_ids": np.full(length, source_id, np.int32),
        "text_sample_ids": np.full(length, sample_id, np.int32),
    }
    return {**features, **numbers, **cut_patches(sample, config)}, resized


def decoded(sample: Sample, config: Config, source_id: int = 0, sample_id: int = 0, place: int | None = None) -> Sample:
    """The sample with its images decoded, in RGB, and changed by its source's transforms; as of `sample_features`."""
    sample = dataclasses.replace(sample, images=_images(sample, config))
    if place is None or not (names := config.data.sources[source_id].transforms):
        return sample
    sample = transforms.apply(names, sample, (config.data.seed, source_id, sample_id, place))
    return dataclasses.replace(sample, images=_images(sample, config))


def tokenised(
    sample: Sample, config: Config, tokenizer: Tokenizer, budgets: Mapping[str, int] | None
) -> tuple[SampleFeatures, Config, bool]:
    """The tokens of a decoded sample, the config that its images are cut with, and whether they get smaller by it.

    Raises as `fitting_features`.
    """
    sizes = [(image.height, image.width) for image in _decoded_images(sample)]
    costs = _costs(sizes, config)
    features = _tokens(sample, config, tokenizer, costs)
    excess = _excess(_lengths(features, costs), budgets)
    resized = False
    if excess and budgets is not None and sizes and config.data.oversize == "resize":
        resized = True
        config = smaller_images(sizes, config, len(features["text_tokens"]), budgets)
        costs = _costs(sizes, config)
        features = _tokens(sample, config, tokenizer, costs)
        excess = _excess(_lengths(features, costs), budgets)
    if excess:
        raise TooLong(excess)
    return features, config, resized


def cut_patches(sample: Sample, config: Config) -> dict[str, np.ndarray]:
    """The patches of a decoded sample's images, resized."""
    images = _decoded_images(sample)
    return patch_features([image_patches(image, config.images, config.model.encoder) for image in images], config)


def _decoded_images(sample: Sample) -> list[Image.Image]:
    return [image for image in sample.images if isinstance(image, Image.Image)]


def _images(sample: Sample, config: Config) -> tuple[Image.Image, ...]:
    """The decoded images, in RGB."""
    if sample.images and config.model.vision is None:
        raise UserError(f"{sample.key}: has images, but config.model.vision is None")
    return tuple(
        load_image(source, f"{sample.key}, image {number}" if isinstance(source, bytes) else "")
        for number, source in enumerate(sample.images, start=1)
    )


def _costs(sizes: Sequence[tuple[int, int]], config: Config) -> list[ImageTokens]:
    """Of images of these (height, width)."""
    return [image_tokens(width, height, config) for height, width in sizes]


def _tokens(sample: Sample, config: Config, tokenizer: Tokenizer, costs: Sequence[ImageTokens]) -> SampleFeatures:
    return encode_conversation(
        tokenizer,
        config.data.template,
        config.data.system_message if sample.system is None else sample.system,
        sample.turns,
        [cost.grids for cost in costs],
        config.data.loss_weight,
        config.model.vision.merge_size if config.model.vision else 2,
        sample.grounded,
    )


def _lengths(features: SampleFeatures, costs: Sequence[ImageTokens]) -> dict[str, int]:
    return {
        "visual_tokens": len(features["visual_tokens"]),
        "text_tokens": len(features["text_tokens"]),
        "patches": sum(cost.patches for cost in costs),
    }


def _excess(lengths: Mapping[str, int], budgets: Mapping[str, int] | None) -> str:
    """What does not fit a row; empty: all fits."""
    for feature, length in lengths.items():
        if budgets is not None and length > budgets[feature]:
            return f"{length} {feature} do not fit a row's {budgets[feature]}"
    return ""


def smaller_images(
    sizes: Sequence[tuple[int, int]], config: Config, text_tokens: int, budgets: Mapping[str, int]
) -> Config:
    """The config with the largest images.max_patches with which the sample fits, or min_patches where none will do.

    Args:
      sizes: (height, width) of the images.
      text_tokens: of the sample with its images as they are in `config`.
    """
    words = text_tokens - sum(cost.text_tokens for cost in _costs(sizes, config))

    def with_limit(patches: int) -> Config:
        return dataclasses.replace(config, images=dataclasses.replace(config.images, max_patches=patches))

    def fits(patches: int) -> bool:
        costs = _costs(sizes, with_limit(patches))
        lengths = {
            "visual_tokens": sum(cost.visual_tokens for cost in costs),
            "text_tokens": sum(cost.text_tokens for cost in costs) + words,
            "patches": sum(cost.patches for cost in costs),
        }
        return not _excess(lengths, budgets)

    least, most = config.images.min_patches, config.images.max_patches
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return with_limit(least)


def patch_features(images: Sequence[ImagePatches], config: Config) -> dict[str, np.ndarray]:
    """patches, patch_coords and patch_blocks of `batch.SampleFeatures`; the images' scales are numbered on."""
    vision = config.model.vision
    patches, coords = [np.zeros((0, vision.patch_dim if vision else 0), np.uint8)], [np.zeros((0, 2), np.int32)]
    blocks, scales = [np.zeros(0, np.int32)], 0
    for image in images:
        patches.append(image.patches)
        coords.append(image.coords)
        blocks.append(image.blocks + np.int32(scales))
        scales += len(image.grids)
    return {
        "patches": np.concatenate(patches),
        "patch_coords": np.concatenate(coords),
        "patch_blocks": np.concatenate(blocks),
    }


@dataclasses.dataclass(frozen=True)
class FeatureSource:
    """Random access to a source's samples as features, or as `Skipped` where a sample cannot be used.

    Failures of disk and network (OSError) are tried again. Everything else that is no `UserError` ends the run: it says
    nothing about the sample, so nothing may depend on it.
    """

    source: Source
    name: str
    source_id: int
    config: Config
    tokenizer: Tokenizer
    budgets: Mapping[str, int]  # feature -> most that fits in a row
    training: bool = False  # whether the source's transforms change its samples

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Usable | Skipped:
        return self.read(index, 0)

    def read(self, index: int, place: int) -> Usable | Skipped:
        """Sample `index`, which stands at `place` of the source's endless stream (see `mixture`).

        Raises:
          UserError: a transform has a fault, which ends the run.
          RuntimeError: the source failed in a way that says nothing about the sample.
        """
        sample = self.fetch(index)
        return sample if isinstance(sample, Skipped) else self.make(sample, index, place)

    def fetch(self, index: int) -> Sample | Skipped:
        """Sample `index` as its source has it: what takes disk and network. Raises as `read`."""
        try:
            return self._read(index)
        except BadSample as error:
            return self._skipped(index, error.key, error.reason)
        except UserError as error:
            return self._skipped(index, f"{self.name}/{index}", str(error))
        except BaseException as error:  # SystemExit, too: in a thread that reads it would end nothing but the thread
            raise self._failed(index, f"{self.name}/{index}", error) from error

    def make(self, sample: Sample, index: int, place: int) -> Usable | Skipped:
        """Features of a sample that was fetched: what takes CPU. Raises as `read`."""
        try:
            features, resized = fitting_features(
                sample,
                self.config,
                self.tokenizer,
                self.budgets,
                self.source_id,
                index,
                place if self.training else None,
            )
        except BadSample as error:
            return self._skipped(index, error.key, error.reason)
        except UserError as error:
            return self._skipped(index, sample.key, str(error))
        except TooLong as error:
            return self._skipped(index, sample.key, str(error), too_long=True)
        except transforms.TransformFailed as error:
            raise UserError(f"source {self.name}, sample {index} ({sample.key}): {error}") from error
        except BaseException as error:
            raise self._failed(index, sample.key, error) from error
        return Usable(self.name, features, resized)

    def _skipped(self, index: int, key: str, reason: str, too_long: bool = False) -> Skipped:
        return Skipped(self.name, len(self.source), index, key, reason, too_long)

    def _failed(self, index: int, key: str, error: BaseException) -> RuntimeError:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return RuntimeError(f"reading sample {index} of source {self.name} ({key}) failed: {what}")

    def _read(self, index: int) -> Sample:
        for pause in PAUSES:
            try:
                return self.source[index]
            except OSError as error:
                _log.warning("sample %d of %s: %s; trying again in %g s", index, self.name, error, pause)
                time.sleep(pause)
        return self.source[index]
