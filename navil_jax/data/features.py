"""Samples -> `batch.SampleFeatures`, and what becomes of samples that cannot be used."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from navil_jax.batch import SampleFeatures
from navil_jax.config import Config
from navil_jax.data.images import ImagePatches, image_patches, load_image
from navil_jax.data.prompt import encode_conversation
from navil_jax.data.sources import Sample, Source
from navil_jax.data.tokenizer import Tokenizer
from navil_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A sample that is left out: broken, or longer than a whole packed row."""

    source: str
    key: str
    reason: str


def sample_features(
    sample: Sample, config: Config, tokenizer: Tokenizer, source_id: int = 0, sample_id: int = 0
) -> SampleFeatures:
    """One sample's tokens and patches.

    Args:
      source_id: place of the source in config.data.sources.
      sample_id: place of the sample in its source.

    Returns:
      All features that `batch.SampleFeatures` lists. A sample without pictures has patches of shape [0, D].

    Raises:
      UserError: a picture cannot be read, or the conversation does not fit its pictures.
    """
    pictures = _pictures(sample, config)
    features = encode_conversation(
        tokenizer,
        config.data.template,
        config.data.system_message,
        sample.turns,
        [picture.grids for picture in pictures],
        config.data.loss_weight,
        config.model.vision.merge_size if config.model.vision else 2,
    )
    length = len(features["text_tokens"])
    numbers = {
        "text_source_ids": np.full(length, source_id, np.int32),
        "text_sample_ids": np.full(length, sample_id, np.int32),
    }
    return {**features, **numbers, **patch_features(pictures, config)}


def _pictures(sample: Sample, config: Config) -> list[ImagePatches]:
    if sample.images and config.model.vision is None:
        raise UserError(f"{sample.key}: has pictures, but config.model.vision is None")
    return [image_patches(load_image(image), config.images, config.model.vision) for image in sample.images]


def patch_features(pictures: Sequence[ImagePatches], config: Config) -> dict[str, np.ndarray]:
    """patches, patch_coords and patch_blocks of `batch.SampleFeatures`; the pictures' scales are numbered on."""
    vision = config.model.vision
    patches, coords = [np.zeros((0, vision.patch_dim if vision else 0), np.uint8)], [np.zeros((0, 2), np.int32)]
    blocks, scales = [np.zeros(0, np.int32)], 0
    for picture in pictures:
        patches.append(picture.patches)
        coords.append(picture.coords)
        blocks.append(picture.blocks + np.int32(scales))
        scales += len(picture.grids)
    return {
        "patches": np.concatenate(patches),
        "patch_coords": np.concatenate(coords),
        "patch_blocks": np.concatenate(blocks),
    }


@dataclasses.dataclass(frozen=True)
class FeatureSource:
    """Random access to a source's samples as features, or as `Skipped` where a sample cannot be used."""

    source: Source
    name: str
    source_id: int
    config: Config
    tokenizer: Tokenizer
    budgets: Mapping[str, int]  # feature -> most that fits in a row

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> SampleFeatures | Skipped:
        key = f"{self.name}/{index}"
        try:
            sample = self.source[index]
            key = sample.key
            features = sample_features(sample, self.config, self.tokenizer, self.source_id, index)
        except UserError as error:
            return Skipped(self.name, key, str(error))
        for feature in ("visual_tokens", "text_tokens", "patches"):
            if len(features[feature]) > self.budgets[feature]:
                reason = f"{len(features[feature])} {feature} do not fit a row's {self.budgets[feature]}"
                return Skipped(self.name, key, reason)
        return features
