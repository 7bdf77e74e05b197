"""Evaluator "generated": held-out samples answered by greedy decoding, as chat would, and compared with the truth."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import jax

from navil_jax.config import Config
from navil_jax.data.images import load_image
from navil_jax.data.sample import Source
from navil_jax.data.sources import has_split, open_source
from navil_jax.data.tokenizers import Tokenizer
from navil_jax.errors import UserError
from navil_jax.generate.assistant import Assistant
from navil_jax.generate.engine import Engine
from navil_jax.generate.sampling import Sampler
from navil_jax.model.params import Params
from navil_jax.train.evaluators import Evaluator, draw
from navil_jax.train.metrics import Answer

MAX_NEW_TOKENS = 128
SHOWN = 16


@dataclasses.dataclass(frozen=True)
class Generated(Evaluator):
    """Answers the last question of every held-out sample, the earlier turns given, and asks for the very same text."""

    config: Config
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        if jax.process_count() > 1:
            raise UserError("config.evaluators: generated works in one process; evaluate a checkpoint on one host")

    def _sources(self) -> dict[str, Source]:
        entries = [entry for entry in self.config.data.sources if has_split(entry, "test")]
        return {entry.name: open_source(entry, "test") for entry in entries}

    def score(self, params: Params, limit: int = 0) -> list[tuple[str, Answer]]:
        """Name of the source and answer of each sample."""
        assistant = Assistant(self.config, self.tokenizer, Engine(self.config.model, params, self.mesh))
        found = []
        for name, source in self._sources().items():
            for index in range(min(limit or len(source), len(source))):
                sample = source[index]
                patches = [assistant.read_image(image) for image in sample.images]
                *history, (question, truth) = sample.turns
                answer = "".join(assistant.answer(history, question, patches, Sampler(), MAX_NEW_TOKENS))
                image = load_image(sample.images[0]) if sample.images else None
                found.append((name, Answer(image, question, answer, truth, answer.strip() == truth.strip())))
        return found

    def metrics(self, scores: Sequence[tuple[str, Answer]]) -> dict[str, float]:
        """eval/<source>/generated_accuracy: share of answers that are the truth, but for blanks around them."""
        right: defaultdict[str, list[bool]] = defaultdict(list)
        for name, answer in scores:
            right[name].append(answer.right)
        return {f"eval/{name}/generated_accuracy": sum(found) / len(found) for name, found in right.items()}

    def report(self, scores: Sequence[tuple[str, Answer]], folder: Path, final: bool) -> str:
        """Draws generated.png."""
        draw("plot_answers", folder / "generated.png", [answer for _, answer in scores[:SHOWN]])
        return super().report(scores, folder, final)
