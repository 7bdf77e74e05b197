"""MMBench and CCBench: a question counts only if it is answered under every rotation of its options."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

from navil_jax.evaluate.benchmarks import choices
from navil_jax.evaluate.benchmarks.scoring import (
    RANDOM,
    VLMEVALKIT,
    Benchmark,
    Line,
    Protocol,
    Replies,
    Score,
    grouped,
    numpy_percent,
)

# VLMEvalKit's names of MMBench's l2-categories.
SHORT = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
INTERNVL = "internvl_then_vlmevalkit_2505"
ALL = "ABCDEFGHI"
LMMS = "ABCD"  # letters that lmms-eval takes for options
LMMS_DRAW = "E"  # what lmms-eval draws first, as its seed is fixed: none of the options


def options_of(row: Line, known: str = ALL) -> dict[str, str]:
    """The options that a row has; missing ones are left out, and the others keep their letters."""
    return {letter: row[letter] for letter in known if row.get(letter) is not None}


def rows_of(line: Line) -> list[Line]:
    """The rotations of a question, in order of their index."""
    return sorted(line["passes"], key=lambda row: row["index"])


# What an unresolved row means: a letter, None (wrong) or "random".
Resolve = Callable[[Line, str], str | None]


def hit(line: Line, parse: choices.Parse, resolve: Resolve, clean: Callable[[Line], str], known: str) -> Score:
    """1 if every row is right; rows that the parser does not read are resolved one by one, up to the first wrong one.

    Args:
      known: letters that may be options.
    """
    answers = [(row, clean(row)) for row in rows_of(line)]
    found = [parse(answer, options_of(row, known)) for row, answer in answers]
    if any(letter and letter != row["answer"] for (row, _), letter in zip(answers, found, strict=True)):
        return 0.0
    by_chance = False
    for (row, answer), letter in zip(answers, found, strict=True):
        meant = letter or resolve(row, answer)
        if meant not in (row["answer"], RANDOM):
            return 0.0
        by_chance |= meant == RANDOM
    return RANDOM if by_chance else 1.0


def _scorer(parse: choices.Parse, by: str, cleaned: bool = False, known: str = ALL) -> Protocol:
    """
    Args:
      by: who resolves the rows that the parser does not: nobody, "judge", or "static" rules.
      cleaned: whether the answers go through InternVL's clean-up first.
      known: letters that may be options.
    """

    def clean(row: Line) -> str:
        return choices.internvl(row["prediction"], options_of(row)) if cleaned else row["prediction"]

    def resolve(row: Line, answer: str) -> str | None:
        options = options_of(row, known)
        if by == "judge" and row.get("judge_replies") is not None:
            letter = choices.judged(answer, options, parse, Replies(row["judge_replies"]))
            return LMMS_DRAW if letter == RANDOM and parse is choices.lmms_eval else letter
        return choices.lmms_eval_static(answer, sorted(options)) if by == "static" else None

    def score(line: Line) -> Score:
        try:
            return hit(line, parse, resolve, clean, known)
        except IndexError:
            return "error:IndexError"

    return Protocol(score, table)


def table(lines: Sequence[Line], scores: Sequence[Score]) -> dict[str, float]:
    """Means x 100: of all questions, of each l2-category, of each category."""
    found = {"Overall": numpy_percent(scores)}
    for key in ("l2-category", "category"):
        groups = grouped(lines, scores, operator.methodcaller("get", key))
        for name in sorted(name for name in groups if name):
            found[SHORT.get(name, name)] = numpy_percent(groups[name])
    return found


PROTOCOLS = {
    **{name: _scorer(parse, by="") for name, parse in choices.VLMEVALKIT_PARSERS.items()},
    INTERNVL: _scorer(choices.vlmevalkit_2505, by="", cleaned=True),
    "lmms_eval_static": _scorer(choices.lmms_eval, by="static", known=LMMS),
    **{f"{name}_judge": _scorer(parse, by="judge") for name, parse in choices.VLMEVALKIT_PARSERS.items()},
    f"{INTERNVL}_judge": _scorer(choices.vlmevalkit_2505, by="judge", cleaned=True),
    "lmms_eval_judge": _scorer(choices.lmms_eval, by="judge", known=LMMS),
}


def _expected(line: Line) -> Score:
    """InternVL's clean-up and VLMEvalKit's circles, judged if a judge replies; no clean-up where that raises."""
    score = PROTOCOLS[f"{INTERNVL}_judge"].score(line)
    return PROTOCOLS[VLMEVALKIT[0]].score(line) if score == "error:IndexError" else score


def _extras(lines: Sequence[Line], scores: Sequence[Score]) -> dict[str, Any]:
    rows = [row for line in lines for row in line["passes"]]
    each = [float(choices.vlmevalkit_2505(row["prediction"], options_of(row)) == row["answer"]) for row in rows]
    return {"mean_of_expected": numpy_percent(scores), "vanilla_all_passes_2505": numpy_percent(each)}


def _benchmark(name: str) -> Benchmark:
    return Benchmark(
        name=name,
        primary=INTERNVL,
        keys={"passes": "rows"},
        optional={"category": "text", "l2-category": "text"},
        protocols=PROTOCOLS,
        totals=(*VLMEVALKIT, INTERNVL),
        scale="0..100 (report_acc prints 0..1)",
        expected=_expected,
        extras=_extras,
        aliases={"internvl": INTERNVL, "internvl_judge": f"{INTERNVL}_judge", "lmms_eval": "lmms_eval_static"},
    )


MMBENCH, CCBENCH = _benchmark("mmbench"), _benchmark("ccbench")
