"""Near duplicates: what is measured of texts and images, buckets, and which sample of a group is kept."""

import functools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_cleaning import needs_packages
from PIL import Image

from benchmarks.near_duplicates import CHANGES, Made, caption, clouds, columns_of, left_out, make, other_words
from navil_jax.data.cleaning import near
from navil_jax.data.cleaning.image import colours, image_measures, text_area
from navil_jax.data.cleaning.measure import NOTE, Measure
from navil_jax.data.cleaning.settings import Settings
from navil_jax.data.cleaning.text import SCRIPTS, script_shares, shingles, signature, text_measures, words_of
from navil_jax.data.sample import Sample

PAIRS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60)


def packed(pairs: list[tuple[int, int]]) -> np.ndarray:
    array = np.array([sorted(pair) for pair in pairs if pair[0] != pair[1]], np.int64).reshape(-1, 2)
    return np.unique(near.packed_pairs(array))


@given(PAIRS)
def test_a_sample_is_only_left_out_for_a_lower_one_that_is_kept_and_near(pairs: list[tuple[int, int]]) -> None:
    known = {(min(pair), max(pair)) for pair in pairs}

    def is_near(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.array([(x, y) in known for x, y in zip(a.tolist(), b.tolist(), strict=True)])

    found = near.resolve(packed(pairs), is_near)
    gone = set(found[:, 0].tolist())
    for sample, kept in found.tolist():
        assert kept < sample
        assert kept not in gone
        assert (kept, sample) in known
    for first, second in known:
        assert first == second or first in gone or second in gone


def test_a_chain_of_near_samples_does_not_end_in_one_that_is_far() -> None:
    chain = packed([(0, 1), (1, 2), (2, 3)])
    found = near.resolve(chain, lambda a, b: b - a < 2)
    assert found.tolist() == [[1, 0], [3, 2]]


@functools.cache
def measured(kind: str = "clouds", count: int = 20) -> tuple[near.Columns, tuple[tuple[str, int], ...]]:
    made = make(kind, count)
    return columns_of(Measure(made, kind)(range(len(made))).table), made.truth


@needs_packages
def test_copies_are_found_and_others_are_not() -> None:
    columns, truth = measured()
    pairs = left_out(columns, Settings())
    assert all(truth[sample][1] == truth[kept][1] for sample, kept in pairs.tolist())
    found = {truth[sample] for sample, _ in pairs.tolist()}
    copies = {(name, number) for name, number in truth if name in CHANGES}
    assert len(found & copies) >= 0.97 * len(copies)
    assert ("original", 3) not in found


@needs_packages
def test_without_texts_another_caption_makes_no_difference() -> None:
    columns, truth = measured()
    name = "same image, another caption"
    by_images = {truth[sample][0] for sample, _ in left_out(columns, Settings(pair="image")).tolist()}
    by_both = [truth[sample][0] for sample, _ in left_out(columns, Settings()).tolist()]
    assert name in by_images
    assert by_both.count(name) <= 3  # captions of few words are near by chance


@needs_packages
def test_without_images_the_same_words_are_enough() -> None:
    columns, truth = measured()
    pairs = left_out(columns, Settings(pair="caption"))
    assert "same caption, another image" in {truth[sample][0] for sample, _ in pairs.tolist()}
    assert all(near.similarity(columns, pairs[:, 0], pairs[:, 1]) >= 0.8)


@needs_packages
def test_another_question_about_an_image_is_no_copy() -> None:
    talks = [
        ("Is the red circle above the blue square?", "yes"),
        ("Is the blue circle above the red square?", "yes"),
        ("Is the red circle below the blue square?", "yes"),
        ("Is the red circle above the blue square?", "no"),
        ("Is the red circle above the blue square", "Yes."),
    ]
    image = clouds(0)
    for images in ((image,), ()):
        samples = Made(tuple(Sample(str(number), images, (talk,)) for number, talk in enumerate(talks)), ())
        pairs = left_out(columns_of(Measure(samples, "talks")(range(len(talks))).table), Settings())
        assert pairs.tolist() == [[4, 0]]


@pytest.mark.parametrize("kind", ["both", "image", "caption"])
def test_partitions_change_nothing(kind: str) -> None:
    columns, truth = measured()
    rows = np.arange(len(truth))
    for table in range(4):
        whole = near.find_near(columns, rows, Settings(), kind, table)
        parts = [near.find_near(columns, rows, Settings(), kind, table, number, 3) for number in range(3)]
        joined = np.concatenate([part.pairs for part in parts])
        assert np.array_equal(np.unique(near.packed_pairs(joined)), np.unique(near.packed_pairs(whole.pairs)))


def test_a_crowded_bucket_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    notes = np.zeros(40, NOTE)
    notes["images"], notes["words"] = 1, 5
    notes["hashes"] = np.random.default_rng(0).integers(0, 256, notes["hashes"].shape)
    monkeypatch.setattr(near, "LEADERS", 10)
    found = near.find_near(columns_of(notes), np.arange(40), Settings(), "both", 0)
    assert found.uncompared == 30
    assert not len(found.pairs)


@needs_packages
def test_references_are_found_among_samples_and_never_left_out() -> None:
    columns, truth = measured()
    originals = np.array([row for row, (name, _) in enumerate(truth) if name == "original"])
    rows = np.setdiff1d(np.arange(len(truth)), originals)
    pairs = np.concatenate(
        [near.find_matches(columns, rows, originals, Settings(), table).pairs for table in range(near.TABLES)]
    )
    assert set(pairs[:, 0].tolist()) <= set(originals.tolist())
    assert set(pairs[:, 1].tolist()) <= set(rows.tolist())
    assert all(truth[first][1] == truth[second][1] for first, second in pairs.tolist())
    names = {truth[second][0] for second in pairs[:, 1].tolist()}
    assert {"resized to a half", "JPEG of quality 30", "other words"} <= names


@needs_packages
@given(st.text(max_size=300))
@settings(max_examples=200)
def test_measures_of_any_text_are_shares_and_counts(text: str) -> None:
    found = text_measures(text, words_of(text))
    for name in ("word_share", "repeated_share", "markup_share", "boilerplate_share"):
        assert 0 <= found[name] <= 1
    assert found["run"] <= found["characters"] == len(text)
    assert abs(int(found["scripts"].sum()) - 255 * any(map(str.isalpha, text))) <= len(SCRIPTS)
    for in_order in (False, True):
        assert signature(shingles(words_of(text), in_order)).shape == (64,)


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Ein Käfer, tausend Wörter", "latin"),
        ("一只猫坐在垫子上", "han"),
        ("ねこがすわる", "kana"),
        ("고양이", "hangul"),
    ],
)
def test_scripts_are_told_apart(text: str, script: str) -> None:
    assert script_shares(text)[list(SCRIPTS).index(script)] == 255


