"""CIDEr-D and its words against pycocoevalcap 1.2 (tests/golden/make_captions.py), and by hand."""

import json
import math

import pytest
from golden_cases import FOLDER
from hypothesis import given
from hypothesis import strategies as st

from navil_jax.evaluate.benchmarks.cider import cider, words

GOLDEN = json.loads((FOLDER / "captions" / "golden.json").read_text())


def test_words_are_those_of_the_java_tokenizer():
    found = {caption: " ".join(words(caption)) for caption in GOLDEN["captions"]}
    assert found == dict(zip(GOLDEN["captions"], GOLDEN["words"], strict=True))


def test_scores_are_those_of_pycocoevalcap():
    scores = cider(GOLDEN["captions"], GOLDEN["references"])
    assert scores == pytest.approx(GOLDEN["scores"], rel=1e-9, abs=1e-12)
    assert sum(scores) / len(scores) == pytest.approx(GOLDEN["total"], rel=1e-9)
    assert max(scores) > 5 > min(scores)


def test_a_score_worked_out_by_hand():
    """Two images: every n-gram of a reference weighs log 2, the one that both have nothing."""
    first, second = cider(["red cat", "dog"], [["red cat"], ["a red dog runs"]])
    weigh = math.log(2)
    assert first == pytest.approx(10 * (1 + 1) / 4)  # cosine 1 of "cat" and of "red cat"; "red" weighs nothing
    cosine = weigh * weigh / (weigh * math.sqrt(3 * weigh**2))  # "dog" of "a dog runs"
    assert second == pytest.approx(10 * cosine / 4 * math.exp(-(3**2) / 72))  # 0 pairs of words and 3


TEXTS = st.lists(st.sampled_from(["a", "red", "cat", "dog", "runs", "on", "hill"]), min_size=1, max_size=9).map(
    " ".join
)


@given(st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=1, max_size=6))
def test_scores_lie_between_nothing_and_ten_and_a_reference_itself_is_best(pairs):
    captions, references = [caption for caption, _ in pairs], [of for _, of in pairs]
    scores = cider(captions, references)
    assert all(0 <= score <= 10 + 1e-9 for score in scores)
    alone = [of[:1] for of in references]
    best = cider([of[0] for of in alone], alone)
    assert all(b >= s - 1e-9 for b, s in zip(best, cider(captions, alone), strict=True))
