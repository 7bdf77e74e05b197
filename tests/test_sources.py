"""Sources: truth of the generated scenes, splits, question kinds, baselines."""

import hashlib
import pickle
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from navil_jax.data.sample import SPLITS, Sample
from navil_jax.data.sources import SOURCES, open_source
from navil_jax.data.toy import easy_vqa, pages, scenes
from navil_jax.data.toy.baselines import commonest_answer, question_only
from navil_jax.data.toy.easy_vqa import EasyVqa, EasyVqaCaptions, question_kind
from navil_jax.data.toy.scenes import Scene, Scenes, plan, render
from navil_jax.errors import UserError

seeds = st.integers(0, 2**32)
splits = st.sampled_from(SPLITS)
many = settings(max_examples=150, deadline=None)


def nearest_colors(scene: Scene) -> np.ndarray:
    """The name of the palette colour nearest to each pixel, "" for the background. [height, width] str"""
    pixels = np.asarray(render(scene)).astype(int)
    palette = np.array([scene.background, *scenes.COLORS.values()])
    nearest = np.abs(pixels[:, :, None] - palette).sum(-1).argmin(-1)
    return np.array(["", *scenes.COLORS])[nearest]


def components(mask: np.ndarray) -> int:
    """Streams of a mask that hang together, by sides or corners of pixels."""
    return ndimage.label(mask, structure=np.ones((3, 3)))[1]


def make(seed: int, split: str, layout: str) -> Scene:
    return plan(random.Random(seed), split, layout)


def ask(scene: Scene, split: str = "test", seed: int = 0) -> dict[str, tuple[str, str]]:
    return scenes.questions(random.Random(seed), scene, split)


def words_of(sentence: str) -> list[str]:
    return sentence.rstrip(".?").replace('"', "").split()


def names_in(sentence: str, vocabulary: dict) -> list[str]:
    """The words of a vocabulary in the order of a sentence, plurals too."""
    singular = {word: word for word in vocabulary} | {f"{w}{'es' if w == 'cross' else 's'}": w for w in vocabulary}
    return [singular[word] for word in words_of(sentence) if word in singular]


@given(seeds, splits)
@many
def test_relation_is_where_the_pixels_are(seed, split):
    scene = make(seed, split, "pair")
    colors = nearest_colors(scene)
    question, answer = ask(scene, split)["relation"]
    (y1, x1), (y2, x2) = (np.argwhere(colors == color).mean(0) for color in names_in(question, scenes.COLORS))
    steps = {"left": x2 - x1, "right": x1 - x2, "above": y2 - y1, "below": y1 - y2}
    assert max(steps, key=steps.get) == answer
    first, second = names_in(scenes.caption(scene), scenes.COLORS)
    (y1, x1), (y2, x2) = (np.argwhere(colors == color).mean(0) for color in (first, second))
    assert x1 < x2 if "left of" in scenes.caption(scene) else y1 < y2
    assert "left of" in scenes.caption(scene) or "above" in scenes.caption(scene)


@given(seeds, splits)
@many
def test_count_is_the_number_of_connected_components(seed, split):
    scene = make(seed, split, "group")
    colors = nearest_colors(scene)
    found = {color: components(colors == color) for color in {s.color for s in scene.shapes}}
    turns = ask(scene, split)
    (asked,) = names_in(turns["count"][0], scenes.SHAPES)
    color = next(s.color for s in scene.shapes if s.name == asked)
    assert turns["count"][1] == str(found[color])
    number = {"a": 1, "an": 1} | {word: i + 1 for i, word in enumerate(scenes.COUNTS)}
    told = [part.split()[:2] for part in scenes.caption(scene).lower().rstrip(".").split(" and ")]
    assert {color: number[count] for count, color in told} == found
    assert components(colors != "") == sum(found.values()), "two shapes touch"


@given(seeds, splits, st.sampled_from(["pair", "group"]))
@many
def test_color_and_shape_are_those_of_the_pixels(seed, split, layout):
    scene = make(seed, split, layout)
    colors = nearest_colors(scene)
    for shape in scene.shapes:
        assert colors[round(shape.y), round(shape.x)] == shape.color
    rim = (*colors[0], *colors[-1], *colors[:, 0], *colors[:, -1])
    assert not any(rim), "a shape is cut off"
    turns = ask(scene, split, seed)
    look = {s.name: s.color for s in scene.shapes}
    (named,) = names_in(turns["color"][0], scenes.SHAPES)
    assert turns["color"][1] == look[named]
    (named,) = names_in(turns["shape"][0], scenes.COLORS)
    assert look[turns["shape"][1]] == named


