"""The paper's stages: what each trains, for how long, and that frozen parameters cost nothing."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model

from navil_jax.config import Config, DataConfig, SourceConfig, VisionConfig
from navil_jax.config.flags import load_config
from navil_jax.data.pipeline import batch_spec
from navil_jax.model import lora, xla_attention
from navil_jax.model import params as model_params
from navil_jax.model.params import flatten
from navil_jax.sharding import make_mesh
from navil_jax.train.optimizer import parameter_settings, split_trainable
from navil_jax.train.step import abstract_state, initial_params, initial_state, make_train_step

CONFIGS = Path(__file__).parents[1] / "configs"
STAGES = ("s1_1", "s1_2", "s2")
MODELS = ("navil_2b", "navil_9b", "navil_2b_tpu", "navil_9b_tpu")
RECIPES = [f"{model}_{stage}" for model in MODELS for stage in STAGES]


def recipe(name):
    return load_config(CONFIGS / f"{name}.py")


# Paper, table of training settings: steps, samples of a batch, most patches, several scales, decay, rate, schedule.
TABLE = {
    "navil_2b_s1_1": (70_000, 7000, 4096, True, 0.05, 5e-5, "constant"),
    "navil_2b_s1_2": (40_000, 4614, 12288, True, 0.1, 5e-5, "constant"),
    "navil_2b_s2": (30_000, 2234, 24576, True, 0.01, 2e-5, "cosine"),
    "navil_9b_s1_1": (50_000, 10300, 4096, False, 0.05, 5e-5, "constant"),
    "navil_9b_s1_2": (33_000, 1792, 12288, True, 0.1, 5e-5, "constant"),
    "navil_9b_s2": (6_000, 3520, 24576, True, 0.01, 2e-5, "cosine"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_settings_are_those_of_the_paper(name):
    config = recipe(name)
    images, optimizer, data = config.images, config.optimizer, config.data
    assert TABLE[name.replace("_tpu", "")] == (
        config.steps,
        config.batch_samples,
        images.max_patches,
        images.multiscale,
        optimizer.weight_decay,
        optimizer.peak_learning_rate,
        optimizer.schedule,
    )
    assert (optimizer.warmup_steps, optimizer.microbatches) == (200, 1)
    assert (optimizer.algorithm, optimizer.b1, optimizer.b2, optimizer.eps) == ("adamw", 0.9, 0.95, 1e-8)
    assert data.visual_slots + data.text_slots == 16384
    assert config.model.compute_dtype == "bfloat16"


@pytest.mark.parametrize(("model", "totals"), [("navil_2b", (490e6, 185e6, 67e6)), ("navil_9b", (515e6, 59e6, 21e6))])
def test_samples_of_the_stages_are_those_of_the_paper(model, totals):
    configs = [recipe(f"{model}_{stage}") for stage in STAGES]
    assert [config.steps * config.batch_samples for config in configs] == pytest.approx(totals, rel=0.006)


@pytest.mark.parametrize("model", ["navil_2b", "navil_9b"])
def test_an_encoder_of_heads_of_128_is_as_large_as_the_papers(model):
    paper, ours = recipe(model).model, recipe(f"{model}_tpu").model
    assert ours.encoder.head_dim == 128
    sizes = [sum(math.prod(x.shape) for x in flatten(model_params.shapes(m)["vision"]).values()) for m in (paper, ours)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.003)
    assert dataclasses.replace(ours, vision=paper.vision) == paper


@pytest.mark.parametrize("model", MODELS)
def test_each_stage_starts_where_the_one_before_ends(model):
    base, configs = recipe(model), [recipe(f"{model}_{stage}") for stage in STAGES]
    assert [config.init_from for config in configs] == [f"runs/{model}_init", *(c.workdir for c in configs[:2])]
    assert all(config.model == base.model for config in configs)


@pytest.mark.parametrize("family", ["internlm2", "qwen3"])
def test_fine_tuning_trains_the_updates_alone(family):
    """Of every matrix of the layers, and of no embedding, head or norm; the frozen base has no gradient products."""
    config = recipe("finetune")
    shapes = flatten(model_params.shapes(tiny_model(family, lora_rank=2)))
    trained = {name for name, found in parameter_settings(config.optimizer, shapes).items() if found.trainable}
    kernels = {name for name in shapes if name.endswith("/kernel") and "head/" not in name}
    assert trained == {name.replace("/kernel", f"/{part}") for name in kernels for part in (lora.A, lora.B)}
    assert all(shapes[name].dtype == jnp.float32 for name in trained)


def is_visual(name):
    return name.startswith(("vision/", "connector/")) or "/visual/" in name or "special_embed" in name


TRAINED = {
    "s1_1": is_visual,
    "s1_2": lambda name: is_visual(name) or "/qkv/text/" in name or "/out/text/" in name,
    "s2": lambda name: True,
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_right_parameters_train_and_decay(name):
    config = recipe(name)
    settings = parameter_settings(config.optimizer, model_params.shapes(config.model))
    trained = TRAINED[next(stage for stage in STAGES if name.endswith(stage))]
    assert {name for name, found in settings.items() if found.trainable} == {n for n in settings if trained(n)}
    for name, found in settings.items():
        assert found.weight_decay is (name.split("/")[-1] not in ("bias", "scale", "ls1", "ls2"))
        assert found.learning_rate_scale == 1


def small(trainable=None, stage="s1_1", family="internlm2", **optimizer):
    """A tiny model that a stage trains; its widths stand nowhere else, so that products can be told by shapes."""
    name = "navil_9b" if family == "qwen3" else "navil_2b"
    settings = dataclasses.replace(recipe(f"{name}_{stage}").optimizer, warmup_steps=0, **optimizer)
    settings = dataclasses.replace(settings, trainable=trainable or settings.trainable, peak_learning_rate=1e-2)
    vision = VisionConfig(depth=2, width=16, mlp_dim=28, num_heads=2)
    data = DataConfig(sources=(SourceConfig("a"),), rows=2, visual_slots=12, text_slots=20, patch_slots=40)
    return Config(steps=10, model=tiny_model(family, vision=vision, remat="full"), data=data, optimizer=settings)


def products(config):
    """(shapes of operands, shape of result, times) of every matrix product of the compiled step's program."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state, batch = abstract_state(config, mesh), batch_spec(config).abstract()
    return list(_products(make_train_step(config, mesh).trace(state, batch).jaxpr.jaxpr, 1))


