"""The compiled training and evaluation steps.

Both carry their mesh with them and are compiled once: every shape is fixed by the config (see `BatchSpec`).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from navil_jax.batch import Batch
from navil_jax.config import Config
from navil_jax.model import params as model_params
from navil_jax.model.params import Params
from navil_jax.sharding import named
from navil_jax.training.loss import TokenScores, feature_scale, token_scores, weighted_mean
from navil_jax.training.optimizer import make_optimizer, make_schedule, merge, split_trainable, state_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step changes or needs beside the batch."""

    step: jax.Array  # int32 scalar, finished steps
    trainable: Params
    frozen: Params
    optimizer: optax.OptState

    @property
    def params(self) -> Params:
        """All parameters, as the model takes them."""
        return merge(self.trainable, self.frozen)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EvalScores:
    """What an evaluation step says of every text slot: arrays [B, T], the same on every process."""

    cross_entropy: jax.Array  # float32, of the target; 0 without one
    predictions: jax.Array  # int32, the likeliest next token
    targets: jax.Array  # int32, -1 = none
    loss_weights: jax.Array  # float32
    segment_ids: jax.Array  # int32, 0 = empty
    source_ids: jax.Array  # int32
    sample_ids: jax.Array  # int32


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is computed."""
    shapes, shardings = model_params.shapes(config.model), model_params.shardings(config.model, mesh)
    trainable, frozen = split_trainable(config.optimizer, shapes)
    trainable_shardings, frozen_shardings = split_trainable(config.optimizer, shardings)
    optimizer = _optimizer(config)
    sharded = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=named(mesh)),
        trainable=jax.tree.map(sharded, trainable, trainable_shardings),
        frozen=jax.tree.map(sharded, frozen, frozen_shardings),
        optimizer=jax.tree.map(
            sharded,
            jax.eval_shape(optimizer.init, trainable),
            state_shardings(optimizer, trainable, trainable_shardings, mesh),
        ),
    )


def initial_params(config: Config, mesh: Mesh) -> Params:
    """Fresh parameters from `config.seed`, each made on the devices that hold it."""
    create = functools.partial(model_params.initialise, config.model, config.seed)
    return jax.jit(create, out_shardings=model_params.shardings(config.model, mesh))()


def initial_state(config: Config, mesh: Mesh, params: Params) -> TrainState:
    """The state before the first step; `params` lie as `model_params.shardings` says and may be donated later."""
    trainable, frozen = split_trainable(config.optimizer, params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    optimizer = jax.jit(_optimizer(config).init, out_shardings=shardings.optimizer)(trainable)
    return TrainState(jax.device_put(jnp.int32(0), shardings.step), trainable, frozen, optimizer)


def _optimizer(config: Config) -> optax.GradientTransformation:
    trainable, _ = split_trainable(config.optimizer, model_params.shapes(config.model))
    return make_optimizer(config.optimizer, config.steps, trainable)


def global_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Each process's rows of NumPy arrays as one batch that is split over the mesh by rows."""
    return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, named(mesh, "batch")), batch)


def make_train_step(config: Config, mesh: Mesh) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
    """Builds the training step `(state, batch) -> (state, metrics)`; the state given is donated.

    The loss is the cross-entropy weighted by `batch.loss_weights` and divided by their sum over the global batch, so
    it does not depend on the number of devices. Gradients exist for trainable parameters only, and the optimizer clips
    them by their global norm.

    Metrics, float32 scalars on every device: loss, gradient_norm (before clipping), learning_rate, text_accuracy
    (share of weighted targets that are the likeliest token), image_scale and text_scale (see `feature_scale`), tokens,
    images, patches (real ones); and source_loss, source_weight [number of sources].
    """
    optimizer, schedule = _optimizer(config), make_schedule(config.optimizer, config.steps)
    sources = max(1, len(config.data.sources))

    def loss_of(trainable: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, dict]:
        scores, x = _score_text(config, merge(trainable, frozen), batch)
        text = _text_slots(batch)
        loss = weighted_mean(scores.cross_entropy, text.loss_weights)
        return loss, {"loss": loss} | _observe(config, batch, text, scores, x, sources)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            gradients, metrics = jax.grad(loss_of, has_aux=True)(state.trainable, state.frozen, batch)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
        metrics |= {"gradient_norm": optax.tree.norm(gradients), "learning_rate": schedule(state.step)}
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, state.frozen, optimizer_state), metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, named(mesh)))


def make_eval_step(config: Config, mesh: Mesh) -> Callable[[Params, Batch], EvalScores]:
    """Builds the evaluation step `(params, batch) -> EvalScores`."""

    def eval_step(params: Params, batch: Batch) -> EvalScores:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            scores, _ = _score_text(config, params, batch)
        text = _text_slots(batch)
        fields = {field.name: getattr(text, field.name) for field in dataclasses.fields(EvalScores)[2:]}
        return EvalScores(scores.cross_entropy, scores.predictions, **fields)

    return jax.jit(eval_step, out_shardings=named(mesh))


def _score_text(config: Config, params: Params, batch: Batch) -> tuple[TokenScores, jax.Array]:
    """Scores [B, T] of the text slots (visual ones are never targets), and the last layer's output [B, L, H]."""
    model = model_params.bind(config.model, params)
    x, _ = model(batch)
    text_slots = slice(batch.visual_slots, None)
    vocab = config.model.decoder.vocab_size
    return token_scores(model.logits, x[:, text_slots], batch.targets[:, text_slots], vocab), x


def _text_slots(batch: Batch) -> Batch:
    """The batch with its per-slot arrays cut to the text slots [B, T]."""
    names = ("tokens", "targets", "loss_weights", "positions", "segment_ids", "source_ids", "sample_ids")
    return dataclasses.replace(batch, **{name: getattr(batch, name)[:, batch.visual_slots :] for name in names})


def _observe(
    config: Config, batch: Batch, text: Batch, scores: TokenScores, x: jax.Array, sources: int
) -> dict[str, jax.Array]:
    """What is logged beside the loss."""
    used = batch.segment_ids > 0
    is_visual = jnp.arange(used.shape[1]) < batch.visual_slots
    one_hot = jax.nn.one_hot(text.source_ids, sources) * text.loss_weights[..., None]
    weight = one_hot.sum(axis=(0, 1))
    begins_image = batch.tokens == config.model.special_id("<img>") if config.model.special_token_ids else used & False
    x = jax.lax.stop_gradient(x)
    return {
        "text_accuracy": weighted_mean(scores.predictions == text.targets, text.loss_weights > 0),
        "image_scale": feature_scale(x, used & is_visual),
        "text_scale": feature_scale(x, used & ~is_visual),
        "tokens": used.sum(),
        "images": (begins_image & used).sum(),
        "patches": (batch.patch_blocks > 0).sum(),
        "source_loss": (scores.cross_entropy[..., None] * one_hot).sum(axis=(0, 1)) / jnp.maximum(weight, 1e-8),
        "source_weight": weight,
    }
