"""Conversations -> prompt text, ids, and the spans that are learnt (released chat templates).

    <|im_start|>system\\n{system}<|im_end|><|im_start|>user\\n{question}<|im_end|><|im_start|>assistant\\n{answer}<|im_end|>

An image's `<image>` in a question becomes `<img>`, for each scale (smallest first) rows of `<IMG_CONTEXT>` that end in
`<IMG_LINE_BREAK>` and one `<IMG_FRAME_BREAK>`, then `</img>`. `<image>` counts in questions only.

In all that the template writes, every added token of the tokenizer is parsed, special or not (Qwen3's `<think>`, which
is plain text to a tokenizer without it). System message, questions and answers are plain text.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from navil_jax.batch import SampleFeatures
from navil_jax.config import DEFAULT_SYSTEM_MESSAGE, Config
from navil_jax.data.grounding import MARKERS
from navil_jax.data.images import Scale, plan_scales
from navil_jax.data.tokenizers import Tokenizer
from navil_jax.errors import UserError

PLACEHOLDER = "<image>"
END = "<|im_end|>"
SHORT = 256  # characters of a text whose tokens are kept

Grids = Sequence[tuple[int, int]]  # (rows, columns) in patches of each scale of one image, smallest first
Turns = Sequence[tuple[str, str]]  # (question, answer)
TemplateName = Literal["internlm2-chat", "qwen3-chat"]
LossWeight = Literal["token", "sample", "square"]


class Template(NamedTuple):
    """What differs between the chat templates."""

    assistant: str  # what stands in front of an answer
    bos: bool  # whether the sample starts with <s>, if the tokenizer has one


TEMPLATES = {
    "internlm2-chat": Template("assistant\n", bos=True),
    "qwen3-chat": Template("assistant\n<think>\n\n</think>\n\n", bos=False),
}


def role_texts(template: TemplateName) -> tuple[str, ...]:
    """The texts that stand around every turn; a tokenizer trained with them makes short prompts."""
    return "system\n", "user\n", TEMPLATES[template].assistant


class Part(NamedTuple):
    """A stretch of the prompt: what the template writes (parsed for added tokens), or plain text."""

    text: str
    parsed: bool = False
    learnt: bool = False


def image_text(grids: Grids, merge_size: int = 2) -> str:
    """The markers of one image.

    Args:
      grids: (rows, columns) in patches of each scale, smallest first.
      merge_size: side in patches of the unit that one `<IMG_CONTEXT>` stands for.

    Example: ((2, 4),) -> <img><IMG_CONTEXT><IMG_CONTEXT><IMG_LINE_BREAK><IMG_FRAME_BREAK></img>
    """
    scales = (
        ("<IMG_CONTEXT>" * (cols // merge_size) + "<IMG_LINE_BREAK>") * (rows // merge_size) + "<IMG_FRAME_BREAK>"
        for rows, cols in grids
    )
    return f"<img>{''.join(scales)}</img>"


@dataclasses.dataclass(frozen=True)
class ImageTokens:
    """What one image costs."""

    width: int
    height: int
    scales: tuple[Scale, ...]  # smallest first
    visual_tokens: int  # <img> and one <IMG_CONTEXT> per merged unit
    text_tokens: int  # line breaks, frame breaks and </img>
    patches: int
    padding: float  # share of the patches' pixels that lie outside the image

    @property
    def grids(self) -> Grids:
        return [(scale.rows, scale.cols) for scale in self.scales]


def image_tokens(width: int, height: int, config: Config) -> ImageTokens:
    """Counts what an image of width x height pixels costs: the tokens of `image_text`, and its patches.

    Raises:
      UserError: one side is over 200 times the other, or the config has no vision encoder.

    Example, with the defaults: 640 x 480 -> scales of 16 x 22, 22 x 30 and 30 x 40 patches, 554 + 38 tokens
    """
    vision = config.model.vision
    if vision is None:
        raise UserError("config.model.vision is none: this model takes no images")
    scales = tuple(plan_scales(height, width, config.images, vision))
    patches = sum(scale.rows * scale.cols for scale in scales)
    inside = sum(scale.height * scale.width for scale in scales)
    return ImageTokens(
        width=width,
        height=height,
        scales=scales,
        visual_tokens=1 + patches // vision.unit_patches,
        text_tokens=1 + sum(scale.rows // vision.merge_size + 1 for scale in scales),
        patches=patches,
        padding=1 - inside / (patches * vision.patch_size**2),
    )


def with_placeholders(questions: Sequence[str], images: int) -> list[str]:
    """The questions with "<image>\\n" once per image before the first, if none of them says where the images go.

    Raises:
      UserError: another number of `<image>` than of images.
    """
    found = sum(question.count(PLACEHOLDER) for question in questions)
    if found == 0 and images:
        return [f"{PLACEHOLDER}\n" * images + questions[0], *questions[1:]]
    if found != images:
        raise UserError(f"{images} images are given but the questions hold {PLACEHOLDER} {found} times")
    return list(questions)


def chat_prompt(
    template: TemplateName,
    system: str | None,
    history: Turns | None,
    question: str,
    grids_per_image: Sequence[Grids],
    merge_size: int = 2,
) -> str:
    """The prompt as the released chat function builds it, up to where the answer starts.

    An empty old question or answer leaves its role without `<|im_end|>`, as in the released code.

    Args:
      system: the system message; None stands for the released default, "" for an empty one.
      history: earlier turns; `<image>` in their questions takes the first images. See `with_placeholders`.
      grids_per_image: see `image_text`.

    Raises:
      UserError: another number of `<image>` than of images.
    """
    turns = [*(history or ()), (question, "")]
    return "".join(part.text for part in _parts(template, system, turns, grids_per_image, merge_size))


def prompt_ids(tokenizer: Tokenizer, template: TemplateName, prompt: str) -> list[int]:
    """Ids of a prompt's text as the released code has them: markers are parsed wherever they stand, also typed ones."""
    return _bos(tokenizer, template) + tokenizer.encode(prompt, allow_special=True)


