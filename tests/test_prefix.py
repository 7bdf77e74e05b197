"""A prompt that begins with what a slot holds is read from there on, and its answer is that of a fresh prefill."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_assistant import CONFIG, TOKENIZER, random_params
from PIL import Image

from navil_jax.config import MeshConfig
from navil_jax.generate import prefix
from navil_jax.generate.assistant import Answer, Assistant, Question
from navil_jax.generate.engine import Engine
from navil_jax.generate.programs import Programs, length_of
from navil_jax.generate.sampling import Sampler
from navil_jax.sharding import make_mesh

MODEL = dataclasses.replace(CONFIG.model, compute_dtype="float32")


@functools.cache
def asking(reuse: bool, slots: int = 2, devices: int = 1) -> Assistant:
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    return Assistant(CONFIG, TOKENIZER, Engine(MODEL, random_params(), mesh, 1500, slots, reuse))


def picture(seed: int, width: int = 96, height: int = 64) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@functools.cache
def patches(seed: int) -> Any:
    return asking(False).read_image(picture(seed))


class Talk:
    """A conversation, asked in two ways."""

    def __init__(self, *images: int):
        self.images = [patches(image) for image in images]
        self.turns: list[tuple[str, str]] = []
        self.cached: list[int] = []

    def question(self, text: str, sampler: Sampler = Sampler(), count: int = 20) -> Question:  # noqa: B008
        if not self.turns:
            text = "<image>\n" * len(self.images) + text
        self.asked = text
        return Question(asking(False).prompt(self.turns, text, self.images), sampler, count)

    def told(self, answer: Answer, question: Question) -> None:
        """Compares an answer with that of a fresh prefill, and goes on with it."""
        [(_, fresh)] = asking(False, 1).answers([(0, question)])
        assert [token.id for token in answer.tokens] == [token.id for token in fresh.tokens]
        assert answer.text == fresh.text
        self.cached.append(answer.request.cached)
        self.turns.append((self.asked, answer.text))

    def ask(self, assistant: Assistant, text: str, **more: Any) -> None:
        question = self.question(text, **more)
        [(_, answer)] = assistant.answers([(0, question)])
        self.told(answer, question)


def fresh_prefills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts tokens of patches that prefills read from now on."""
    read, seen = Programs.read, list[int]()

    def counted(self: Programs, batch: Any) -> Any:
        seen.append(int((np.asarray(batch.patch_blocks) > 0).sum()))
        return read(self, batch)

    monkeypatch.setattr(Programs, "read", counted)
    return seen


def test_later_turns_read_neither_the_image_nor_the_history_again(monkeypatch):
    own, talk = asking(True, 1), Talk(1)
    questions = [talk.question("What is this?")]
    [(_, first)] = own.answers([(0, questions[0])])
    talk.told(first, questions[0])
    asking(False, 1)
    for text in ("And that?", "Why? " * 60, "So?"):
        question = talk.question(text)
        with monkeypatch.context() as patched:
            seen = fresh_prefills(patched)
            [(_, answer)] = own.answers([(0, question)])
        assert seen == []
        talk.told(answer, question)
    assert talk.cached[0] == 0
    assert np.all(np.diff(talk.cached) > 0)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_conversations_in_turns_with_fewer_slots_than_they_are(devices: int):
    own = asking(True, 2, devices)
    talks = [Talk(1), Talk(2), Talk(), Talk(1), Talk(1, 3)]
    drawn = Sampler(temperature=2.0, seed=5, repetition_penalty=1.4)
    for turn in range(3):
        questions = [talk.question(f"Question {turn}?", drawn if turn == 1 else Sampler()) for talk in talks]
        for number, answer in own.answers(enumerate(questions)):
            talks[number].told(answer, questions[number])


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["Why?", "x y " * 50, "é\n"])), max_size=9))
def test_any_order_of_turns_of_several_conversations(steps: list[tuple[int, str]]):
    talks = [Talk(1), Talk(1), Talk(2), Talk()]
    for number, text in steps:
        if sum(len(question) for question, _ in talks[number].turns) < 400:
            talks[number].ask(asking(True), text)


def test_another_image_with_the_same_tokens_is_read():
    own = asking(True)
    Talk(11).ask(own, "What is this?")
    other = Talk(12)
    other.ask(own, "What is this?")
    assert other.cached == [0]


def test_a_new_image_in_a_later_turn_is_read_with_all_before_it():
    own, talk = asking(True), Talk(1)
    talk.ask(own, "What is this?")
    talk.images.append(patches(4))
    talk.ask(own, "And <image> this?")
    talk.ask(own, "So?")
    assert talk.cached[1] == 0
    assert talk.cached[2] > 0


def test_answers_of_one_prompt_share_it_while_they_run():
    own, talk = asking(True, 2), Talk(21)
    question = talk.question("What is this?")
    answers = [answer for _, answer in own.answers([(0, question), (1, question)])]
    for answer in answers:
        talk.turns = []
        talk.told(answer, question)
    assert talk.cached == [0, length_of(question.prompt) - 1]


def test_an_answer_that_was_cancelled_leaves_what_was_read():
    own, talk = asking(True, 1), Talk(31)
    question = talk.question("What is this?", count=50)
    answer = own.start(question)
    for _ in range(5):
        own.engine.step()
    answer.cancel()
    own.engine.step()
    talk.ask(own, "What is this?")
    assert talk.cached[0] == length_of(question.prompt) - 1


def test_produced_special_tokens_are_not_those_of_a_prompt():
    content = np.array([[5, 0], [6, 0]])
    special = MODEL.special_token_ids[0]
    longer = prefix.with_produced(content, [7, special], MODEL)
    assert prefix.shared(longer, np.array([[5, 0], [6, 0], [7, 0], [special, 0]])) == 3


def test_a_text_that_is_turned_as_a_longer_one_is_read_anew():
    decoder = dataclasses.replace(MODEL.decoder, rope_scaling="dynamic", rope_factor=2.0, max_positions=64)
    config = dataclasses.replace(MODEL, decoder=decoder)
    for words, used in ((20, True), (90, False)):
        prompt = Talk().question("x " * words).prompt
        content = prefix.content_of(prompt, config)
        assert (prefix.readable(prompt, content, content, config) > 0) == used, (words, len(content))
