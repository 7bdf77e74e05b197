"""Start: the training state of step 0, fresh or from another checkpoint, or that after the newest checkpoint's step."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import grain
import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from jax.typing import DTypeLike

from navil_jax.config import Config, ModelConfig
from navil_jax.config.continuing import check_continues, check_same_model
from navil_jax.data.run import Earlier
from navil_jax.errors import UserError
from navil_jax.model import params as model_params
from navil_jax.model.params import Params, flatten
from navil_jax.train.checkpoint import Checkpoints, Record
from navil_jax.train.optimizer import split_trainable, with_trained_in_float32
from navil_jax.train.step import Running, TrainState, abstract_state, initial_params, initial_state


class Start(Earlier, Protocol):
    """A checkpoint whose parameters a run starts with: `convert.opened.OpenCheckpoint`, whatever its format."""

    @property
    def path(self) -> epath.Path: ...

    @property
    def record(self) -> Record | None: ...

    @property
    def origin(self) -> dict[str, Any]: ...

    @property
    def step(self) -> int: ...

    @property
    def averaged(self) -> bool: ...

    def restore(self, model: ModelConfig, mesh: Mesh, dtypes: Mapping[str, DTypeLike], seed: int) -> Params: ...


def first_params(config: Config, mesh: Mesh, start: Start | None, say: Callable[[str], None] = print) -> Params:
    """Parameters for step 0, each on the devices that hold it: those of `start`, or fresh ones.

    What trains is float32, whatever the checkpoint has. Running averages stand in the place of the parameters where
    the evaluations of that run use them.

    Raises:
      UserError: the model of `start` is another one.
    """
    if start is None:
        return initial_params(config, mesh)
    check_same_model(start.config, config, start.path)
    what = "running averages of the parameters" if start.averaged else "parameters"
    say(f"{what} of step {start.step} of {start.path}{_unfinished(start)}")
    wanted = flatten(with_trained_in_float32(config.optimizer, model_params.shapes(config.model)))
    return start.restore(config.model, mesh, {name: leaf.dtype for name, leaf in wanted.items()}, config.seed)


def _unfinished(start: Start) -> str:
    """A note where the other run did not come to its end; a converted checkpoint has no steps."""
    if start.record is None or not start.step:
        return ""
    config, seen = start.record.config, start.record.metrics.get("samples_seen", 0)
    ended = seen >= config.steps * config.batch_samples if config.batch_samples else start.step >= config.steps
    return "" if ended else f", which has not come to its end ({config.steps:,} steps planned)"


def newest_state(
    config: Config,
    mesh: Mesh,
    checkpoints: Checkpoints,
    iterator: grain.DatasetIterator,
    fingerprints: dict[str, str],
    say: Callable[[str], None] = print,
) -> tuple[TrainState, dict[str, float]]:
    """The state after the newest checkpoint's step, and its metrics; the iterator is put to its place in the data.

    Raises:
      UserError: the config or the data are not those of a continuation, or the run is longer than config.steps.
    """
    record, step = checkpoints.record(), checkpoints.latest_step or 0
    data = record.fingerprints, fingerprints
    saved = dataclasses.replace(
        record.config, data=dataclasses.replace(record.config.data, streams=checkpoints.streams)
    )
    for key, (before, now) in check_continues(saved, config, checkpoints.folder, data).items():
        say(f"from here on, as config.resume_with says: {key} was {before} and is {now}")
    wanted = abstract_state(config, mesh)
    params, optimizer, ema = checkpoints.restore(wanted.params, wanted.optimizer, wanted.ema, iterator)
    if step > config.steps and not config.batch_samples:
        raise UserError(f"config.steps: {config.steps}, but {checkpoints.folder} is already at {step}")
    scalars = jnp.int32(step), Running.after(record.metrics)
    placed = jax.device_put(scalars, (wanted.step.sharding, jax.tree.map(lambda x: x.sharding, wanted.running)))
    say(f"going on after step {step} of {checkpoints.folder}")
    return TrainState(placed[0], *split_trainable(config.optimizer, params), optimizer, ema, placed[1]), record.metrics


def fresh_state(
    config: Config, mesh: Mesh, start: Start | None, say: Callable[[str], None] = print
) -> tuple[TrainState, dict[str, float]]:
    """The state of step 0, and no metrics; errors as in `first_params`."""
    return initial_state(config, mesh, first_params(config, mesh, start, say)), {}