def encode_prompt(
    tokenizer: Tokenizer,
    template: TemplateName,
    system: str | None,
    history: Turns | None,
    question: str,
    grids_per_image: Sequence[Grids],
    merge_size: int = 2,
) -> SampleFeatures:
    """`chat_prompt` as features for prefill, where markers that a user typed stay plain text. Weights are all 0."""
    turns = [*(history or ()), (question, "")]
    ids, _ = _encode(tokenizer, template, _parts(template, system, turns, grids_per_image, merge_size))
    return token_features(tokenizer, ids, np.zeros(len(ids), np.float32))


def encode_conversation(
    tokenizer: Tokenizer,
    template: TemplateName,
    system: str | None,
    turns: Turns,
    grids_per_image: Sequence[Grids],
    loss_weight: LossWeight,
    merge_size: int = 2,
    grounded: bool = False,
) -> SampleFeatures:
    """A sample for training: the tokens of every answer and the `<|im_end|>` after it are learnt, nothing else.

    Nothing in the system message, questions and answers is parsed but `<image>` in questions; see `with_placeholders`.

    Args:
      loss_weight: weight of each of the n learnt tokens: token 1, sample 1/n, square 1/sqrt(n).
      grounded: `<ref>`, `<box>` and what closes them are parsed, too, in questions and answers.

    Returns:
      The visual_* and text_* features of `batch.SampleFeatures` but for text_source_ids and text_sample_ids.

    Raises:
      UserError: no turn, an empty answer, or another number of `<image>` than of images.
    """
    if not turns:
        raise UserError("a sample needs at least one question and answer")
    for number, (_, answer) in enumerate(turns, start=1):
        if not answer:
            raise UserError(f"turn {number}: the answer is empty, there is nothing to learn")
    parts = _parts(template, system, turns, grids_per_image, merge_size, grounded)
    ids, learnt = _encode(tokenizer, template, parts)
    power = {"token": 0.0, "sample": 1.0, "square": 0.5}[loss_weight]
    weight = np.count_nonzero(learnt) ** -power
    return token_features(tokenizer, ids, np.where(learnt, weight, 0).astype(np.float32))


def token_features(tokenizer: Tokenizer, ids: Sequence[int], weights: np.ndarray) -> SampleFeatures:
    """Splits a sample's ids into visual tokens (`<IMG_CONTEXT>` and `<img>`) and text tokens.

    Args:
      ids: [s] in reading order.
      weights: [s] float32, loss weight of each token as a target.

    Returns:
      visual_tokens, visual_positions [n] int32; text_tokens, text_positions, text_targets [m] int32; text_weights [m]
      float32. A target is the next token in reading order, -1 at the end.

    Example: <s> <img> c a b -> visual <img> c at 1 2; text <s> a b at 0 3 4 with targets <img> b -1
    """
    tokens = np.asarray(ids, np.int32)
    positions = np.arange(len(tokens), dtype=np.int32)
    targets = np.append(tokens[1:], np.int32(-1))
    target_weights = np.append(weights[1:], np.float32(0))
    visual = (tokens == tokenizer.token_id("<IMG_CONTEXT>")) | (tokens == tokenizer.token_id("<img>"))
    return {
        "visual_tokens": tokens[visual],
        "visual_positions": positions[visual],
        "text_tokens": tokens[~visual],
        "text_positions": positions[~visual],
        "text_targets": targets[~visual],
        "text_weights": target_weights[~visual],
    }


