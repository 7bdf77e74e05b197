"""Which option an answer means: the parsers of the reference implementations."""

import re
from collections.abc import Callable, Mapping, Sequence

from navil_jax.evaluate.benchmarks.scoring import API_FAILURE, RANDOM

# An answer with one of these chooses nothing, which VLMEvalKit writes as option Z.
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
NONE_OF_THEM = "Z"
_TO_BLANKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_STATED = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)

# A parser takes an answer and {letter: text of the option}, and gives a letter or None.
Parse = Callable[[str, Mapping[str, str]], str | None]


def vlmevalkit_2505(answer: str, options: Mapping[str, str]) -> str | None:
    """VLMEvalKit of May 2025: a lone letter among the words, else the lone option whose text is inside.

    Example: "The answer is (B)." -> "B";  "b" -> None;  "A thing" -> "A", though an article
    """
    return _lone_letter(answer, options, last=None) or _lone_text(answer, options)


def vlmevalkit_head(answer: str, options: Mapping[str, str]) -> str | None:
    """VLMEvalKit of August 2026: the letter stands among the last four words, and long answers are not searched."""
    if letter := _lone_letter(answer, options, last=4):
        return letter
    stated = _STATED.search(answer)
    if stated and stated[1].upper() in options and not _is_refused(answer):
        return stated[1].upper()
    if len(answer.lower()) > 2 * sum(len(text) for text in options.values()):
        return None
    return _lone_text(answer, options)


def _is_refused(answer: str) -> bool:
    return API_FAILURE in answer


def _lone_letter(answer: str, options: Mapping[str, str], last: int | None) -> str | None:
    if _is_refused(answer):
        return None
    if any(refusal in answer for refusal in REFUSALS):
        return NONE_OF_THEM
    words = answer.translate(_TO_BLANKS).split()
    found = [letter for letter in options if letter in words]
    if not found and NONE_OF_THEM in words:
        return NONE_OF_THEM
    if len(found) != 1 or (last is not None and words.index(found[0]) < len(words) - last):
        return None
    return found[0]


def _lone_text(answer: str, options: Mapping[str, str]) -> str | None:
    found = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return found[0] if len(found) == 1 else None


VLMEVALKIT_PARSERS: Mapping[str, Parse] = {"vlmevalkit_2505": vlmevalkit_2505, "vlmevalkit_head": vlmevalkit_head}


def internvl(answer: str, options: Mapping[str, str]) -> str:
    """InternVL's clean-up of a choice: its first character, else the first option with its text inside, else all of it.

    Raises:
      IndexError: the answer is blank.

    Example: "B, I think" -> "B";  "Answer: C" -> "A", its first character;  "(B)" -> "(B)"
    """
    answer = answer.strip()
    if len(answer) == 1:
        return answer
    if answer[0] in options:
        return answer[0]
    return next((letter for letter, text in options.items() if text in answer), answer)


JUDGE_CALLS = 3


def judged(answer: str, options: Mapping[str, str], parse: Parse, judge: Callable[[], str | None]) -> str:
    """The option that an answer means, with a judge where the parser finds none.

    Returns:
      A letter, or "random" where the reference code draws one, as the judge said nothing of use.
    """
    if letter := parse(answer, options):
        return letter
    for _ in range(JUDGE_CALLS):
        said = judge()
        if said is not None and API_FAILURE not in said and (letter := parse(said, options)):
            return letter
    return RANDOM


def lmms_eval(answer: str, options: Mapping[str, str]) -> str | None:
    """lmms-eval's MMBench: a lone letter of A to E between blanks, else with marks around it, else an option's text."""
    if not _is_refused(answer):
        words = answer.split()
        for before, after in [("", ""), *_MARKS]:
            found = [letter for letter in "ABCDE" if before + letter + after in words]
            article = before == after == "" and "A" in words and len(words) > 3
            if len(found) == 1 and not article:
                return found[0]
    return _lone_text(answer, options)


_MARKS = [("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ").")]
_MARKS += [(":", ""), (":", ","), (":", "."), (":", ")"), (":", ").")]

# lmms-eval's judge-free extractor: how sure it is of a letter that stands so.
_AT_START, _AT_END, _AFTER_PHRASE, _IN_BRACKETS = 10, 9, 7, 6
_WITH = {"{}.": 5, "{}:": 4, "{})": 3, "{} ": 2}
_STATEMENTS = (
    *("the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is"),
    *("best answer is", "the correct option is", "correct option is", "the best option is", "best option is"),
    *("the choice is", "choice is", "the correct choice is", "correct choice is", "i choose", "i select", "i pick"),
    *("my answer is", "my choice is", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def lmms_eval_static(answer: str, choices: Sequence[str]) -> str | None:
    """lmms-eval's extractor without a judge: the surest place of a letter, the last of those that are as sure."""
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    if not answer.strip():
        return None
    bare, text = text.strip(), f" {text} "
    found = [(_IN_BRACKETS, text.rfind(f"({letter})"), letter) for letter in choices if f"({letter})" in text]
    for form, sure in _WITH.items():
        found += [(sure, text.rfind(form.format(one)), one) for one in choices if form.format(one) in text]
    for phrase in _STATEMENTS:
        if (start := text.lower().find(phrase)) != -1:
            places = [(text.find(letter, start + len(phrase)), letter) for letter in choices]
            found += [(_AFTER_PHRASE, place, letter) for place, letter in places if place != -1]
    found += [(_AT_START, 0, one) for one in choices if bare.startswith(one) and not bare[1:2].isalpha()]
    found += [
        (_AT_END, len(text) - 1, one)
        for one in choices
        if bare.endswith(one) and (len(bare) == 1 or not bare[-2].isalpha())
    ]
    found = found or [(0, text.rfind(letter), letter) for letter in choices if letter in text]
    return max(found, key=lambda one: one[:2])[2] if found else None
