"""What a run begins with: parameters, fresh or of another run, and that one's tokenizer and model."""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from navil_jax.config import Config, ModelConfig
from navil_jax.data.tokenizers.base import Tokenizer
from navil_jax.model import lora
from navil_jax.model import params as model_params
from navil_jax.model.params import Params, flatten, unflatten
from navil_jax.paths import path_of
from navil_jax.train.checkpoint import Checkpoints, Record, check_same_model, find_checkpoints, with_model_of
from navil_jax.train.optimizer import with_trained_in_float32
from navil_jax.train.step import initial_params


def inherited(config: Config) -> tuple[Config, Tokenizer | None]:
    """The config with the model of `init_from` where `init_model` asks for it, and that run's tokenizer.

    Where there is no such run (yet), the config as it is and None.
    """
    if not config.init_from or not path_of(config.init_from).exists():
        return config, None
    with Checkpoints(find_checkpoints(config.init_from)) as other:
        record = other.record()
    tokenizer = Tokenizer.from_files(record.tokenizer)
    return with_model_of(config, record.config) if config.init_model else config, tokenizer


def first_params(config: Config, mesh: Mesh, say: Callable[[str], None] = print) -> Params:
    """Parameters for step 0, each on the devices that hold it.

    They are those of the newest checkpoint of `config.init_from`, running averages where that run's evaluations use
    them, or fresh ones. Low-rank updates that the other run has and this one has not, or of another rank, go into
    their kernels; new ones start at zero.

    Raises:
      UserError: the other run's model is another one.
    """
    if not config.init_from:
        return initial_params(config, mesh)
    with Checkpoints(find_checkpoints(config.init_from)) as other:
        record = other.record()
        check_same_model(record.config, config, other.folder)
        what = "running averages of the parameters" if other.averages else "parameters"
        say(f"{what} of step {other.latest_step} of {other.folder}{_unfinished(record, other.latest_step)}")
        saved = record.config.model
        theirs = dataclasses.replace(config.model, lora_rank=saved.lora_rank, lora_scale=saved.lora_scale)
        params = other.restore_params(with_trained_in_float32(config.optimizer, _abstract(theirs, mesh)))
    return params if theirs == config.model else _with_updates(config, mesh, params, theirs.lora_scale)


def _abstract(model: ModelConfig, mesh: Mesh) -> Params:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        model_params.shapes(model),
        model_params.shardings(model, mesh),
    )


def _with_updates(config: Config, mesh: Mesh, params: Params, scale: float) -> Params:
    """Merges the updates in `params`, and adds fresh ones of `config.model.lora_rank`."""

    def adapt(params: Params) -> Params:
        fresh = flatten(model_params.initialise(config.model, config.seed))
        return unflatten(fresh | flatten(lora.merged(params, scale)))

    return jax.jit(adapt, out_shardings=model_params.shardings(config.model, mesh), donate_argnums=0)(params)


def _unfinished(record: Record, step: int) -> str:
    """A note where the other run did not come to its end; a converted checkpoint has no steps."""
    config, seen = record.config, record.metrics.get("samples_seen", 0)
    ended = seen >= config.steps * config.batch_samples if config.batch_samples else step >= config.steps
    return "" if ended or not step else f", which has not come to its end ({config.steps:,} steps planned)"
