"""Evaluator "generated": held-out samples answered by greedy decoding, as chat would, and compared with the truth."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from navil_jax.config import Config
from navil_jax.console import Progress
from navil_jax.data.images import load_image
from navil_jax.data.sample import BadSample, Sample, Source
from navil_jax.data.sources import for_source, has_split, open_source
from navil_jax.evaluate.asking import Asking
from navil_jax.evaluate.processes import together
from navil_jax.generate.assistant import Assistant, Question
from navil_jax.model.params import Params
from navil_jax.train.evaluators import draw, varied
from navil_jax.train.metrics import Answer

SLACK = 8  # tokens that an answer may be longer than the truth; it is wrong by then
SHOWN = 16


class Asked(NamedTuple):
    """A held-out sample: number of its source, index there, answer (None: of no use), and whether right."""

    source: int
    sample: int
    answer: str | None
    right: bool = False


@dataclasses.dataclass(frozen=True)
class Generated(Asking):
    """Answers the last question of every held-out sample, the earlier turns given, and asks for the very same text.

    Prompts are those that training makes of the sample: with its own system message, else its source's, and the images
    of its source's size. Each process answers a share, and gets the answers of all.
    """

    def score(self, params: Params, limit: int = 0) -> list[Asked]:
        """Answers the first `limit` held-out samples of every source (0: all)."""
        sources = self._sources()
        sizes = {number: min(limit or len(source), len(source)) for number, source in sources.items()}
        items = [(number, index) for number, size in sizes.items() for index in range(size)]
        with self.assistant(params) as assistant:
            found = together(items, lambda own: self._answers(assistant, sources, own))
            return [Asked(*one) for one in found]

    def _sources(self) -> dict[int, Source]:
        entries = enumerate(self.config.data.sources)
        return {number: open_source(entry, "test") for number, entry in entries if has_split(entry, "test")}

    def _answers(
        self, assistant: Assistant, sources: dict[int, Source], items: Sequence[tuple[int, int]]
    ) -> list[Asked]:
        """In the order of the items; samples that cannot be used are among them."""
        answered: dict[tuple[int, int], Asked] = {}
        configs = {number: for_source(self.config, number) for number in sources}

        def questions() -> Iterator[tuple[tuple[int, int, str], Question]]:
            for number, index in items:
                try:
                    truth, question = self._ask(
                        dataclasses.replace(assistant, config=configs[number]), sources[number][index]
                    )
                except BadSample:
                    answered[number, index] = Asked(number, index, None)
                else:
                    yield (number, index, truth), question

        with Progress("generated", len(items), "answers", shown=jax.process_index() == 0) as progress:
            for (number, index, truth), answer in assistant.answers(questions()):
                right = answer.text.strip() == truth.strip()
                answered[number, index] = Asked(number, index, answer.text, right)
                progress.update(1)
        return [answered[item] for item in items]

    def _ask(self, assistant: Assistant, sample: Sample) -> tuple[str, Question]:
        """The truth about a sample's last question, and that question."""
        assistant = assistant.with_system(sample.system)
        images = [assistant.read_image(load_image(image)) for image in sample.images]
        *history, (question, truth) = sample.turns
        longest = len(self.tokenizer.encode(truth, allow_special=False)) + SLACK
        return truth, Question(assistant.prompt(history, question, images), max_new_tokens=longest)

    def metrics(self, scores: Sequence[Asked]) -> dict[str, float]:
        """eval/<source>/generated_accuracy: share of answers that are the truth, but for blanks around them."""
        right: defaultdict[str, list[bool]] = defaultdict(list)
        for one in scores:
            if one.answer is not None:
                right[_name(self.config, one)].append(one.right)
        return {f"eval/{name}/generated_accuracy": sum(found) / len(found) for name, found in right.items()}

    def report(self, scores: Sequence[Asked], folder: Path, final: bool) -> str:
        """Draws generated.png."""
        sources = self._sources()
        usable = [one for one in scores if one.answer is not None]
        shown = varied(usable, lambda one: sources[one.source][one.sample], SHOWN)
        draw("plot_answers", folder / "generated.png", [_shown(one, sources[one.source][one.sample]) for one in shown])
        bad = Counter(_name(self.config, one) for one in scores if one.answer is None)
        lines = [super().report(scores, folder, final)]
        lines += [f"{name}: {count:,} held-out samples cannot be used" for name, count in bad.items()]
        return "\n".join(lines)


def _name(config: Config, one: Asked) -> str:
    return config.data.sources[one.source].name


def _shown(one: Asked, sample: Sample) -> Answer:
    image = load_image(sample.images[0]) if sample.images else None
    question, truth = sample.turns[-1]
    return Answer(image, question, one.answer or "", truth, one.right)
