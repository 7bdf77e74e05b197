"""Corners of the reference codes' rules, by made lines: one for each that the codes are known for."""

from typing import Any

import pytest

from navil_jax.evaluate.benchmarks.catalogue import BENCHMARKS
from navil_jax.evaluate.benchmarks.scoring import Score

INTERNVL, MAY_2025, HEAD, LMMS = "internvl", "vlmevalkit_2505", "vlmevalkit_head", "lmms_eval"


def scored(name: str, protocol: str, **line: Any) -> Score:
    """The score of a made line."""
    return BENCHMARKS[name].protocols[BENCHMARKS[name].protocol(protocol)].score({"id": "validation_Art_1", **line})


@pytest.mark.parametrize(
    ("name", "prediction", "answer", "scores"),
    [
        ("gqa", "Yes...", "yes", {INTERNVL: 1, MAY_2025: 0, LMMS: 1}),
        ("gqa", "two", "2", {INTERNVL: 0, MAY_2025: 0, LMMS: 0}),
        ("gqa", "the dog", "dog", {INTERNVL: 0, MAY_2025: 0, LMMS: 0}),
        ("chartqa", "95.2", "100", {INTERNVL: 0, MAY_2025: 0, HEAD: 1, LMMS: 1}),
        ("chartqa", "95.24", "100", {INTERNVL: 1, MAY_2025: 1, HEAD: 1, LMMS: 1}),
        ("chartqa", "105.26", "100", {INTERNVL: 1, MAY_2025: 1, HEAD: 0, LMMS: 0}),
        ("chartqa", "2021", "2014", {INTERNVL: 1, MAY_2025: 1, HEAD: 1, LMMS: 1}),
        ("chartqa", "0.0", "0", {INTERNVL: 0, MAY_2025: 0, HEAD: 0, LMMS: 0}),
        ("chartqa", "0", "0.0", {INTERNVL: 0, MAY_2025: 0, HEAD: 0, LMMS: 0}),
        ("chartqa", "50%", "0.5", {INTERNVL: 1, MAY_2025: 1, HEAD: 1, LMMS: 1}),
        ("chartqa", "50%", "50", {INTERNVL: 0, MAY_2025: 0, HEAD: 0, LMMS: 0}),
        ("chartqa", "5%%", "0.05", {INTERNVL: 1, MAY_2025: 1, HEAD: 1, LMMS: 1}),
        ("chartqa", "1_000", "1e3", {INTERNVL: 1, MAY_2025: 1, HEAD: 1, LMMS: 1}),
        ("chartqa", "\uff15", "5", {INTERNVL: 1, MAY_2025: 1, HEAD: 1, LMMS: 1}),
        ("chartqa", "1,000", "1000", {INTERNVL: 0, MAY_2025: 0, HEAD: 0, LMMS: 0}),
        ("chartqa", "inf", "inf", {INTERNVL: 0, MAY_2025: 0, HEAD: 0, LMMS: 0}),
        ("chartqa", "nan", "nan", {INTERNVL: 0, MAY_2025: 0, HEAD: 0, LMMS: 0}),
    ],
)
def test_short_answers(name: str, prediction: str, answer: str, scores: dict[str, int]) -> None:
    assert {one: scored(name, one, prediction=prediction, answer=answer) for one in scores} == scores


@pytest.mark.parametrize(
    ("prediction", "answers", "internvl", "lmms"),
    [
        ("abcd", ["abxy"], 0.5, 0.5),
        ("abc", ["axy"], 0, 0),
        ("", [""], 1, 1),
        ("ab" + " " * 6, ["xy"], 0.75, 0),
        ("stra\u00dfe", ["strasse"], 1 - 2 / 7, 1 - 2 / 7),
        ("a  b", ["A b"], 1, 1),
    ],
)
def test_edit_distances(prediction: str, answers: list[str], internvl: float, lmms: float) -> None:
    found = [scored("docvqa", one, prediction=prediction, answers=answers) for one in (INTERNVL, MAY_2025, LMMS)]
    assert found == pytest.approx([internvl, internvl, lmms])


@pytest.mark.parametrize(
    ("prediction", "internvl", "vlmevalkit", "lmms"),
    [
        ("Not sure", "no", "", "no"),
        ("know", "no", "", "no"),
        ("None", "no", "", "no"),
        ("The answer is yes", "", "yes", ""),
        ("\u4e0d\u662f", "no", "", ""),
        ("\u662f\u7684", "yes", "", ""),
        ("\u5426", "no", "", ""),
        ("True", "yes", "", ""),
        ("y", "", "", "yes"),
        ("N.", "", "", "no"),
        ("yes and no", "yes", "", "yes"),
        ("Y\nes", "yes", "", ""),
    ],
)
def test_yes_and_no(prediction: str, internvl: str, vlmevalkit: str, lmms: str) -> None:
    line = {"category": "OCR", "question_id": "1", "prediction": prediction}
    for protocol, meant in ((INTERNVL, internvl), (MAY_2025, vlmevalkit), (LMMS, lmms)):
        right = [answer for answer in ("Yes", "No") if scored("mme", protocol, answer=answer, **line)]
        assert right == ([meant.capitalize()] if meant else []), protocol


