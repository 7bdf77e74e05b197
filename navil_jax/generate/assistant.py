"""Assistant: a model that answers questions about images, with prompts, tokens and streamed text."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from navil_jax.batch import SampleFeatures
from navil_jax.config import Config
from navil_jax.data.features import patch_features
from navil_jax.data.images import ImagePatches, image_patches, load_image
from navil_jax.data.prompt import END, Turns, encode_prompt, response_text
from navil_jax.data.tokenizers import Tokenizer
from navil_jax.errors import UserError
from navil_jax.generate.engine import Chooser, Engine

# The released decoding joins at most that many characters anew when more text comes (the length of "<|im_end|>").
UNSETTLED = len(END)


@dataclasses.dataclass(frozen=True)
class Assistant:
    """A model with what it takes to talk to it.

    Example:
      assistant = navil_jax.load_pretrained("runs/x").assistant
      image = assistant.read_image("cat.png")
      "".join(assistant.answer((), "What is this?", [image], Sampler(), max_new_tokens=64)) -> "A cat."
    """

    config: Config
    tokenizer: Tokenizer
    engine: Engine
    averaged: bool = False  # whether the parameters are running averages

    @property
    def stop_id(self) -> int:
        return self.tokenizer.token_id(END)

    def read_image(self, source: str | Path | bytes | Image.Image) -> ImagePatches:
        """An image's patches. Raises `UserError` if it cannot be read, or the model has no vision part."""
        if self.config.model.vision is None:
            raise UserError("the model has no vision part; ask without images")
        return image_patches(load_image(source), self.config.images, self.config.model.vision)

    def prompt(self, history: Turns, question: str, images: Sequence[ImagePatches]) -> SampleFeatures:
        """All features of the conversation up to where the next answer starts.

        Args:
          history: earlier questions, with their `<image>`, and answers.
          images: of the whole conversation; the i-th `<image>` of all questions stands for the i-th one. If no
            question has one, they go in front of the first.

        Raises:
          UserError: another number of `<image>` than of images.
        """
        data, vision = self.config.data, self.config.model.vision
        grids = [image.grids for image in images]
        merge_size = vision.merge_size if vision else 2
        tokens = encode_prompt(self.tokenizer, data.template, data.system_message, history, question, grids, merge_size)
        numbers = dict.fromkeys(("text_source_ids", "text_sample_ids"), np.zeros(len(tokens["text_tokens"]), np.int32))
        return {**tokens, **numbers, **patch_features(images, self.config)}

    def answer(
        self,
        history: Turns,
        question: str,
        images: Sequence[ImagePatches],
        choose: Chooser,
        max_new_tokens: int,
        on_cut: Callable[[], None] = lambda: None,
    ) -> Iterator[str]:
        """Pieces of the answer as they become final; other arguments and errors as in `prompt` and `Engine.stream`.

        Args:
          on_cut: is called at the end of an answer that `max_new_tokens` ended.
        """
        prompt = self.prompt(history, question, images)
        rows = self.engine.stream([prompt], choose, max_new_tokens, self.stop_id)
        return stream_text(self.tokenizer, self._until_end(rows, on_cut))

    def _until_end(self, rows: Iterable[Sequence[int | None]], on_cut: Callable[[], None]) -> Iterator[int]:
        token: int | None = None
        for (token,) in rows:
            if token is not None:
                yield token
        if token != self.stop_id:
            on_cut()


def check_asked(question: object, images: object, sampler: object, max_new_tokens: object) -> None:
    """Raises a `TypeError` that says what to give, or a `UserError`, for what `Pretrained.ask` cannot take."""
    if not isinstance(question, str):
        raise TypeError(f"question: give a str, not {type(question).__name__}")
    if isinstance(images, str | bytes | Path | Image.Image) or not isinstance(images, Iterable):
        raise TypeError(f'images: give a list, such as ["cat.png"], not {type(images).__name__}')
    if isinstance(images, np.ndarray):
        raise TypeError("images: give a list of images, not an array; PIL.Image.fromarray(array) makes an image of one")
    if not (sampler is None or callable(sampler)):
        raise TypeError(f"sampler: give a Sampler, such as Sampler(temperature=1.0), not {type(sampler).__name__}")
    if not isinstance(max_new_tokens, int | np.integer) or isinstance(max_new_tokens, bool):
        raise TypeError(f"max_new_tokens: give a whole number, not {max_new_tokens!r}")
    if not question.strip() and not images:
        raise UserError("the question is empty; give a text or an image")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the question is no UTF-8 at character {error.start + 1}") from error


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Pieces that join to `response_text` of all tokens, each as soon as later tokens cannot change it.

    Incomplete UTF-8, blanks that punctuation may draw in, and the start of what may be a marker are held back.

    Example: tokens of "a", "b", " ", ".", first byte of "é", second byte -> "ab", ".", "é"
    """
    ids: list[int] = []
    shown, text = 0, ""
    for token in tokens:
        ids.append(token)
        text = response_text(tokenizer, ids)
        if "<" in tokenizer.decode(ids, skip_special=True)[-UNSETTLED:]:
            continue
        tail = max(0, len(text) - UNSETTLED)
        unsettled = re.search(r"[\s\ufffd]", text[tail:])
        settled = tail + unsettled.start() if unsettled else len(text)
        if settled > shown:
            yield text[shown:settled]
            shown = settled
    if len(text) > shown:
        yield text[shown:]