def response_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The answer in produced ids, as the released chat function cuts it out.

    Special tokens go, text from `<|im_end|>` on and blanks at both ends too, then every remainder of a broken
    `<|im_end|>` anywhere. Released behaviour: a blank before such a remainder stays.
    """
    text = tokenizer.decode(ids, skip_special=True).split(END)[0].strip()
    for remainder in ("<|im_end|", "<|im_end", "<|im"):
        text = text.replace(remainder, "")
    return text


def _parts(
    template: TemplateName,
    system: str | None,
    turns: Turns,
    grids_per_image: Sequence[Grids],
    merge_size: int,
    grounded: bool = False,
) -> Iterator[Part]:
    images = [_kept_image_text(tuple(map(tuple, grids)), merge_size) for grids in grids_per_image]
    questions = with_placeholders([question for question, _ in turns], len(images))
    remaining = iter(images)
    yield from (_START, _SYSTEM, Part(DEFAULT_SYSTEM_MESSAGE if system is None else system), _END)
    for question, (_, answer) in zip(questions, turns, strict=True):
        yield from (_START, _USER)
        for number, text in enumerate(question.split(PLACEHOLDER)):
            if number:
                yield Part(next(remaining), parsed=True)
            yield from _with_markers(Part(text), grounded)
        if question:
            yield _END
        yield from (_START, Part(TEMPLATES[template].assistant, parsed=True))
        if answer:
            yield from _with_markers(Part(answer, learnt=True), grounded)
            yield _END._replace(learnt=True)


def _with_markers(part: Part, grounded: bool) -> Iterator[Part]:
    """Plain text; of a grounded sample with the markers of names and boxes parsed."""
    if not grounded:
        yield part
        return
    for number, text in enumerate(MARKERS.split(part.text)):
        yield part._replace(text=text, parsed=number % 2 == 1)


_START, _END, _SYSTEM, _USER = (Part(text, parsed=True) for text in ("<|im_start|>", END, "system\n", "user\n"))


def _bos(tokenizer: Tokenizer, template: TemplateName) -> list[int]:
    return [tokenizer.bos_id] if TEMPLATES[template].bos and tokenizer.bos_id is not None else []


def _runs(tokenizer: Tokenizer, part: Part) -> Sequence[Part]:
    """A part as added tokens (parsed) and plain text; nothing if it is empty."""
    if not part.parsed:
        return (part,) if part.text else ()
    return _template_runs(tokenizer, part)


# Texts of the template, markers of images of one size, and short texts such as system messages and questions come again
# and again, so what is made of them is kept.
_kept_image_text = functools.lru_cache(maxsize=256)(image_text)


@functools.lru_cache(maxsize=256)
def _template_runs(tokenizer: Tokenizer, part: Part) -> tuple[Part, ...]:
    stretches = itertools.groupby(tokenizer.split(part.text), key=lambda stretch: stretch[1])
    return tuple(part._replace(text="".join(text for text, _ in group), parsed=added) for added, group in stretches)


@functools.lru_cache(maxsize=256)
def _marker_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of markers, thousands for a large image."""
    return tuple(tokenizer.encode(text, allow_special=True))


def _plain_ids(tokenizer: Tokenizer, run: tuple[Part, ...]) -> tuple[list[int], list[bool]]:
    """Ids of plain text and whether each is learnt: where a character of an answer is in it."""
    tokens = tokenizer.encode_with_spans("".join(part.text for part in run))
    ids = [token.id for token in tokens]
    if not any(part.learnt for part in run):
        return ids, [False] * len(ids)
    characters = [part.learnt for part in run for _ in part.text]
    return ids, [any(characters[token.begin : max(token.end, token.begin + 1)]) for token in tokens]


_kept_plain_ids = functools.lru_cache(maxsize=4096)(_plain_ids)


def _encode(tokenizer: Tokenizer, template: TemplateName, parts: Iterator[Part]) -> tuple[list[int], np.ndarray]:
    """Ids and whether each is learnt. Text between markers is encoded in one go, as the released tokenizer does."""
    ids = _bos(tokenizer, template)
    learnt = [False] * len(ids)
    runs = itertools.chain.from_iterable(_runs(tokenizer, part) for part in parts)
    for markers, group in itertools.groupby(runs, key=operator.attrgetter("parsed")):
        run = tuple(group)
        if markers:
            for part in run:
                found = _marker_ids(tokenizer, part.text)
                ids += found
                learnt += [part.learnt] * len(found)
        else:
            short = sum(len(part.text) for part in run) <= SHORT
            plain, of_answers = (_kept_plain_ids if short else _plain_ids)(tokenizer, run)
            ids += plain
            learnt += of_answers
    return ids, np.array(learnt)
