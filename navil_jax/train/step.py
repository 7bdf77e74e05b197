"""The compiled training and evaluation steps.

Both carry their mesh with them and are compiled once: every shape is fixed by the config (see `BatchSpec`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from navil_jax.batch import Batch
from navil_jax.config import Config, OptimizerConfig
from navil_jax.model import params as model_params
from navil_jax.model.linear import exact_products
from navil_jax.model.params import Params
from navil_jax.sharding import AnyMesh, constrain, named
from navil_jax.train.loss import TokenScores, feature_scale, token_scores, weighted_mean
from navil_jax.train.optimizer import (
    make_optimizer,
    make_schedule,
    merge,
    split_trainable,
    state_shardings,
    with_trained_in_float32,
)

LOSS_MEMORY = 50  # steps over which the running mean and variance of the loss reach back
SPIKES_FROM = 100  # losses that must be known before one can be a spike
COUNTED = 2**30  # samples are counted in two words, as 2^31 of them are not many


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Running:
    """Scalars that go from step to step. They are logged with every step, and a run goes on with those of its log."""

    samples_high: jax.Array  # int32, the samples of all steps so far are high * COUNTED + low
    samples_low: jax.Array  # int32, below COUNTED
    losses: jax.Array  # int32, how many losses mean and variance are of
    loss_mean: jax.Array  # float32, of the last steps
    loss_variance: jax.Array  # float32

    @classmethod
    def after(cls, metrics: Mapping[str, float]) -> "Running":
        """Those of a step whose metrics, `samples_seen` among them, are given; of none: zeros."""
        high, low = divmod(int(metrics.get("samples_seen", 0)), COUNTED)
        scalars = (jnp.float32(metrics.get(name, 0)) for name in ("loss_mean", "loss_variance"))
        return cls(jnp.int32(high), jnp.int32(low), jnp.int32(metrics.get("losses", 0)), *scalars)

    def samples_in(self, batch: int) -> jax.Array:
        """The samples so far in batches of so many, float32."""
        return self.samples_high * (COUNTED / batch) + self.samples_low / batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step changes or needs beside the batch."""

    step: jax.Array  # int32 scalar, finished steps
    trainable: Params
    frozen: Params
    optimizer: optax.OptState
    ema: Params  # float32, running average of the trainable ones minus these; {} without
    running: Running

    @property
    def params(self) -> Params:
        """All parameters, as the model takes them."""
        return merge(self.trainable, self.frozen)

    @property
    def averaged_params(self) -> Params:
        """All parameters, the trainable ones averaged where there is a running average."""
        if not self.ema:
            return self.params
        return merge(jax.tree.map(lambda x, d: x.astype(jnp.float32) + d, self.trainable, self.ema), self.frozen)


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


def abstract_state(config: Config, mesh: AnyMesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is computed."""
    shardings = model_params.shardings(config.model, mesh)
    trainable, frozen = split_trainable(config.optimizer, _shapes(config))
    trainable_shardings, frozen_shardings = split_trainable(config.optimizer, shardings)
    optimizer = _optimizer(config)

    def sharded(x: Any, sharding: jax.sharding.Sharding) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return TrainState(
        step=sharded(jax.ShapeDtypeStruct((), jnp.int32), named(mesh)),
        trainable=jax.tree.map(sharded, trainable, trainable_shardings),
        frozen=jax.tree.map(sharded, frozen, frozen_shardings),
        optimizer=jax.tree.map(
            sharded,
            jax.eval_shape(optimizer.init, trainable),
            state_shardings(optimizer, trainable, trainable_shardings, mesh),
        ),
        ema=jax.tree.map(sharded, jax.eval_shape(functools.partial(_first_ema, config), trainable), trainable_shardings)
        if config.optimizer.ema_decay
        else {},
        running=jax.tree.map(lambda x: sharded(x, named(mesh)), jax.eval_shape(lambda: Running.after({}))),
    )


def _shapes(config: Config) -> Params:
    """Shapes and dtypes of all parameters in training."""
    return with_trained_in_float32(config.optimizer, model_params.shapes(config.model))


def initial_params(config: Config, mesh: Mesh) -> Params:
    """Fresh parameters from `config.seed`, each made on the devices that hold it."""
    create = functools.partial(model_params.initialise, config.model, config.seed)
    return jax.jit(create, out_shardings=model_params.shardings(config.model, mesh))()


def initial_state(config: Config, mesh: Mesh, params: Params) -> TrainState:
    """The state before the first step; `params` lie as `model_params.shardings` says and may be donated later."""
    trainable, frozen = split_trainable(config.optimizer, with_trained_in_float32(config.optimizer, params))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    optimizer = jax.jit(_optimizer(config).init, out_shardings=shardings.optimizer)(trainable)
    ema = jax.jit(functools.partial(_first_ema, config), out_shardings=shardings.ema)(trainable)
    step, running = jax.device_put((jnp.int32(0), Running.after({})), (shardings.step, shardings.running))
    return TrainState(step, trainable, frozen, optimizer, ema, running)


def _first_ema(config: Config, trainable: Params) -> Params:
    if not config.optimizer.ema_decay:
        return {}
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable)


def _optimizer(config: Config) -> optax.GradientTransformation:
    trainable, _ = split_trainable(config.optimizer, _shapes(config))
    return make_optimizer(config.optimizer, config.steps, trainable)


def global_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Each process's rows of NumPy arrays as one batch that is split over the mesh by rows."""
    return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, named(mesh, "batch")), batch)


