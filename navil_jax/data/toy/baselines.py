"""What can be scored without looking at the images: the accuracies that a model has to beat."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from navil_jax.data.sample import Sample


def commonest_answer(samples: Iterable[Sample]) -> dict[str, float]:
    """Accuracy, by kind, of the one constant answer that fits these samples best. Counts every turn.

    Example: kind "count" with answers 1 2 2 3 -> {"count": 0.5}
    """
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        answers[sample.kind].update(answer for _, answer in sample.turns)
    return {kind: max(counts.values()) / counts.total() for kind, counts in answers.items()}


def question_only(train: Iterable[Sample], test: Iterable[Sample]) -> dict[str, float]:
    """Accuracy, by kind of the test sample, of each question's most frequent training answer. Counts every turn.

    A question that training never asked counts as wrong; of equally frequent answers the alphabetically first is given.
    """
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for sample in train:
        for question, answer in sample.turns:
            answers[question][answer] += 1
    guesses = {question: _most_frequent(counts) for question, counts in answers.items()}
    right, asked = Counter[str](), Counter[str]()
    for sample in test:
        asked[sample.kind] += len(sample.turns)
        right[sample.kind] += sum(guesses.get(question) == answer for question, answer in sample.turns)
    return {kind: right[kind] / asked[kind] for kind in asked}


def _most_frequent(counts: Mapping[str, int]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))
