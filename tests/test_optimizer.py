"""Patterns, frozen parameters, schedule, clipping, weight decay and the sharding of the optimizer state."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import tiny_model

from navil_jax.config import MeshConfig, OptimizerConfig, ScaleConfig
from navil_jax.errors import UserError
from navil_jax.model import params as model_params
from navil_jax.model.params import flatten
from navil_jax.sharding import make_mesh
from navil_jax.train.optimizer import (
    MUON_RMS,
    ParameterSettings,
    make_optimizer,
    make_schedule,
    matches,
    matrix_axes,
    merge,
    parameter_settings,
    split_trainable,
    state_shardings,
)

CONFIG = OptimizerConfig(
    peak_learning_rate=0.1,
    warmup_steps=0,
    weight_decay=0.1,
    trainable=("vision/**", "**/scale"),
    learning_rate_scales=(ScaleConfig("vision/**/kernel", 0.5),),
)


def make_params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    return {
        "vision": {"a": {"kernel": jax.random.normal(keys[0], (4, 8))}, "norm": {"scale": jnp.ones(4)}},
        "text": {"kernel": jax.random.normal(keys[1], (8, 4)), "scale": jnp.ones(8)},
    }


def adamw_reference(parameter, gradients, config, scale, decay):
    """AdamW as the paper of Loshchilov and Hutter writes it, in float64."""
    parameter, m, v = np.float64(parameter), 0.0, 0.0
    for step, gradient in enumerate(gradients, start=1):
        gradient = np.float64(gradient)
        m = config.b1 * m + (1 - config.b1) * gradient
        v = config.b2 * v + (1 - config.b2) * gradient**2
        update = (m / (1 - config.b1**step)) / (np.sqrt(v / (1 - config.b2**step)) + config.eps)
        parameter = parameter - config.peak_learning_rate * scale * (update + decay * parameter)
    return parameter


def test_each_parameter_has_its_settings():
    assert parameter_settings(CONFIG, make_params()) == {
        "vision/a/kernel": ParameterSettings(trainable=True, weight_decay=True, learning_rate_scale=0.5),
        "vision/norm/scale": ParameterSettings(trainable=True, weight_decay=False, learning_rate_scale=1.0),
        "text/scale": ParameterSettings(trainable=True, weight_decay=False, learning_rate_scale=1.0),
        "text/kernel": ParameterSettings(trainable=False, weight_decay=True, learning_rate_scale=1.0),
    }


def test_by_default_all_trains_and_biases_and_scales_do_not_decay():
    names = ("a/kernel", "a/bias", "norm/scale", "layers/ls1", "layers/ls2", "embedding", "my_bias/kernel", "scale")
    found = parameter_settings(OptimizerConfig(), dict.fromkeys(names, 0))
    assert all(settings.trainable for settings in found.values())
    undecayed = ["a/bias", "norm/scale", "layers/ls1", "layers/ls2", "scale"]
    assert [name for name, settings in found.items() if not settings.weight_decay] == undecayed


@pytest.mark.parametrize(
    ("pattern", "name", "found"),
    [
        ("**", "vision/layers/ls1", True),
        ("vision/**", "vision/layers/ls1", True),
        ("vision/*", "vision/layers/ls1", False),
        ("vision/*/ls1", "vision/layers/ls1", True),
        ("vision/**/ls1", "vision/ls1", True),
        ("vision/*/ls1", "vision/ls1", False),
        ("**/ls*", "vision/layers/ls1", True),
        ("**/ls", "vision/layers/ls1", False),
        ("ls1", "vision/layers/ls1", False),
        ("layers/**", "vision/layers/ls1", False),
        ("vision", "vision/layers/ls1", False),
        ("vision/layers/ls.", "vision/layers/ls1", False),
        ("decoder/**/visual/**", "decoder/layers/qkv/visual/q/kernel", True),
        ("**/visual", "decoder/layers/qkv/visual/q/kernel", False),
    ],
)
def test_a_pattern_matches_whole_names(pattern, name, found):
    assert matches((pattern,), name) is found


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), st.lists(st.sampled_from("abc"), max_size=3))
def test_two_stars_stand_for_any_names_between_slashes(first, rest):
    name = "/".join([*first, *rest])
    assert matches(("/".join([*first, "**"]),), name)
    assert matches(("/".join(["**", *first, *rest]),), name)
    assert matches(("/".join([*first, "**", *rest]),), name)
    assert matches(("/".join("*" for _ in [*first, *rest]),), name)
    assert not matches(("/".join("*" for _ in [*first, *rest, ""]),), name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable": ("vison/**",)}, "trainable: 'vison/**' matches no parameter, the nearest one is vision/"),
        ({"trainable": ("vision",)}, "trainable: 'vision' matches no parameter"),
        ({"trainable": ("**", "text/bias")}, "the nearest one is text/scale; patterns are described in docs/recipe.md"),
        ({"no_decay": ("**/bias", "head/**")}, "no_decay: 'head/**' matches no parameter"),
        ({"learning_rate_scales": (ScaleConfig("text/*/*", 2.0),)}, "learning_rate_scales: 'text/*/*' matches no"),
        (
            {"learning_rate_scales": (ScaleConfig("**/kernel", 2.0), ScaleConfig("text/**", 3.0))},
            "learning_rate_scales: text/kernel matches **/kernel and text/**, but may have one scale only",
        ),
    ],
)
def test_wrong_patterns_name_the_parameters(settings, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        split_trainable(OptimizerConfig(**settings), make_params())
    assert "\n" not in str(error.value)


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.dictionaries(st.sampled_from("xyz"), st.integers(), min_size=1)),
    st.sampled_from(["a/*", "**/x", "a/y"]),
)
def test_split_and_merge_are_inverse(params, pattern):
    assume(any(matches((pattern,), name) for name in flatten(params)))
    trainable, frozen = split_trainable(OptimizerConfig(trainable=(pattern,)), params)
    assert merge(trainable, frozen) == params
    assert all(matches((pattern,), name) for name in flatten(trainable))
    assert not any(matches((pattern,), name) for name in flatten(frozen))


def test_frozen_parameters_own_no_state():
    params = make_params()
    trainable, frozen = split_trainable(CONFIG, params)
    assert set(flatten(frozen)) == {"text/kernel"}
    state = make_optimizer(CONFIG, 10, trainable).init(trainable)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state))
    assert shapes == sorted([(4, 8), (4,), (8,)] * 2 + [()])


def test_steps_equal_adamw_with_scales_and_decay():
    trainable, _ = split_trainable(CONFIG, make_params())
    optimizer = make_optimizer(CONFIG, 10, trainable)
    gradients = [jax.tree.map(lambda p, i=i: 0.01 * jnp.cos(p + i), trainable) for i in range(3)]
    params, state = trainable, optimizer.init(trainable)
    for step, gradient in enumerate(gradients):
        updates, state = optimizer.update(gradient, state, params, clock=step)
        params = jax.tree.map(jnp.add, params, updates)
    for name, scale, decay in (("vision/a/kernel", 0.5, 0.1), ("vision/norm/scale", 1.0, 0.0), ("text/scale", 1, 0)):
        expected = adamw_reference(
            flatten(trainable)[name], [flatten(g)[name] for g in gradients], CONFIG, scale, decay
        )
        np.testing.assert_allclose(flatten(params)[name], expected, rtol=1e-5, atol=1e-6)


def test_clipping_uses_the_global_norm():
    config = OptimizerConfig(b1=0.0, clip_norm=1.0, warmup_steps=0)
    params = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    gradients = {"a": jnp.full(3, 30.0), "b": jnp.full(4, 40.0)}
    optimizer = make_optimizer(config, 10, params)
    _, state = optimizer.update(gradients, optimizer.init(params), params, clock=0)
    norm = np.sqrt(3 * 30.0**2 + 4 * 40.0**2)
    np.testing.assert_allclose(state[1].mu["b"], 40.0 / norm, rtol=1e-6)
    small = jax.tree.map(lambda g: g / norm / 2, gradients)
    _, state = optimizer.update(small, optimizer.init(params), params, clock=0)
    np.testing.assert_allclose(state[1].mu["a"], small["a"], rtol=1e-6)


def test_schedules():
    constant = make_schedule(OptimizerConfig(peak_learning_rate=2.0, warmup_steps=4), 100)
    np.testing.assert_allclose([constant(i) for i in (0, 1, 2, 4, 5, 99)], [0, 0.5, 1, 2, 2, 2], rtol=1e-6)
    config = OptimizerConfig(peak_learning_rate=2.0, schedule="cosine", warmup_steps=4, final_learning_rate=0.2)
    cosine = make_schedule(config, 24)
    np.testing.assert_allclose([cosine(i) for i in (0, 2, 4, 14, 24)], [0, 1, 2, 1.1, 0.2], rtol=1e-6)
    assert make_schedule(OptimizerConfig(peak_learning_rate=2.0, warmup_steps=0), 10)(0) == 2.0
    with pytest.raises(UserError, match="warmup_steps: 200 must be below steps = 100"):
        make_schedule(OptimizerConfig(schedule="cosine"), 100)


def test_state_is_sharded_like_the_parameters():
    mesh = jax.make_mesh((1,), ("fsdp",), devices=jax.devices()[:1])
    trainable, _ = split_trainable(CONFIG, make_params())

    def sharding(parameter):
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*[None] * (parameter.ndim - 1), "fsdp"))

    shardings = jax.tree.map(sharding, trainable)
    optimizer = make_optimizer(CONFIG, 10, trainable)
    wanted = state_shardings(optimizer, trainable, shardings, mesh)
    state = jax.jit(optimizer.init, out_shardings=wanted)(trainable)
    assert wanted[1].mu == shardings
    assert wanted[1].nu == shardings
    assert wanted[1].count.spec == jax.sharding.PartitionSpec()
    assert state[1].mu["vision"]["a"]["kernel"].sharding == shardings["vision"]["a"]["kernel"]


def test_state_of_muon_is_sharded_like_the_parameters():
    config = OptimizerConfig(algorithm="muon", warmup_steps=0)
    mesh = make_mesh(MeshConfig())
    model = tiny_model()
    shapes, shardings = model_params.shapes(model), model_params.shardings(model, mesh)
    optimizer = make_optimizer(config, 10, shapes)
    wanted = state_shardings(optimizer, shapes, shardings, mesh)
    params = jax.jit(lambda: model_params.initialise(model, 0), out_shardings=shardings)()
    state = jax.jit(optimizer.init, out_shardings=wanted)(params)
    moments = [
        (name, leaf.sharding)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        for name, parameter in flatten(params).items()
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith(f"/{name}") and leaf.shape == parameter.shape
    ]
    assert {name for name, _ in moments} == flatten(params).keys()
    assert all(sharding == flatten(shardings)[name] for name, sharding in moments)


@pytest.mark.parametrize("family", ["internlm2", "qwen3"])
def test_muon_updates_are_orthogonal_matrices(family):
    """Every matrix of every layer moves by singular values that are nearly equal, with Adam's size of entries."""
    config = OptimizerConfig(algorithm="muon", warmup_steps=0, peak_learning_rate=1.0, weight_decay=0.0)
    params = model_params.initialise(tiny_model(family), 0)
    gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
    optimizer = make_optimizer(config, 10, params)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params, clock=0)
    matrices = 0
    for name, update in flatten(updates).items():
        axes = matrix_axes(name, update.ndim)
        if axes is None:
            continue
        kept = [axis for axis in range(update.ndim) if axis not in axes.reduction_axis + axes.output_axis]
        size = [int(np.prod([update.shape[axis] for axis in group])) for group in axes]
        stack = np.transpose(update, (*kept, *axes.reduction_axis, *axes.output_axis)).reshape(-1, *size)
        values = np.linalg.svd(stack, compute_uv=False) / (MUON_RMS * max(size) ** 0.5)
        assert values.max() < 1.3, name
        assert np.median(values) > 0.6, name
        matrices += len(stack)
    depths = 2 * 2 * 3  # layers, experts, feed-forward matrices
    assert matrices == depths + 2 * 2 * 4 + 2 * (3 + 1 + 2) + 1 + 2  # attention, vision layers, patches, connector


def test_muon_s_rest_is_plain_adam_with_the_config_s_epsilon():
    params = {"a": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
    random = np.random.default_rng(0)
    gradients = [jax.tree.map(lambda x: random.standard_normal(x.shape).astype(np.float32), params) for _ in range(4)]
    for eps in (1e-8, 1.0):
        config = OptimizerConfig(
            algorithm="muon", peak_learning_rate=0.1, warmup_steps=0, eps=eps, clip_norm=1e9, weight_decay=0.0
        )
        moved, optimizer = params, make_optimizer(config, 10, params)
        state = optimizer.init(params)
        for clock, gradient in enumerate(gradients):
            updates, state = optimizer.update(gradient, state, moved, clock=jnp.int32(clock))
            moved = jax.tree.map(jnp.add, moved, updates)
        right = adamw_reference(params["a"]["bias"], [g["a"]["bias"] for g in gradients], config, 1.0, 0.0)
        np.testing.assert_allclose(moved["a"]["bias"], right, rtol=1e-5)