@given(seeds)
@many
def test_shapes_fill_the_part_of_their_circle_that_geometry_says(seed):
    scene = make(seed, "test", "pair")
    star = 5 * 0.4 * np.sin(np.pi / 5)
    arm = 0.33
    cross = 8 * arm * 0.94 - 4 * arm**2
    area = {"circle": np.pi, "square": 4 * 0.71**2, "triangle": 3 * 3**0.5 / 4, "diamond": 1.1, "star": star}
    area["cross"] = cross
    for shape in scene.shapes:
        drawn = np.count_nonzero(nearest_colors(scene) == shape.color)
        wanted = area[shape.name] * shape.radius**2
        assert drawn == pytest.approx(wanted, rel=0.25)  # outlines count on the rim's pixels
        assert shape.radius >= scenes.MIN_RADIUS


@given(seeds, splits, st.integers(0, 50))
@many
def test_presence_is_true(seed, split, other_seed):
    scene = make(seed, split, "pair")
    question, answer = ask(scene, split, other_seed)["presence"]
    (color,), (name,) = names_in(question, scenes.COLORS), names_in(question, scenes.SHAPES)
    assert answer == ("yes" if (name, color) in {(s.name, s.color) for s in scene.shapes} else "no")
    assert question.startswith("Is there an " if color == "orange" else "Is there a ")


@given(seeds, splits, st.sampled_from(["word", "number"]))
@many
def test_text_is_inside_in_its_color_and_told(seed, split, layout):
    scene = make(seed, split, layout)
    text = scene.text
    pixels = np.asarray(render(scene)).astype(int)
    ink = np.argwhere((pixels != scene.background).any(-1))
    (top, left), (bottom, right) = ink.min(0), ink.max(0)
    assert min(top, left) >= 1
    assert bottom < scene.size[1] - 1
    assert right < scene.size[0] - 1
    contrast = np.abs(pixels - scene.background).max(-1)
    assert contrast.max() > 100
    full = np.unravel_index(contrast.argmax(), contrast.shape)  # anti-aliased rims mix with the background
    assert nearest_colors(scene)[full] == text.color
    turns = ask(scene, split)
    assert turns[layout][1] == text.text
    assert turns["color"][1] == text.color
    assert scenes.caption(scene) == f'The {layout} "{text.text}" in {text.color}.'


def test_all_fonts_write_every_letter_and_digit_differently():
    for font in scenes.FONTS:
        glyphs = {bytes(scenes.load_font(font).getmask(c)) for c in "abcdefghijklmnopqrstuvwxyz0123456789"}
        assert len(glyphs) == 36, font
        assert -scenes.load_font(font).getbbox("d", anchor="ls")[1] == pytest.approx(scenes.TEXT_HEIGHT, abs=1)


def test_scenes_are_a_pure_function_and_pickle():
    source = Scenes("train")
    copy = pickle.loads(pickle.dumps(source))
    for index in (7, 0, 49_999, 7):
        one, two = source[index], copy[index]
        assert (one.key, one.turns, one.kind) == (two.key, two.turns, two.kind)
        assert one.images[0].tobytes() == two.images[0].tobytes()
    assert Scenes("train", seed=1)[7].images[0].tobytes() != source[7].images[0].tobytes()
    for index in (-1, 50_000):
        with pytest.raises(IndexError):
            source[index]


def test_scenes_splits_share_nothing_that_is_held_out():
    train, test = ([Scenes(split).scene(i)[0] for i in range(1400)] for split in SPLITS)
    hashes = [{hashlib.sha256(render(s).tobytes() + bytes(s.size)).digest() for s in part} for part in (train, test)]
    assert not hashes[0] & hashes[1]
    assert len(hashes[1]) == 1400
    assert not {s.size for s in train} & {s.size for s in test}
    looks = [{(shape.name, shape.color) for s in part for shape in s.shapes} for part in (train, test)]
    assert looks[1] - looks[0] == scenes.HELD_OUT
    texts = [{s.text for s in part if s.text} for part in (train, test)]
    assert all(t.color != scenes.held_out_color(t.text) for t in texts[0])
    assert any(t.color == scenes.held_out_color(t.text) for t in texts[1])


def test_training_questions_never_name_a_held_out_look():
    for index in range(2000):
        for question, _ in Scenes("train", caption=False, questions=9).scene(index)[1].values():
            if question.startswith("Is there"):
                assert (
                    names_in(question, scenes.SHAPES)[0],
                    names_in(question, scenes.COLORS)[0],
                ) not in scenes.HELD_OUT


