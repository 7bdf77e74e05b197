"""Tokenised samples as people read them: their text, which of it is trained with which weight, and their images."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from navil_jax.batch import Batch, SampleFeatures
from navil_jax.config import SPECIAL_TOKENS, VisionConfig
from navil_jax.data.grounding import Box, boxes_in
from navil_jax.data.tokenizers import Tokenizer
from navil_jax.errors import UserError

_BOX = ("<box>", "</box>")
VISUAL = ("<IMG_CONTEXT>", "<img>")  # tokens on visual slots


class Span(NamedTuple):
    """A stretch of a sample whose tokens have the same weight."""

    text: str
    tokens: int
    weight: float = 0.0  # loss weight of each of these tokens; 0: not trained
    image: int | None = None  # number of the image that it is, from 0
    visual: int = 0  # of its tokens, those on visual slots; the others break lines and end scales


@dataclasses.dataclass(frozen=True)
class SampleView:
    """One sample of a row."""

    spans: tuple[Span, ...]
    images: tuple[Image.Image, ...]  # the largest scale of each, with its padding, as the encoder gets it, and boxes
    visual_tokens: int
    text_tokens: int
    patches: int
    source: int = 0
    sample: int = 0


@dataclasses.dataclass(frozen=True)
class RowView:
    """One packed row."""

    samples: tuple[SampleView, ...]
    fill: dict[str, tuple[int, int]]  # budget -> how much of it is used, and how much there is


def marker_ids(tokenizer: Tokenizer) -> dict[int, str]:
    """Ids of the markers of the chat template and of images, as far as the tokenizer has them, with their text."""
    found = {} if tokenizer.bos_id is None else {tokenizer.bos_id: "<s>"}
    for token in (*tokenizer.MARKERS, *SPECIAL_TOKENS):
        try:
            found[tokenizer.token_id(token)] = token
        except UserError:
            continue
    return found


def read_spans(ids: Sequence[int], weights: Sequence[float], tokenizer: Tokenizer) -> tuple[Span, ...]:
    """Joins tokens to stretches of text and images.

    Args:
      ids: of one sample in reading order.
      weights: as many; the loss weight of each of these tokens itself (not of the one that follows it).

    Example: ids of <img> c c </img> Yes, weights 0 0 0 0 1 -> Span("", 4, image=0, visual=3), Span("Yes", 1, 1.0)
    """
    markers = marker_ids(tokenizer)
    kinds, image, inside = [], -1, False
    for token, weight in zip(ids, weights, strict=True):
        name = markers.get(token, "")
        image, inside = image + (name == "<img>"), inside or name == "<img>"
        kinds.append((image, "", 0.0) if inside else (None, name, float(weight)))
        inside = inside and name != "</img>"
    stretches, start = [], 0
    for (number, name, weight), group in itertools.groupby(kinds):
        end = start + len(list(group))
        plain = number is None and not name
        text = _text(ids, kinds, start, end, tokenizer) if plain else name * (end - start)
        visual = sum(markers.get(token) in VISUAL for token in ids[start:end])
        stretches.append(Span(text, end - start, weight, number, visual))
        start = end
    joined = (list(group) for _, group in itertools.groupby(stretches, key=lambda span: (span.weight, span.image)))
    return tuple(
        first._replace(
            text="".join(span.text for span in spans),
            tokens=sum(span.tokens for span in spans),
            visual=sum(span.visual for span in spans),
        )
        for spans in joined
        for first in spans[:1]
    )


def _text(ids: Sequence[int], kinds: Sequence[tuple], start: int, end: int, tokenizer: Tokenizer) -> str:
    """The plain text of ids[start:end], decoded behind the plain text before it, so that a blank at its start stays."""
    first = start
    while first and kinds[first - 1][:2] == (None, ""):
        first -= 1
    before = tokenizer.decode(list(ids[first:start]))
    return tokenizer.decode(list(ids[first:end]))[len(before) :]


def view_sample(features: SampleFeatures, tokenizer: Tokenizer, vision: VisionConfig | None) -> SampleView:
    """A sample before it is packed; `features` as `data.features.sample_features` gives them."""
    length = len(features["visual_tokens"]) + len(features["text_tokens"])
    ids, weights = np.zeros(length, np.int32), np.zeros(length, np.float32)
    for kind in ("visual", "text"):
        ids[features[f"{kind}_positions"]] = features[f"{kind}_tokens"]
    weights[features["text_positions"]] = features["text_weights"]
    patches, coords, blocks = (features[name] for name in ("patches", "patch_coords", "patch_blocks"))
    return _view(ids, weights, (patches, coords, blocks), tokenizer, vision)


def view_rows(batch: Batch, tokenizer: Tokenizer, vision: VisionConfig | None) -> list[RowView]:
    """The rows of a packed batch; empty rows have no samples."""
    return [_view_row(batch, row, tokenizer, vision) for row in range(len(batch.tokens))]


def _view_row(batch: Batch, row: int, tokenizer: Tokenizer, vision: VisionConfig | None) -> RowView:
    order, segments, visual = batch.reading_order[row], batch.segment_ids[row], batch.visual_slots
    unit = vision.unit_patches if vision else 1
    samples = []
    for number in range(1, int(segments.max(initial=0)) + 1):
        places = order[segments[order] == number]
        units = np.flatnonzero(np.isin(batch.unit_slots[row], places))
        patches = (units[:, None] * unit + np.arange(unit)).reshape(-1)
        ids, weights = np.asarray(batch.tokens[row, places]), np.asarray(batch.loss_weights[row, places])
        pixels, coords, blocks = (
            np.asarray(array[row][patches]) for array in (batch.patches, batch.patch_coords, batch.patch_blocks)
        )
        view = _view(ids, weights, (pixels, coords, blocks), tokenizer, vision)
        source, sample = int(batch.source_ids[row, places[0]]), int(batch.sample_ids[row, places[0]])
        samples.append(dataclasses.replace(view, source=source, sample=sample))
    used = segments > 0
    fill = {
        "visual slots": (int(used[:visual].sum()), visual),
        "text slots": (int(used[visual:].sum()), len(used) - visual),
        "patch slots": (int(np.count_nonzero(batch.patch_blocks[row])), len(batch.patch_blocks[row])),
    }
    return RowView(tuple(samples), fill)


def _view(
    ids: np.ndarray,
    weights: np.ndarray,
    patches: tuple[np.ndarray, np.ndarray, np.ndarray],
    tokenizer: Tokenizer,
    vision: VisionConfig | None,
) -> SampleView:
    """Args: weights: of the target of each token, which is the token after it; patches: with coords and blocks."""
    own_weights = np.concatenate([np.zeros(1, np.float32), weights[:-1]])
    visual = np.isin(ids, [tokenizer.token_id(token) for token in VISUAL]) if len(patches[0]) else 0
    visual_tokens = int(np.sum(visual))
    images = rebuilt_images(ids, *patches, tokenizer, vision) if vision and len(patches[0]) else []
    spans = read_spans(ids.tolist(), own_weights.tolist(), tokenizer)
    boxes = _boxes(ids, tokenizer)
    images = [_with_boxes(image, boxes, vision) for image in images] if vision and boxes else images
    return SampleView(spans, tuple(images), visual_tokens, len(ids) - visual_tokens, len(patches[0]))


def _boxes(ids: np.ndarray, tokenizer: Tokenizer) -> list[Box]:
    """The boxes between the tokens `<box>` and `</box>`, in thousandths; typed ones are text."""
    opening, closing = ([token for token, name in marker_ids(tokenizer).items() if name == mark] for mark in _BOX)
    boxes, numbers = [], ids.tolist()
    for start in np.flatnonzero(np.isin(ids, opening)).tolist():
        end = next((place for place in range(start, len(numbers)) if numbers[place] in closing), start)
        boxes += boxes_in(tokenizer.decode(numbers[start + 1 : end]).join(_BOX))
    return boxes


def _with_boxes(image: Image.Image, boxes: Sequence[Box], vision: VisionConfig) -> Image.Image:
    """The image with boxes drawn on it; its padding, rows and columns of 0 in its last units, is none of it."""
    unit = vision.patch_size * vision.merge_size
    lit, drawn = np.any(np.asarray(image), axis=2), image.copy()
    sides = []
    for line, whole in ((lit.any(axis=0), image.width), (lit.any(axis=1), image.height)):
        seen = np.flatnonzero(line)
        sides.append(max(int(seen[-1]) + 1 if len(seen) else 1, whole - unit + 1))
    canvas, width = ImageDraw.Draw(drawn), max(1, max(image.size) // 120)
    for box in boxes:
        places = [round(side * sides[number % 2] / 1000) for number, side in enumerate(box)]
        canvas.rectangle(places, outline=(255, 0, 80), width=width)
    return drawn


def rebuilt_images(
    ids: np.ndarray,
    patches: np.ndarray,
    coords: np.ndarray,
    blocks: np.ndarray,
    tokenizer: Tokenizer,
    vision: VisionConfig,
) -> list[Image.Image]:
    """The largest scale of each image of a sample.

    Args:
      ids: [n] of the sample in reading order.
      patches, coords, blocks: [p, D] uint8, [p, 2] and [p], in the order of the sample's `<IMG_CONTEXT>` tokens.
    """
    starts = np.cumsum(ids == tokenizer.token_id("<img>"))
    counts = np.bincount(starts[ids == tokenizer.token_id("<IMG_CONTEXT>")])[1:] * vision.unit_patches
    images, side = [], vision.patch_size
    for end, count in zip(np.cumsum(counts).tolist(), counts.tolist(), strict=True):
        whole = slice(end - count, end)
        largest = np.flatnonzero(blocks[whole] == blocks[end - 1]) + end - count
        rows, cols = coords[largest].max(axis=0) + 1
        canvas = np.zeros((rows, cols, side, side, 3), np.uint8)
        pixels = patches[largest].reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
        canvas[coords[largest, 0], coords[largest, 1]] = pixels
        images.append(Image.fromarray(canvas.transpose(0, 2, 1, 3, 4).reshape(rows * side, cols * side, 3)))
    return images
