"""Assistant: a model that answers questions about images, with prompts, tokens and streamed text."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from navil_jax.batch import SampleFeatures
from navil_jax.config import Config
from navil_jax.data.features import patch_features
from navil_jax.data.images import ImagePatches, image_patches, load_image
from navil_jax.data.prompt import END, Turns, encode_prompt
from navil_jax.data.tokenizers import Tokenizer
from navil_jax.errors import UserError
from navil_jax.generate.engine import Engine, Reason, Request, Token
from navil_jax.generate.programs import length_of
from navil_jax.generate.sampling import Sampler
from navil_jax.generate.stream import TextStream

Key = TypeVar("Key")


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked: a prompt and how it shall be answered.

    Attributes:
      stops: texts that end the answer, which goes up to the first of them.
      logprobs: as in `engine.Request`.
    """

    prompt: SampleFeatures
    sampler: Sampler = Sampler()
    max_new_tokens: int = 1024
    stops: tuple[str, ...] = ()
    logprobs: int | None = None


class Answer:
    """An answer while it is made, and when it is there.

    Attributes:
      text: up to now.
      tokens: all that were produced, the stop token too.
      reason: why it ended, as in `engine.Request`; "stop" also at a stop string; empty before.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        question: Question,
        stop_id: int,
        listen: Callable[[str, Token | None], None] = lambda piece, token: None,
    ):
        """Args: listen: gets every token with the text that it settles, and at the end None with the rest of it."""
        self.text, self.tokens = "", list[Token]()
        self.reason: Reason = ""
        self._stream, self._listen = TextStream(tokenizer, question.stops), listen
        self.request = Request(
            question.prompt,
            question.sampler,
            question.max_new_tokens,
            stop_id,
            question.logprobs,
            on_token=self._take,
            on_end=self._end,
        )

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, those of images among them."""
        return length_of(self.request.prompt)

    def cancel(self) -> None:
        """Ends it before the next step; may be called from any thread."""
        self.request.cancel()

    def _take(self, token: Token) -> None:
        if self.reason:
            return
        piece = self._stream.push(token.id)
        self.text += piece
        self.tokens.append(token)
        self._listen(piece, token)
        if self._stream.stopped:
            self.cancel()
            self._finish("stop", "")

    def _end(self) -> None:
        if not self.reason:
            rest = self._stream.end()
            self._finish("stop" if self._stream.stopped else self.request.reason, rest)

    def _finish(self, reason: Reason, rest: str) -> None:
        self.text += rest
        self.reason = reason
        self._listen(rest, None)


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

    def read_image(self, source: str | Path | bytes | Image.Image, name: str = "") -> ImagePatches:
        """An image's patches. Raises `UserError` (about `name`) if it cannot be read, or there is no vision part."""
        if self.config.model.vision is None:
            raise UserError("the model has no vision part; ask without images")
        return image_patches(load_image(source, name), self.config.images, self.config.model.vision)

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

    def with_system(self, message: str | None) -> "Assistant":
        """One that has another system message; None: that of the config."""
        if message is None:
            return self
        data = dataclasses.replace(self.config.data, system_message=message)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, data=data))

    def token_text(self, token: int) -> str:
        """A token alone, special ones by their name."""
        return self.tokenizer.decode([token], skip_special=False)

    def check(self, question: Question) -> None:
        """Raises `UserError` as `Engine.check`."""
        self.engine.check(Answer(self.tokenizer, question, self.stop_id).request)

    def start(
        self, question: Question, listen: Callable[[str, Token | None], None] = lambda piece, token: None
    ) -> Answer:
        """Submits a question; `Engine.step` makes the answer. Raises `UserError` as `Engine.check`."""
        answer = Answer(self.tokenizer, question, self.stop_id, listen)
        self.engine.submit(answer.request)
        return answer

    def answer(
        self,
        history: Turns,
        question: str,
        images: Sequence[ImagePatches],
        sampler: Sampler,
        max_new_tokens: int,
        on_cut: Callable[[], None] = lambda: None,
    ) -> Iterator[str]:
        """Pieces of the answer as they become final; other arguments and errors as in `prompt` and `Engine.check`.

        Args:
          on_cut: is called at the end of an answer that `max_new_tokens` ended.
        """
        asked = Question(self.prompt(history, question, images), sampler, max_new_tokens)
        return self._pieces(asked, on_cut)

    def _pieces(self, question: Question, on_cut: Callable[[], None]) -> Iterator[str]:
        pieces = collections.deque[str]()
        answer = self.start(question, lambda piece, token: pieces.append(piece))
        try:
            while not answer.reason:
                self.engine.step()
                while pieces:
                    if piece := pieces.popleft():
                        yield piece
        finally:
            answer.cancel()
        if answer.reason == "length":
            on_cut()

    def answers(self, questions: Iterable[tuple[Key, Question]]) -> Iterator[tuple[Key, Answer]]:
        """Answers in the order of their questions, which are taken as slots of the engine become free.

        Raises:
          UserError: as `Engine.check`, and what the iterable raises, after the answers before it.
        """
        waiting = collections.deque[tuple[Key, Answer]]()
        failed: UserError | None = None
        try:
            asked = iter(questions)
            while True:
                try:
                    key, question = next(asked)
                    waiting.append((key, self.start(question)))
                except StopIteration:
                    break
                except UserError as error:
                    failed = error
                    break
                while self.engine.waiting + self.engine.running > self.engine.slots:
                    self.engine.step()
                while waiting and waiting[0][1].reason:
                    yield waiting.popleft()
            while waiting:
                while not waiting[0][1].reason:
                    self.engine.step()
                yield waiting.popleft()
        finally:
            for _, answer in waiting:
                answer.cancel()
        if failed is not None:
            raise failed


def check_asked(question: object, images: object, sampler: object, max_new_tokens: object) -> None:
    """Raises a `TypeError` that says what to give, or a `UserError`, for what `Pretrained.ask` cannot take."""
    if not isinstance(question, str):
        raise TypeError(f"question: give a str, not {type(question).__name__}")
    if isinstance(images, str | bytes | Path | Image.Image) or not isinstance(images, Iterable):
        raise TypeError(f'images: give a list, such as ["cat.png"], not {type(images).__name__}')
    if isinstance(images, np.ndarray):
        raise TypeError("images: give a list of images, not an array; PIL.Image.fromarray(array) makes an image of one")
    if not (sampler is None or isinstance(sampler, Sampler)):
        raise TypeError(f"sampler: give a Sampler, such as Sampler(temperature=1.0), not {type(sampler).__name__}")
    if not isinstance(max_new_tokens, int | np.integer) or isinstance(max_new_tokens, bool):
        raise TypeError(f"max_new_tokens: give a whole number, not {max_new_tokens!r}")
    if not question.strip() and not images:
        raise UserError("the question is empty; give a text or an image")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the question is no UTF-8 at character {error.start + 1}") from error