def test_scenes_kinds_are_equally_frequent_and_answers_balanced():
    asked: dict[str, Counter] = {}
    for index in range(len(Scenes("test", length=4000))):
        ((kind, (_, answer)),) = Scenes("test", length=4000).scene(index)[1].items()
        asked.setdefault(kind, Counter())[answer] += 1
    assert tuple(asked) == scenes.KINDS
    assert {counts.total() for counts in asked.values()} == {500}
    limits = {"caption": 0.05, "color": 0.2, "shape": 0.25, "count": 0.28, "relation": 0.32, "presence": 0.56}
    for kind, counts in asked.items():
        assert max(counts.values()) / 500 < limits.get(kind, 0.06), kind


def test_scenes_turns_follow_the_arguments():
    assert {len(Scenes("train", questions=1)[i].turns) for i in range(20)} == {2}
    assert all(Scenes("train", questions=0)[i].kind == "caption" for i in range(20))
    assert all(Scenes("test", questions=0)[i].kind == "caption" for i in range(20))
    assert "caption" not in {Scenes("test", caption=False)[i].kind for i in range(20)}
    places = {[q for q, _ in Scenes("train")[i].turns].index(scenes.CAPTION_PROMPT) for i in range(50)}
    assert places == {0, 1, 2}
    with pytest.raises(ValueError, match="neither"):
        Scenes("train", caption=False, questions=0)


def test_scenes_vary_in_size_and_aspect():
    sizes = [Scenes("train")[i].images[0].size for i in range(500)]
    assert (min(min(s) for s in sizes), max(max(s) for s in sizes)) == (64, 160)
    aspects = [width / height for width, height in sizes]
    assert min(aspects) < 0.45 < 2.2 < max(aspects)


def test_scenes_texts_show_every_answer():
    texts = " ".join(Scenes("train").texts()).replace('"', " ").replace(".", " ").split()
    assert {*scenes.WORDS, *scenes.NUMBERS, *scenes.COLORS, *scenes.SHAPES, *scenes.RELATIONS} <= set(texts)


def test_easy_vqa_is_the_whole_package():
    train, test = EasyVqa("train", turns=1), EasyVqa("test")
    assert (len(train), len(test)) == (38_575, 9_673)
    assert len({image for image, _ in train.conversations()}) == 4000
    assert len({test[i].images[0] for i in range(len(test))}) == 1000
    asked = [
        Counter((image, *t) for image, turns in s.conversations() for t in turns) for s in (train, EasyVqa("train", 4))
    ]
    assert asked[0] == asked[1]
    with Image.open(test[0].images[0]) as opened:
        assert opened.size == (64, 64)


def test_easy_vqa_answers_are_those_of_the_file():
    from easy_vqa import get_test_image_paths, get_test_questions

    paths = get_test_image_paths()
    expected = {(Path(paths[image]), q, a) for q, a, image in zip(*get_test_questions(), strict=True)}
    assert {(s.images[0], *s.turns[0]) for s in EasyVqa("test")} == expected


def test_easy_vqa_kinds():
    answers: dict[str, set[str]] = {}
    for split in SPLITS:
        for sample in EasyVqa(split, turns=1):
            answers.setdefault(sample.kind, set()).add(sample.turns[0][1])
    colors = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}
    shapes = {"circle", "rectangle", "triangle"}
    yes_no = {kind: {"yes", "no"} for kind in ("is color", "is shape", "not color", "not shape")}
    assert answers == {"color": colors, "shape": shapes} | yes_no
    assert set(answers) == set(easy_vqa.KINDS)
    assert question_kind("what is the color of the shape?") == "color"
    assert question_kind("is there not a red shape in the image?") == "not color"
    assert question_kind("does the image contain a circle?") == "is shape"
    with pytest.raises(ValueError, match="not an easy-VQA question"):
        question_kind("who is there?")


def test_easy_vqa_captions_say_what_the_answers_say():
    for split in SPLITS:
        answers: dict = {}
        for image, ((_, answer),) in EasyVqa(split, turns=1).conversations():
            answers.setdefault(image, set()).add(answer)
        captions = easy_vqa.captions(split)
        assert len(captions) > 500
        for image, caption in captions:
            _, color, shape = caption.rstrip(".").split()
            assert {color, shape} <= answers[image]


