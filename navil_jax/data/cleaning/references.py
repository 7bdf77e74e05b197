"""What samples must not share with benchmarks: runs of words of their questions."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from navil_jax.data.cleaning.text import ngrams, own_turns, text_of, words_of
from navil_jax.data.sample import CAPTION_PROMPT, Source
from navil_jax.errors import UserError

COMMON = 3  # questions of a benchmark that share a run of words, from which on it is a phrase such as a format prompt


class Runs(NamedTuple):
    """Runs of words."""

    numbers: dict[int, int]  # hash of the run -> number of the question over all benchmarks, from 1
    said: list[str]  # what cannot be judged by them, a line for each benchmark


def question_runs(references: Mapping[str, Source], length: int) -> Runs:
    """Runs of so many words of the questions, without those that several questions of one benchmark share."""
    numbers: dict[int, int] = {}
    said, offset = [], 0
    for name, source in references.items():
        own: dict[int, int] = {}
        counts: Counter[int] = Counter()
        short = 0
        for index in range(len(source)):
            try:
                words = words_of(text_of(own_turns(source[index], (CAPTION_PROMPT,))))
            except UserError:
                continue
            found = set(ngrams(words, length))
            short += not found
            counts.update(found)
            for run in found:
                own.setdefault(run, offset + index + 1)
        for run, number in own.items():
            if counts[run] <= COMMON:
                numbers.setdefault(run, number)
        if short:
            said.append(
                f"{name}: {short:,} of {len(source):,} questions have fewer than {length} words; these are found by "
                "their images alone"
            )
        offset += len(source)
    return Runs(numbers, said)