def make_train_step(config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """Builds the training step `(state, batch) -> (state, metrics)`; the state given is donated.

    The loss is the cross-entropy weighted by `batch.loss_weights` and divided by their sum over the global batch, so
    it depends neither on the number of devices nor on `optimizer.microbatches`. Gradients exist for trainable
    parameters only, and the optimizer clips them by their global norm. The schedule's clock is the number of finished
    steps, or, in a run counted in samples, of finished batches of `config.batch_samples`.

    Metrics, scalars on every device: loss, gradient_norm (before clipping), parameter_norm and update_norm (of what
    trains), learning_rate, text_accuracy (share of weighted targets that are the likeliest token), image_scale and
    text_scale (see `feature_scale`), tokens, text_tokens, images, patches, samples (real ones), spike and skipped (0 or
    1), losses, loss_mean and loss_variance of `Running`; and source_loss, source_weight [number of sources].
    """
    optimizer, schedule = _optimizer(config), make_schedule(config.optimizer, config.steps)
    sources, policy = max(1, len(config.data.sources)), config.optimizer

    def loss_of(trainable: Params, frozen: Params, batch: Batch, weight: jax.Array) -> tuple[jax.Array, tuple]:
        scores, x = _score_text(config, merge(trainable, frozen), batch)
        loss = jnp.sum(scores.cross_entropy * _text_slots(batch).loss_weights) / jnp.maximum(weight, 1e-8)
        return loss, (scores, jnp.mean(jnp.abs(jax.lax.stop_gradient(x).astype(jnp.float32)), axis=-1))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), exact_products(config.model.compute_dtype):
            gradients, (scores, sizes) = _gradients(loss_of, policy.microbatches, state, batch)
        metrics = _observe(config, batch, scores, sizes, sources) | {"gradient_norm": optax.tree.norm(gradients)}
        running, verdict = judge_step(policy, state, metrics)
        clock = state.running.samples_in(config.batch_samples) if config.batch_samples else state.step
        with jax.named_scope("optimizer"):
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable, clock=clock)
            trainable = optax.apply_updates(state.trainable, updates)
            ema = next_average(policy.ema_decay, state, trainable)
        new = trainable, optimizer_state, ema
        if "skip" in (policy.not_finite, policy.spikes):
            old = state.trainable, state.optimizer, state.ema
            new = jax.tree.map(lambda new, old: jnp.where(verdict["skipped"], old, new), new, old)
        trainable, optimizer_state, ema = new
        metrics |= {"learning_rate": schedule(clock), "losses": running.losses} | verdict
        metrics |= {"loss_mean": running.loss_mean, "loss_variance": running.loss_variance}
        update_norm = jnp.where(verdict["skipped"], 0.0, optax.tree.norm(updates))
        metrics |= {"parameter_norm": optax.tree.norm(trainable), "update_norm": update_norm}
        return TrainState(state.step + 1, trainable, state.frozen, optimizer_state, ema, running), metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, named(mesh)))


def _gradients(
    loss_of: Callable[..., tuple[jax.Array, tuple]], microbatches: int, state: TrainState, batch: Batch
) -> tuple[Params, tuple[TokenScores, jax.Array]]:
    """The gradients of the whole batch's loss, and what `loss_of` gave beside it; rows in so many microbatches.

    Microbatch i takes rows i, i + microbatches, ..., so that each takes equally many of every device.
    """
    weight = jnp.sum(_text_slots(batch).loss_weights)
    differentiate = jax.grad(loss_of, has_aux=True)
    if microbatches == 1:
        return differentiate(state.trainable, state.frozen, batch, weight)

    def add(total: Params, rows: Batch) -> tuple[Params, tuple]:
        rows = jax.tree.map(lambda x: constrain(x, "batch"), rows)
        gradients, seen = differentiate(state.trainable, state.frozen, rows, weight)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, gradients), seen

    split = lambda x: jnp.moveaxis(x.reshape(len(x) // microbatches, microbatches, *x.shape[1:]), 1, 0)  # noqa: E731
    joined = lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])  # noqa: E731
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.trainable)
    total, seen = jax.lax.scan(add, zeros, jax.tree.map(split, batch))
    return jax.tree.map(lambda t, x: t.astype(x.dtype), total, state.trainable), jax.tree.map(joined, seen)