def test_easy_vqa_shows_training_images_in_eight_views():
    captions = EasyVqaCaptions("train")
    images = len(captions) // 8
    views = [captions[7 + view * images] for view in range(8)]
    assert len({view.turns for view in views}) == 1
    with Image.open(views[0].images[0]) as opened:
        image = np.asarray(opened.convert("RGB"))
    turned = [np.rot90(flipped, quarter) for flipped in (image, image[:, ::-1]) for quarter in range(4)]
    assert {np.asarray(view.images[0]).tobytes() for view in views[1:]} == {x.tobytes() for x in turned[1:]}
    assert isinstance(EasyVqa("train")[8].images[0], Path)
    assert isinstance(EasyVqa("train")[9].images[0], Image.Image)
    assert all(isinstance(sample.images[0], Path) for sample in EasyVqa("test"))


def test_easy_vqa_turns_order_and_kind():
    source = pickle.loads(pickle.dumps(EasyVqa("train")))
    assert [source[i] for i in range(50)] == [EasyVqa("train")[i] for i in range(50)]
    assert max(len(s.turns) for s in source) == 2
    assert all(len(s.turns) == 1 for s in EasyVqa("test", turns=4))
    mixed = next(s for s in source if len({question_kind(q) for q, _ in s.turns}) > 1)
    assert mixed.kind == ""
    with pytest.raises(IndexError):
        source[len(source)]


def test_a_page_shows_its_text_letter_by_letter():
    width, height = pages.CELL
    looks: dict[str, set[bytes]] = {}
    for text in pages.page_texts("train")[:200]:
        image = np.asarray(pages.render(text).convert("L"))
        lines = text.split("\n")
        assert image.shape[0] == pages.LINES * height and image.shape[1] % (2 * width) == 0
        for row, line in enumerate(lines):
            cells = image[row * height : (row + 1) * height].reshape(height, -1, width)
            for column in range(cells.shape[1]):
                letter = line[column] if column < len(line) else " "
                looks.setdefault(letter, set()).add(cells[:, column].tobytes())
    assert all(len(seen) == 1 for seen in looks.values())
    assert len({look for seen in looks.values() for look in seen}) == len(looks) > 40


def test_held_out_pages_are_of_other_texts():
    train, test = pages.page_texts("train"), pages.page_texts("test")
    assert len(train) > 10_000 and len(test) == pages.HELD_OUT_PAGES
    assert not set(train) & set(test)
    sample = open_source("pages", "test")[7]
    assert sample.turns == ((pages.PROMPT, test[7].replace("\n", " ")),)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", list(SOURCES))
def test_every_source_opens_and_samples(name, split):
    source = open_source(name, split)
    sample = pickle.loads(pickle.dumps(source))[len(source) - 1]
    assert sample.key.startswith(name.removesuffix("_captions"))
    assert sample.key.endswith(f"/{split}/{len(source) - 1}")
    assert sample.images
    assert split == "train" or (len(sample.turns) == 1 and sample.kind)
    assert all(isinstance(text, str) and text for text in source.texts())


def test_unknown_names_are_the_users_mistake():
    with pytest.raises(UserError, match=r"no source named 'easyvqa'; nearest is 'easy_vqa'"):
        open_source("easyvqa", "train")
    with pytest.raises(UserError, match=r"no split named 'val'; use one of \['train', 'test'\]"):
        open_source("scenes", "val")


def test_a_missing_package_is_named(monkeypatch):
    def missing(split: str) -> None:
        raise ModuleNotFoundError("No module named 'images'", name="images")

    monkeypatch.setitem(SOURCES, "images", missing)
    with pytest.raises(UserError, match="package 'images' is missing"):
        open_source("images", "train")


def test_baselines_by_hand():
    def sample(kind: str, *turns: tuple[str, str]) -> Sample:
        return Sample("", (), turns, kind)

    train = [sample("", ("how many?", "2"), ("red?", "no")), sample("", ("red?", "yes"), ("red?", "yes"))]
    train += [sample("", ("big?", "yes"), ("big?", "no"))]  # a tie: "no" stands first in the alphabet
    test = [sample("count", ("how many?", "2")), sample("count", ("how many?", "3")), sample("count", ("what?", "3"))]
    test += [sample("yes/no", ("red?", "yes"), ("red?", "no")), sample("yes/no", ("big?", "no"), ("big?", "no"))]
    assert commonest_answer(test) == {"count": 2 / 3, "yes/no": 3 / 4}
    assert question_only(train, test) == {"count": 1 / 3, "yes/no": 3 / 4}


def test_baselines_of_easy_vqa():
    """The question alone gives yes/no away (most are the majority), but neither colour nor shape."""
    guessed = question_only(EasyVqa("train"), EasyVqa("test"))
    assert guessed["color"] < 0.2
    assert guessed["shape"] < 0.4
    assert guessed["is color"] > 0.8
    assert commonest_answer(EasyVqa("test"))["is color"] == pytest.approx(guessed["is color"])
