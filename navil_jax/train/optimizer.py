"""AdamW or Muon over the trainable parameters, which are chosen and scaled by patterns of their names.

Parameters are nested dicts of arrays. A parameter's name is its path joined by "/", such as
decoder/layers/qkv/text/q/kernel. Frozen parameters never reach the optimizer: they own no state, and as they are split
off before differentiation, no gradient either.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import optax

from navil_jax.config import NO_DECAY, OptimizerConfig
from navil_jax.errors import UserError
from navil_jax.model.params import Params, flatten, unflatten
from navil_jax.sharding import AnyMesh

MUON_BETA = 0.95  # of Muon's momentum
MUON_RMS = 0.2  # of an update's entries at learning rate 1, as those of Adam have, so that one rate serves both


@dataclasses.dataclass(frozen=True)
class ParameterSettings:
    """How one parameter is trained."""

    trainable: bool
    weight_decay: bool
    learning_rate_scale: float


def parameter_settings(config: OptimizerConfig, params: Params) -> dict[str, ParameterSettings]:
    """Finds how every parameter of a model is trained.

    Raises:
      UserError: a pattern matches none of the parameters, or two of learning_rate_scales match the same one.

    Example:
      trainable ("vision/**",), params {"vision": {"fc": {"kernel": k, "bias": b}}, "head": {"kernel": h}}
      -> vision/fc/kernel trains with decay, vision/fc/bias without, head/kernel is frozen
    """
    names = tuple(flatten(params))
    own = tuple(pattern for pattern in config.no_decay if pattern not in NO_DECAY)  # no model has all of NO_DECAY
    _check_matched("trainable", config.trainable, names)
    _check_matched("no_decay", own, names)
    _check_matched("learning_rate_scales", [entry.pattern for entry in config.learning_rate_scales], names)
    return _settings(config, names)


def _settings(config: OptimizerConfig, names: Iterable[str]) -> dict[str, ParameterSettings]:
    return {
        name: ParameterSettings(
            trainable=matches(config.trainable, name),
            weight_decay=not matches(config.no_decay, name),
            learning_rate_scale=_learning_rate_scale(config, name),
        )
        for name in names
    }


def _learning_rate_scale(config: OptimizerConfig, name: str) -> float:
    found = [entry for entry in config.learning_rate_scales if matches((entry.pattern,), name)]
    if len(found) > 1:
        both = " and ".join(entry.pattern for entry in found[:2])
        raise UserError(f"config.optimizer.learning_rate_scales: {name} matches {both}, but may have one scale only")
    return found[0].scale if found else 1.0


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether a parameter's whole name matches one of some patterns.

    * is anything between two slashes, ** any number of names with slashes between them, also none.

    Example, for decoder/layers/qkv/text/q/kernel: decoder/** and **/kernel and decoder/layers/*/text/** match it,
    decoder/* and text/** do not
    """
    return any(_compiled(pattern).fullmatch(f"{name}/") for pattern in patterns)


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """Of names that end in a slash."""
    names = pattern.split("/")
    return re.compile("".join("([^/]+/)*" if name == "**" else f"{_within_slashes(name)}/" for name in names))


def _within_slashes(pattern: str) -> str:
    return "[^/]*".join(map(re.escape, pattern.split("*")))


def _check_matched(key: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(matches((pattern,), name) for name in names):
            near = difflib.get_close_matches(pattern.replace("*", ""), names, n=1, cutoff=0.0)
            raise UserError(
                f"config.optimizer.{key}: {pattern!r} matches no parameter, the nearest one is {near[0]}; patterns are "
                'described in docs/recipe.md, "Choosing parameters"'
            )


def split_trainable(config: OptimizerConfig, params: Params) -> tuple[Params, Params]:
    """Splits parameters (or anything in their structure, such as shardings) into trainable and frozen ones.

    Returns:
      Two nested dicts that hold each leaf once; `merge` joins them again.
    """
    settings = parameter_settings(config, params)
    parts: dict[bool, dict] = {True: {}, False: {}}
    for name, leaf in flatten(params).items():
        parts[settings[name].trainable][name] = leaf
    return unflatten(parts[True]), unflatten(parts[False])


def with_trained_in_float32(config: OptimizerConfig, params: Params) -> Params:
    """Parameters, or their shapes, with all that is trained in float32.

    An update of bfloat16 is mostly lost: one that is under 1/256 of the parameter leaves it where it is.
    """

    def leaf(name: str, x: jax.Array | jax.ShapeDtypeStruct) -> jax.Array | jax.ShapeDtypeStruct:
        if x.dtype == jnp.float32 or not matches(config.trainable, name):
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)
        return x.astype(jnp.float32)

    return unflatten({name: leaf(name, x) for name, x in flatten(params).items()})