@pytest.mark.parametrize(
    ("prediction", "answer", "kind", "vlmevalkit", "lmms"),
    [
        ("anything", [""], "Doc-oriented VQA", 1, 1),
        ("210", ["1"], "Digit String Recognition", 1, 1),
        ("blue\nlake", ["BLUE LAKE"], "Regular Text Recognition", 1, 1),
        ("\uff21\uff22", ["ab"], "Regular Text Recognition", 0, 1),
        ("X + 1", ["x+1"], "Handwritten Mathematical Expression Recognition", 0, 0),
        ("x\n+ 1", ["x+1"], "Handwritten Mathematical Expression Recognition", 1, 1),
        ("x\t+1", ["x+1"], "Handwritten Mathematical Expression Recognition", 0, 0),
    ],
)
def test_text_inside_a_prediction(prediction: str, answer: list[str], kind: str, vlmevalkit: int, lmms: int) -> None:
    line = {"prediction": prediction, "answer": answer, "question_type": kind}
    assert [scored("ocrbench", one, **line) for one in (MAY_2025, LMMS)] == [vlmevalkit, lmms]


@pytest.mark.parametrize(
    ("prediction", "meant"),
    [
        ("Answer: C", "A"),
        ("Cannot tell", "C"),
        ("Both", "B"),
        ("(B)", "B"),
        ("(B) dog", "B"),
        ("a cat", "A"),
        ("a Cat", None),
        ("", None),
        ("(B", "error:IndexError"),
    ],
)
def test_internvls_letter_of_a_choice(prediction: str, meant: str | None) -> None:
    line = {"options": ["cat", "dog", "cow"], "prediction": prediction}
    found = {letter: scored("scienceqa", INTERNVL, answer=letter, **line) for letter in "ABC"}
    if meant and meant.startswith("error"):
        assert set(found.values()) == {meant}
    else:
        assert found == {letter: float(letter == meant) for letter in "ABC"}


@pytest.mark.parametrize(("prediction", "internvl", "lmms"), [("B.", 0, 1), ("b", 1, 1), ("B. sun", 0, 1), ("B", 1, 1)])
def test_ai2d_wants_the_letter_alone(prediction: str, internvl: int, lmms: int) -> None:
    line = {"options": ["moon", "sun"], "prediction": prediction, "answer": "B"}
    assert [scored("ai2d", one, **line) for one in (INTERNVL, LMMS)] == [internvl, lmms]


@pytest.mark.parametrize(
    ("kind", "prediction", "answer", "replies", "vlmevalkit", "official", "lmms"),
    [
        ("integer", "14.0", "14", ["14"], 1, 1, 1),
        ("integer", "14.0", "14", [], 0, 0, 0),
        ("integer", "0", "0", ["5"], 0, 1, 1),
        ("integer", "about 7", "7", ["", "7.9"], 0, 1, 1),
        ("float", "1.2", "1.20", [], 1, 0, 0),
        ("float", "1.204", "1.2", ["1.2"], 1, 1, 0),
        ("list", "[1, 2]", "[1, 2]", ["[1, 2]"], 0, 1, 1),
    ],
)
def test_numbers_of_mathvista(
    kind: str, prediction: str, answer: str, replies: list[str], vlmevalkit: int, official: int, lmms: int
) -> None:
    line = {"question_type": "free_form", "answer_type": kind, "precision": 2, "judge_replies": replies}
    protocols = (MAY_2025, "official", LMMS)
    found = [scored("mathvista", one, prediction=prediction, answer=answer, **line) for one in protocols]
    assert found == [vlmevalkit, official, lmms]


@pytest.mark.parametrize(("count", "share"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_shares_of_ten_people(count: int, share: float) -> None:
    answers = ["cat"] * count + [f"dog {number}" for number in range(10 - count)]
    found = [scored("textvqa", one, prediction="The Cat.", answers=answers) for one in (INTERNVL, MAY_2025, LMMS)]
    assert found == pytest.approx([share] * 3)


@pytest.mark.parametrize(
    ("prediction", "answer", "vlmevalkit", "official"),
    [
        ("240", "24", 1, 0),
        ("1,200", "1200", 0, 1),
        ("1.07", "['1.06', '1.07']", 0, 1),
        ("It is 24, so the result is 25", "24", 1, 0),
        ("x axis", "x", 1, 1),
        ("The answer is 3.50.", "3.5", 1, 1),
    ],
)
def test_open_answers_of_mmmu(prediction: str, answer: str, vlmevalkit: int, official: int) -> None:
    line = {"question_type": "open", "options": [], "prediction": prediction, "answer": answer}
    assert [scored("mmmu", one, **line) for one in (MAY_2025, "official", INTERNVL)] == [vlmevalkit, official, official]


def test_a_question_of_two_options_has_two_rows_and_one_wrong_row_loses_it() -> None:
    def row(index: int, answer: str, prediction: str) -> dict[str, Any]:
        return {"index": index, "A": "cat", "B": "dog", "C": None, "answer": answer, "prediction": prediction}

    first, second = row(3, "A", "A"), row(1000003, "B", "B")
    assert scored("mmbench", MAY_2025, passes=[second, first]) == 1
    assert scored("mmbench", MAY_2025, passes=[first, {**second, "prediction": "A"}]) == 0
    assert scored("mmbench", MAY_2025, passes=[first, {**second, "prediction": "no idea"}]) == 0
    assert scored("mmbench", MAY_2025, passes=[first, {**second, "prediction": "A dog"}]) == 0  # the article
    assert scored("mmbench", "internvl", passes=[first, {**second, "prediction": ""}]) == "error:IndexError"
