"""AdamW or Muon over the trainable parameters, chosen and scaled by regex rules over parameter names.

Parameters are nested dicts of arrays. A parameter's name is its path joined by "/", such as
decoder/layers/attention/q/text/kernel. Every parameter is matched by exactly one rule of the config. Frozen parameters
never reach the optimizer: they own no state, and as they are split off before differentiation, no gradient either.
"""

import re

import jax
import jax.numpy as jnp
import optax

from navil_jax.config import OptimizerConfig, RuleConfig
from navil_jax.errors import UserError
from navil_jax.model.params import Params, flatten, unflatten

MUON_BETA = 0.95  # of Muon's momentum
MUON_RMS = 0.2  # of an update's entries at learning rate 1, as those of Adam have, so that one rate serves both


def match_rules(config: OptimizerConfig, params: Params) -> dict[str, RuleConfig]:
    """Finds the rule of every parameter.

    Returns:
      Parameter name -> the one rule whose pattern matches the whole name.

    Raises:
      UserError: a parameter is matched by no rule or by several.

    Example:
      rules (".*bias", frozen) and (".*kernel"), params {"a": {"kernel": k, "bias": b}}
      -> {"a/kernel": RuleConfig(".*kernel"), "a/bias": RuleConfig(".*bias", trainable=False)}
    """
    patterns = [re.compile(rule.pattern) for rule in config.rules]
    matches = {name: [i for i, p in enumerate(patterns) if p.fullmatch(name)] for name in flatten(params)}
    wrong = [f"{name} ({len(found)} rules)" for name, found in matches.items() if len(found) != 1]
    if wrong:
        listed = ", ".join(wrong[:8]) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise UserError(
            f"config.optimizer.rules: every parameter needs exactly one matching rule, but not so: {listed}"
        )
    return {name: config.rules[found[0]] for name, found in matches.items()}


def split_trainable(config: OptimizerConfig, params: Params) -> tuple[Params, Params]:
    """Splits parameters (or anything in their structure, such as shardings) into trainable and frozen ones.

    Returns:
      Two nested dicts that hold each leaf once; `merge` joins them again.
    """
    rules = match_rules(config, params)
    parts: dict[bool, dict] = {True: {}, False: {}}
    for name, leaf in flatten(params).items():
        parts[rules[name].trainable][name] = leaf
    if not parts[True]:
        raise UserError("config.optimizer.rules: every parameter is frozen, nothing would be trained")
    return unflatten(parts[True]), unflatten(parts[False])


def with_trained_in_float32(config: OptimizerConfig, params: Params) -> Params:
    """Parameters, or their shapes, with all that a rule trains in float32.

    An update of bfloat16 is mostly lost: one that is under 1/256 of the parameter leaves it where it is.
    """
    trained = [re.compile(rule.pattern) for rule in config.rules if rule.trainable]

    def leaf(name: str, x: jax.Array | jax.ShapeDtypeStruct) -> jax.Array | jax.ShapeDtypeStruct:
        if x.dtype == jnp.float32 or not any(pattern.fullmatch(name) for pattern in trained):
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)
        return x.astype(jnp.float32)

    return unflatten({name: leaf(name, x) for name, x in flatten(params).items()})


def merge(trainable: Params, frozen: Params) -> Params:
    """The inverse of `split_trainable`."""
    return unflatten(flatten(trainable) | flatten(frozen))


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of time 0 to `steps`: linear from 0 to the peak, then constant, or a cosine that ends there."""
    start = 0.0 if config.warmup_steps else config.peak_learning_rate
    if config.schedule == "constant":
        return optax.warmup_constant_schedule(start, config.peak_learning_rate, config.warmup_steps)
    if config.warmup_steps >= steps:
        raise UserError(f"config.optimizer.warmup_steps: {config.warmup_steps} must be below steps = {steps}")
    return optax.warmup_cosine_decay_schedule(
        start, config.peak_learning_rate, config.warmup_steps, steps, config.final_learning_rate
    )


def make_optimizer(config: OptimizerConfig, steps: int, trainable: Params) -> optax.GradientTransformation:
    """AdamW or Muon behind clipping by the global norm, over the trainable parameters alone.

    A parameter moves by -learning_rate(clock) * rule.learning_rate_scale * (direction + weight_decay * parameter), the
    decay only where its rule says so. `update` takes the time of the schedule as the keyword argument `clock`.

    Args:
      config: the whole set of rules.
      steps: where the cosine ends.
      trainable: the first part of `split_trainable`; only names are used.
    """
    rules = match_rules(config, trainable)

    scales = unflatten({name: rule.learning_rate_scale for name, rule in rules.items()})
    decayed = unflatten({name: rule.weight_decay for name, rule in rules.items()})
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
    optimizer: optax.GradientTransformation, trainable: Params, shardings: Params, mesh: jax.sharding.Mesh
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