def judge_step(policy: OptimizerConfig, state: TrainState, metrics: dict) -> tuple[Running, dict[str, jax.Array]]:
    """The running scalars after a step, and whether its loss is a spike and its update is left out."""
    before, loss = state.running, metrics["loss"]
    deviation = loss - before.loss_mean
    finite = jnp.isfinite(loss) & jnp.isfinite(metrics["gradient_norm"])
    spike = (
        finite & (deviation > policy.spike_deviations * jnp.sqrt(before.loss_variance)) & (before.losses >= SPIKES_FROM)
    )
    skipped = (~finite & (policy.not_finite == "skip")) | (spike & (policy.spikes == "skip"))
    share = jnp.maximum(1 / (1 + before.losses.astype(jnp.float32)), 1 / LOSS_MEMORY)
    mean = before.loss_mean + share * deviation
    variance = (1 - share) * (before.loss_variance + share * jnp.square(deviation))
    counts = finite & ~skipped
    low = before.samples_low + metrics["samples"].astype(jnp.int32)
    running = Running(
        samples_high=before.samples_high + low // COUNTED,
        samples_low=low % COUNTED,
        losses=jnp.minimum(before.losses + counts, COUNTED),
        loss_mean=jnp.where(counts, mean, before.loss_mean),
        loss_variance=jnp.where(counts, variance, before.loss_variance),
    )
    return running, {"spike": spike.astype(jnp.int32), "skipped": skipped.astype(jnp.int32)}


def next_average(decay: float, state: TrainState, trainable: Params) -> Params:
    """The running average with the newest parameters, less these: in float32 it would not move by a small share.

    Young averages reach back less far, so that they forget the start.
    """
    if not decay:
        return {}
    share = jnp.maximum(1 - decay, 9 / (10 + state.step.astype(jnp.float32)))  # of the newest parameters

    def difference(before: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        moved = before + (old.astype(jnp.float32) - new.astype(jnp.float32))
        return moved - share * moved

    return jax.tree.map(difference, state.ema, state.trainable, trainable)


def make_eval_step(config: Config, mesh: Mesh) -> Callable[[Params, Batch], EvalScores]:
    """Builds the evaluation step `(params, batch) -> EvalScores`."""

    def eval_step(params: Params, batch: Batch) -> EvalScores:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), exact_products(config.model.compute_dtype):
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
    scores = token_scores(*model.head_inputs(x[:, text_slots]), batch.targets[:, text_slots], config.model.sum_dtype)
    return scores, x


def _text_slots(batch: Batch) -> Batch:
    """The batch with its per-slot arrays cut to the text slots [B, T]."""
    names = ("tokens", "targets", "loss_weights", "positions", "segment_ids", "source_ids", "sample_ids")
    return dataclasses.replace(batch, **{name: getattr(batch, name)[:, batch.visual_slots :] for name in names})


def _observe(config: Config, batch: Batch, scores: TokenScores, sizes: jax.Array, sources: int) -> dict[str, jax.Array]:
    """What is logged beside the gradients; sizes [B, L] is the mean of |h| over the last layer's features."""
    text, used = _text_slots(batch), batch.segment_ids > 0
    is_visual = jnp.arange(used.shape[1]) < batch.visual_slots
    one_hot = jax.nn.one_hot(text.source_ids, sources) * text.loss_weights[..., None]
    weight = one_hot.sum(axis=(0, 1))
    begins_image = batch.tokens == config.model.special_id("<img>") if config.model.special_token_ids else used & False
    return {
        "loss": weighted_mean(scores.cross_entropy, text.loss_weights),
        "text_accuracy": weighted_mean(scores.predictions == text.targets, text.loss_weights > 0),
        "image_scale": feature_scale(sizes[..., None], used & is_visual),
        "text_scale": feature_scale(sizes[..., None], used & ~is_visual),
        "tokens": used.sum(),
        "text_tokens": (used & ~is_visual).sum(),
        "images": (begins_image & used).sum(),
        "patches": (batch.patch_blocks > 0).sum(),
        "samples": batch.segment_ids.max(axis=1).sum(),
        "source_loss": (scores.cross_entropy[..., None] * one_hot).sum(axis=(0, 1)) / jnp.maximum(weight, 1e-8),
        "source_weight": weight,
    }