def _products(jaxpr, times):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(v.aval.shape for v in equation.invars), equation.outvars[0].aval.shape, times
        inner = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from _products(value, inner)


def count(config, wanted):
    return sum(times for operands, result, times in products(config) if wanted(operands, result))


def touches(size):
    return lambda operands, result: any(size in shape for shape in (*operands, result))


def is_kernel_gradient(operands, result):
    """Of the decoder's feed-forward matrices [32, 48] and [48, 32]; the contracted axes are rows and slots."""
    return sorted(result) == [32, 48]


def test_a_frozen_vision_tower_runs_forward_alone():
    layers = 2
    assert count(small(("decoder/**",)), touches(28)) == 2 * layers
    # forward, the same again (remat), gradients of inputs and of kernels
    assert count(small(("**",)), touches(28)) == 2 * layers * 4


def test_frozen_text_experts_pass_gradients_on_but_have_none():
    layers = 2
    first, last = small(stage="s1_1"), small(stage="s2")
    assert count(first, is_kernel_gradient) == 3 * layers  # gate, up, down of the visual experts
    assert count(last, is_kernel_gradient) == 3 * layers * 2
    through_text = lambda operands, result: touches(48)(operands, result) and 20 in result  # noqa: E731
    assert (
        count(first, through_text) == count(last, through_text) == (3 + 2 + 3) * layers
    )  # forward, again (but for down), inputs


def test_a_frozen_decoder_below_nothing_trained_has_no_backward(monkeypatch: pytest.MonkeyPatch):
    """Only the head trains: no product of any layer is done again or backwards."""
    monkeypatch.setattr(xla_attention, "block_attention", xla_attention.dense_attention)  # blocks have 48 positions
    head = small(("decoder/head/**",))
    assert count(head, touches(48)) == 3 * 2 * 2
    assert count(head, touches(28)) == 2 * 2


@pytest.mark.parametrize("family", ["internlm2", "qwen3"])
@pytest.mark.parametrize("stage", STAGES)
def test_frozen_parameters_own_no_state(family, stage):
    config = small(stage=stage, family=family, ema_decay=0.9)
    state = abstract_state(config, make_mesh(config.mesh, jax.devices()[:1]))
    owners = [
        "/".join(key.key for key in path if hasattr(key, "key"))
        for path, _ in jax.tree.leaves_with_path(state.optimizer)
    ]
    trained = [name for name in flatten(state.params) if TRAINED[stage](name)]
    assert sorted(owners) == sorted(["", *trained, *trained])  # a counter and two moments
    assert sorted(flatten(state.ema)) == sorted(trained)


@pytest.mark.slow
def test_no_weight_decay_moves_a_frozen_parameter():
    config = small(stage="s1_2", weight_decay=3.0)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state = initial_state(config, mesh, initial_params(config, mesh))
    before = flatten(jax.device_get(state.params))
    state, metrics = make_train_step(config, mesh)(state, batch_spec(config).fake(config.model))
    assert float(metrics["gradient_norm"]) > 0
    for name, value in flatten(jax.device_get(state.params)).items():
        assert np.array_equal(value, before[name]) is not TRAINED["s1_2"](name), name


def test_low_rank_updates_need_no_gradient_of_their_kernels():
    config = small(recipe("finetune").optimizer.trainable)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, lora_rank=3))
    assert count(config, is_kernel_gradient) == 0
    assert count(config, lambda operands, result: 3 in result and sorted(result)[-1] == 48) > 0


def bytes_of(tree):
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", TABLE)
def test_bytes_of_parameters_and_optimizer_state(name):
    config = recipe(name)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state = abstract_state(config, mesh)
    trainable, frozen = split_trainable(config.optimizer, model_params.shapes(config.model))
    assert bytes_of(state.params) == bytes_of(trainable) + bytes_of(frozen)
    assert bytes_of(state.optimizer) == 2 * bytes_of(trainable) + 4
    row = (
        f"{bytes_of(state.params) / 4e9:.2f}",
        f"{bytes_of(trainable) / 4e9:.2f}",
        f"{bytes_of(state.optimizer) / 1e9:.1f}",
    )
    stage = name.replace("navil_", "").replace("_", " ", 1).replace("_", ".").replace("b", "B").replace("s", "S")
    table = (CONFIGS.parent / "docs" / "recipe.md").read_text()
    assert f"| {stage} | {row[0]}B | {row[1]}B | {float(row[0]) * 4:.1f} GB | {row[2]} GB |" in table