def merge(trainable: Params, frozen: Params) -> Params:
    """The inverse of `split_trainable`."""
    return unflatten(flatten(trainable) | flatten(frozen))


def check_warmup(config: OptimizerConfig, steps: int) -> None:
    """Raises a `UserError` if a run of so many steps ends before its learning rate is at the peak."""
    cosine = config.schedule == "cosine"
    if config.warmup_steps > steps - cosine:
        wanted = f"{'below' if cosine else 'at most'} steps = {steps}"
        raise UserError(f"config.optimizer.warmup_steps: {config.warmup_steps} must be {wanted}")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of time 0 to `steps`: linear from 0 to the peak, then constant, or a cosine that ends there."""
    start = 0.0 if config.warmup_steps else config.peak_learning_rate
    if config.schedule == "constant":
        return optax.warmup_constant_schedule(start, config.peak_learning_rate, config.warmup_steps)
    check_warmup(config, steps)
    return optax.warmup_cosine_decay_schedule(
        start, config.peak_learning_rate, config.warmup_steps, steps, config.final_learning_rate
    )


def make_optimizer(config: OptimizerConfig, steps: int, trainable: Params) -> optax.GradientTransformation:
    """AdamW or Muon behind clipping by the global norm, over the trainable parameters alone.

    A parameter moves by -learning_rate(clock) * its scale * (direction + weight_decay * parameter), without the decay
    where a pattern of `no_decay` matches. `update` takes the time of the schedule as the keyword argument `clock`.

    Args:
      steps: where the cosine ends.
      trainable: the first part of `split_trainable`; only names are used.
    """
    settings = _settings(config, flatten(trainable))
    scales = unflatten({name: setting.learning_rate_scale for name, setting in settings.items()})
    decayed = unflatten({name: setting.weight_decay for name, setting in settings.items()})
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        _direction(config, trainable),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, scale: u * scale, updates, scales)),
        _scale_by_learning_rate(make_schedule(config, steps)),
    )


def _scale_by_learning_rate(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    def update(updates: Params, state: optax.EmptyState, _: Params | None = None, *, clock: jax.Array, **__: object):
        rate = schedule(clock)
        return jax.tree.map(lambda update: update * jnp.asarray(-rate, update.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _direction(config: OptimizerConfig, trainable: Params) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.algorithm == "adamw":
        return adam
    matrices = {name: matrix_axes(name, x.ndim) for name, x in flatten(trainable).items()}
    labels = unflatten({name: "adam" if axes is None else "muon" for name, axes in matrices.items()})
    numbers = unflatten({name: optax.MaskedNode() if axes is None else axes for name, axes in matrices.items()})
    muon = optax.contrib.muon(
        learning_rate=-1.0,  # its last factor is minus this
        beta=MUON_BETA,
        muon_weight_dimension_numbers=lambda _: numbers,
        consistent_rms=MUON_RMS,
    )
    return optax.partition({"muon": muon, "adam": adam}, labels)


def matrix_axes(name: str, ndim: int) -> optax.contrib.MuonDimensionNumbers | None:
    """The axes of a parameter that are a matrix's inputs and outputs; the others count matrices.

    None for what Muon leaves to Adam: embeddings, the vocabulary head, norms, biases.

    Example: decoder/layers/out/text/kernel [layers, heads, head_dim, width] -> inputs (1, 2), outputs (3,)
    """
    if not name.endswith("/kernel") or name.startswith("decoder/head/"):
        return None
    first = 1 if "/layers/" in name else 0
    inputs = (first, first + 1) if ndim == first + 3 and re.search(r"/(out/\w+|proj)/", name) else (first,)
    joined = name == "vision/layers/qkv/kernel"  # [layers, width, 3, heads, head_dim]: three matrices
    outputs = tuple(range(inputs[-1] + (2 if joined else 1), ndim))
    return optax.contrib.MuonDimensionNumbers(inputs, outputs)


def state_shardings(
    optimizer: optax.GradientTransformation, trainable: Params, shardings: Params, mesh: AnyMesh
) -> optax.OptState:
    """Shardings of the optimizer state: moments lie as their parameters do, counters are on every device.

    Use as `jax.jit(optimizer.init, out_shardings=state_shardings(...))(trainable)`.

    Args:
      optimizer: from `make_optimizer`.
      trainable: its parameters, arrays or abstract.
      shardings: their shardings, in the same structure.
      mesh: devices that hold the counters.
    """
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    named = flatten(shardings)

    def sharding(path: tuple, _: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        names = ("/".join(keys[start:]) for start in range(len(keys)))
        return next((named[name] for name in names if name in named), replicated)

    return jax.tree_util.tree_map_with_path(sharding, jax.eval_shape(optimizer.init, trainable))
