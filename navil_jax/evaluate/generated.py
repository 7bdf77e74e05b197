"""Evaluator "generated": held-out samples answered by greedy decoding, as chat would, and compared with the truth."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from navil_jax.config import Config
from navil_jax.data.images import load_image
from navil_jax.data.sample import BadSample, Sample
from navil_jax.data.sources import for_source, has_split, open_source
from navil_jax.data.tokenizers import Tokenizer
from navil_jax.errors import UserError
from navil_jax.generate.assistant import Assistant, Question
from navil_jax.generate.engine import BATCH_SLOTS, Engine
from navil_jax.model.params import Params
from navil_jax.train.evaluators import Evaluator, draw
from navil_jax.train.metrics import Answer

SLACK = 8  # tokens that an answer may be longer than the truth; it is wrong by then
SHOWN = 16


class Scores(NamedTuple):
    """Name of the source and answer of each sample, and how many samples of each source could not be used."""

    answers: list[tuple[str, Answer]]
    bad: Counter[str]


@dataclasses.dataclass(frozen=True)
class Generated(Evaluator):
    """Answers the last question of every held-out sample, the earlier turns given, and asks for the very same text.

    Prompts are those that training makes of the sample: with its own system message, else its source's, and the images
    of its source's size.
    """

    config: Config
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        if jax.process_count() > 1:
            raise UserError("config.evaluators: generated works in one process; evaluate a checkpoint on one host")

    def score(self, params: Params, limit: int = 0) -> Scores:
        """Answers the first `limit` held-out samples of every source (0: all)."""
        engine = Engine(self.config.model, params, self.mesh, slots=BATCH_SLOTS)
        assistant, scores = Assistant(self.config, self.tokenizer, engine), Scores([], Counter())
        for (name, asked), answer in assistant.answers(self._questions(assistant, scores.bad, limit)):
            right = answer.text.strip() == asked.truth.strip()
            scores.answers.append((name, dataclasses.replace(asked, answer=answer.text, right=right)))
        return scores

    def _questions(
        self, assistant: Assistant, bad: Counter[str], limit: int
    ) -> Iterator[tuple[tuple[str, Answer], Question]]:
        """What is asked of every sample, with the name of its source; samples that cannot be used are counted."""
        for number, entry in enumerate(self.config.data.sources):
            if not has_split(entry, "test"):
                continue
            source, config = open_source(entry, "test"), for_source(self.config, number)
            for index in range(min(limit or len(source), len(source))):
                try:
                    asked, question = self._ask(dataclasses.replace(assistant, config=config), source[index])
                except BadSample:
                    bad[entry.name] += 1
                else:
                    yield (entry.name, asked), question

    def _ask(self, assistant: Assistant, sample: Sample) -> tuple[Answer, Question]:
        """A sample's last question, with the truth and no answer yet."""
        assistant = assistant.with_system(sample.system)
        images = [load_image(image) for image in sample.images]
        *history, (question, truth) = sample.turns
        longest = len(self.tokenizer.encode(truth, allow_special=False)) + SLACK
        prompt = assistant.prompt(history, question, [assistant.read_image(image) for image in images])
        asked = Answer(images[0] if images else None, question, "", truth, False)
        return asked, Question(prompt, max_new_tokens=longest)

    def metrics(self, scores: Scores) -> dict[str, float]:
        """eval/<source>/generated_accuracy: share of answers that are the truth, but for blanks around them."""
        right: defaultdict[str, list[bool]] = defaultdict(list)
        for name, answer in scores.answers:
            right[name].append(answer.right)
        return {f"eval/{name}/generated_accuracy": sum(found) / len(found) for name, found in right.items()}

    def report(self, scores: Scores, folder: Path, final: bool) -> str:
        """Draws generated.png."""
        draw("plot_answers", folder / "generated.png", _spread([answer for _, answer in scores.answers], SHOWN))
        lines = [super().report(scores, folder, final)]
        lines += [f"{name}: {count:,} held-out samples cannot be used" for name, count in scores.bad.items()]
        return "\n".join(lines)


def _spread(answers: Sequence[Answer], count: int) -> list[Answer]:
    """So many of them, evenly spread."""
    return [answers[len(answers) * place // count] for place in range(count)] if len(answers) > count else list(answers)
