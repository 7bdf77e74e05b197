"""What evaluators share that ask a model: an assistant on the devices of this process, compiled once for a run."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import jax

from navil_jax.config import Config, ModelConfig
from navil_jax.console import Progress
from navil_jax.data.images import load_image
from navil_jax.data.tokenizers import Tokenizer
from navil_jax.errors import UserError
from navil_jax.evaluate.answers import Ask, generate
from navil_jax.evaluate.processes import on_own_devices, together
from navil_jax.generate.assistant import Assistant
from navil_jax.generate.engine import BATCH_SLOTS, Engine
from navil_jax.model.params import Params
from navil_jax.train.evaluators import Evaluator

Item = TypeVar("Item")


class Said(NamedTuple):
    """An answer without blanks around it; empty where an image cannot be read, and why."""

    text: str
    fault: str


@dataclasses.dataclass(frozen=True)
class Asking(Evaluator):
    """An evaluator that has questions answered."""

    config: Config
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer

    @contextlib.contextmanager
    def assistant(self, params: Params) -> Iterator[Assistant]:
        """Answers with these parameters; their copy and the cache are freed at the end."""
        own, mesh = on_own_devices(self.config.model, params, self.mesh)
        engine = _engine(self.config.model, mesh)
        engine.load(own)
        try:
            yield Assistant(self.config, self.tokenizer, engine)
        finally:
            engine.unload()

    def answers(
        self, params: Params, items: Sequence[Item], ask_of: Callable[[Item], Ask], most_tokens: int
    ) -> list[Said]:
        """Greedy answers to all items on every process, each of which asks a share. A bad image stops no run."""

        def work(own: Sequence[Item]) -> list[Said]:
            faults: dict[int, str] = {}

            def asks() -> Iterator[Ask]:
                for number, item in enumerate(own):
                    try:
                        ask = ask_of(item)
                        images = tuple(load_image(image, f"image of question {ask.id}") for image in ask.images)
                    except UserError as error:
                        faults[number] = str(error)
                    else:
                        yield dataclasses.replace(ask, id=number, images=images)

            with Progress("answers", len(own), "questions", shown=jax.process_index() == 0) as progress:
                said = {}
                for ask, text in generate(assistant, asks(), most_tokens):
                    said[ask.id] = text
                    progress.update(1)
            return [Said(said.get(number, ""), faults.get(number, "")) for number in range(len(own))]

        with self.assistant(params) as assistant:
            return [Said(*one) for one in together(items, work)]


def faults_of(said: Sequence[Said]) -> Iterator[str]:
    """A line about answers that are missing, if there are any."""
    faults = [one.fault for one in said if one.fault]
    if faults:
        yield f"{len(faults):,} of {len(said):,} images cannot be read and count as an empty answer: {faults[0]}"


@functools.lru_cache(maxsize=1)
def _engine(model: ModelConfig, mesh: jax.sharding.Mesh) -> Engine:
    """One for all evaluators, with the programs that it has compiled."""
    return Engine(model, None, mesh, slots=BATCH_SLOTS)