def test_words_of_chinese_are_characters() -> None:
    assert words_of("Two 猫, \uff12 Dogs!") == ["two", "猫", "2", "dogs"]
    assert len(words_of("一只猫坐在垫子上")) == 8


@needs_packages
@given(st.sets(st.sampled_from([f"w{number}" for number in range(40)]), min_size=8, max_size=20), st.integers(0, 8))
def test_the_similarity_is_about_the_share_of_common_words(words: set[str], removed: int) -> None:
    some = sorted(words)[removed:] + [f"new{number}" for number in range(removed)]
    caption_ = np.stack([signature(words), signature(some)])
    share = len(words & set(some)) / len(words | set(some))
    found = near.similarity({"caption": caption_}, np.array([0]), np.array([1]))[0]
    assert abs(found - share) < 0.3  # 5 standard deviations of 64 permutations
    assert removed or found == 1


def test_colours_tell_images_of_one_shape_apart() -> None:
    image = Image.new("RGB", (90, 90), "white")
    red, blue, grey = (image.copy() for _ in range(3))
    for one, colour in ((red, "red"), (blue, "blue"), (grey, "grey")):
        one.paste(colour, (30, 40, 50, 60))
    found = [colours(one).astype(int) for one in (red, blue, grey)]
    distances = [np.abs(found[a] - found[b]).sum() / 510 for a, b in ((0, 1), (0, 2), (1, 2))]
    assert min(distances) > 0.25
    assert all(one.sum() in range(253, 258) for one in found)


def test_pages_of_text_are_told_from_clouds() -> None:
    line = Image.new("L", (320, 320), 255)
    draw = random.Random(0)
    for top in range(8, 310, 20):
        for left in range(8, 310, 7):
            line.paste(0, (left, top, left + 2, top + draw.randint(6, 12)))
            line.paste(0, (left, top + draw.randint(0, 5), left + 5, top + 6))
    assert text_area(line) > 0.5
    assert max(text_area(clouds(seed).convert("L")) for seed in range(5)) < 0.05
    assert text_area(Image.new("L", (8, 400))) == 0


@needs_packages
@pytest.mark.parametrize("size", [(1, 1), (3, 600), (600, 3), (17, 16), (4000, 25)])
def test_images_of_any_size_are_measured(size: tuple[int, int]) -> None:
    found = image_measures(Image.new("RGB", size, "teal"))
    assert found["hash"].shape == (32,)
    assert found["deviation"] < 0.01
    assert 0 <= found["low"] < 2**63


def test_other_words_leave_half_of_them() -> None:
    draw = random.Random(0)
    texts = [caption(draw) for _ in range(50)]
    shares = [
        len(set(words_of(text)) & set(words_of(other_words(text)))) / len(set(words_of(text + other_words(text))))
        for text in texts
    ]
    assert 0.5 < np.mean(shares) < 0.9


@needs_packages
def test_two_colours_of_one_brightness_are_not_blank() -> None:
    image = Image.new("RGB", (64, 64), (200, 0, 0))
    image.paste((0, 102, 0), (20, 20, 40, 40))
    assert np.ptp(np.asarray(image.convert("L"))) <= 1
    assert image_measures(image)["deviation"] > 20
