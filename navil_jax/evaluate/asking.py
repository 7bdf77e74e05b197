"""What evaluators share that ask a model: an assistant on the devices of this process, compiled once for a run."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import jax

from navil_jax.config import Config, ModelConfig
from navil_jax.data.tokenizers import Tokenizer
from navil_jax.evaluate.processes import on_own_devices
from navil_jax.generate.assistant import Assistant
from navil_jax.generate.engine import BATCH_SLOTS, Engine
from navil_jax.model.params import Params
from navil_jax.train.evaluators import Evaluator


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


@functools.lru_cache(maxsize=1)
def _engine(model: ModelConfig, mesh: jax.sharding.Mesh) -> Engine:
    """One for all evaluators, with the programs that it has compiled."""
    return Engine(model, None, mesh, slots=BATCH_SLOTS)
