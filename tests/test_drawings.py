"""Plain drawings: what is said of them is true, and the other style shares nothing with training."""

import pickle
import random
import re

import numpy as np
import pytest

from navil_jax.data.sources import open_source
from navil_jax.data.toy import drawing as drawing_module
from navil_jax.data.toy import everyday
from navil_jax.data.toy.drawing import OTHER, SHADES, SHAPES, TRAIN, Drawing, Style, plan, render
from navil_jax.data.toy.drawings import Drawings

NUMBERS = {word: number for number, word in enumerate(everyday.NUMBERS)} | {"a": 1, "an": 1}


def made(count: int, style: Style = TRAIN) -> list[tuple[Drawing, list[everyday.Asked]]]:
    found = []
    for seed in range(count):
        rng = random.Random(seed)
        drawing = plan(rng, style)
        found.append((drawing, everyday.turns(rng, drawing)))
    return found


MADE = made(600)


def test_drawings_are_a_pure_function_and_pickle():
    source = pickle.loads(pickle.dumps(Drawings("train")))
    one, again = source[7], Drawings("train")[7]
    assert one.turns == again.turns and len(one.turns) == 2
    np.testing.assert_array_equal(np.asarray(one.images[0]), np.asarray(again.images[0]))
    assert open_source("drawings", "test")[3].kind


@pytest.mark.parametrize("style", [TRAIN, OTHER])
def test_things_stand_apart_inside_the_canvas_in_their_colour(style: Style):
    for drawing, _ in made(150, style):
        pixels = np.asarray(render(drawing))
        for number, thing in enumerate(drawing.things):
            assert thing.x - 0.8 * thing.wide > 0 and thing.x + 0.8 * thing.wide < drawing.size[0]
            assert thing.y - 0.8 * thing.high > 0 and thing.y + 0.8 * thing.high < drawing.size[1]
            assert tuple(pixels[round(thing.y), round(thing.x)]) == thing.rgb
            for other in drawing.things[:number]:
                assert drawing_module.apart(thing, other, 0)
        if drawing.writing:
            ink = np.argwhere((pixels != drawing.background).any(-1))
            assert len(ink) > 20 and ink.min() > 0 and (ink.max(0) < np.array(pixels.shape[:2]) - 1).all()


def test_counts_presence_and_colours_are_true():
    asked = 0
    for drawing, turns in MADE:
        things = drawing.things
        for kind, question, answer in turns:
            words = re.findall(r"[a-z]+", question.lower())
            names = [s for s in SHAPES if s in words or everyday.many(s) in words]
            colors = [c for c in SHADES if c in words]
            hits = [t for t in things if t.name in (names or SHAPES) and t.color in (colors or SHADES)]
            if kind == "count":
                assert answer == str(len(hits)), question
            elif kind == "presence" and "more" not in words and "two" not in words:
                assert answer == ("yes" if hits else "no"), question
            elif kind == "color" and things and not colors:
                assert {t.color for t in hits} == {answer}, question
            elif kind == "color" and things:
                named = [t for t in things if t.name in (names or SHAPES)]
                assert answer == ("yes" if named[0].color in colors else "no"), question
            elif kind == "shape" and not names and not answer.endswith("."):
                assert {t.name for t in hits} == {answer}, question
            else:
                continue
            asked += 1
    assert asked > 1000


def test_relations_are_true():
    found = set()
    for drawing, turns in MADE:
        for kind, question, answer in turns:
            match = re.fullmatch(r"Where is the ([\w ]+) (?:relative to|from) the ([\w ]+)\?", question)
            if kind == "relation" and match:
                one, other = (
                    next(t for t in drawing.things if name in (t.name, f"{t.color} {t.name}"))
                    for name in match.groups()
                )
                dx, dy = one.x - other.x, one.y - other.y
                truth = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
                assert answer == truth
                found.add(answer)
    assert found == {"left", "right", "above", "below"}


def test_captions_name_everything():
    for drawing, turns in MADE:
        for kind, _, answer in turns:
            if kind == "caption" and drawing.things:
                parts = re.findall(r"(\w+) (\w+) (\w+)", re.sub(r"left of|above|,| and", " ", answer.lower()))
                counted = sum(NUMBERS[number] for number, color, _ in parts if color in SHADES)
                assert counted == len(drawing.things), answer


def test_the_other_style_shares_nothing_with_training():
    assert not set(TRAIN.fonts) & set(OTHER.fonts)
    largest = max(max(drawing.size) for drawing, _ in MADE)
    assert all(max(drawing.size) > largest for drawing, _ in made(50, OTHER))
    for trained, other in SHADES.values():
        assert other not in trained


def test_answers_are_balanced_and_tokenizers_see_every_word():
    kinds = [answer for _, turns in MADE for kind, _, answer in turns if kind == "presence"]
    assert 0.4 < kinds.count("yes") / len(kinds) < 0.6
    texts = " ".join(Drawings("train").texts())
    assert all(word in texts for word in (*SHADES, *SHAPES, *drawing_module.WORDS))


@pytest.mark.parametrize(("about", "most"), [("shape", 1), ("look", 2)])
def test_what_is_learned_first_is_one_shape_and_what_it_is(about, most):
    source = Drawings("train", most, about)
    for index in range(100):
        drawing, asked = source.drawing(index)
        (thing,) = drawing.things
        assert 1 <= len(asked) <= most
        for _, question, answer in asked:
            words = set(re.findall(r"[a-z]+", answer.lower())) - {"a", "an"}
            assert words <= ({thing.name} if about == "shape" else {thing.name, thing.color}) and words, question
