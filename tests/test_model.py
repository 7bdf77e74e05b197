"""The model's own promises: routing, packing, attention backends, sharding, sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import summed_loss, tiny_model, tiny_params

from navil_jax import sharding
from navil_jax.batch import Batch, BatchSpec, fake_sample
from navil_jax.config import AxisRule, MeshConfig, ModelConfig
from navil_jax.convert.verify.golden import build_batch, in_order, to_slots
from navil_jax.errors import UserError
from navil_jax.model import attention as attention_module
from navil_jax.model import params as model_params
from navil_jax.model import xla_attention
from navil_jax.model.blocks import needed_blocks
from navil_jax.model.decoder import FeedForward, Layout, Output, to_reading_order, to_slot_order
from navil_jax.model.experts import Experts, join_slots, split_slots
from navil_jax.train import loss
from navil_jax.train.loss import token_scores, weighted_mean

SPEC = BatchSpec(rows=4, visual_slots=24, text_slots=40, patch_slots=64)
FAMILIES = ("internlm2", "qwen3")


@functools.cache
def loss_and_gradients(config: ModelConfig):
    """Compiled (params, batch) -> (loss, gradients), once for all tests."""
    return jax.jit(jax.value_and_grad(functools.partial(loss_of, config)))


def loss_of(config: ModelConfig, params, batch: Batch) -> jax.Array:
    model = model_params.bind(config, params)
    x, _ = model(batch)
    visual = batch.visual_slots
    scores = token_scores(*model.head_inputs(x[:, visual:]), batch.targets[:, visual:])
    return weighted_mean(scores.cross_entropy, batch.loss_weights[:, visual:])


def compute_both(experts: Experts, x: jax.Array, is_visual: jax.Array) -> jax.Array:
    """The plain form of routing: both weight sets on every token, then a choice."""
    return jnp.where(is_visual[..., None], experts.visual(x), experts.text(x))


@pytest.mark.parametrize("visual_slots", [0, 3, 10])
def test_routed_weights_equal_computing_both_sets(visual_slots: int):
    config = tiny_model()
    experts = Experts(lambda rngs: FeedForward(config, rngs), True, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 10, 32))
    is_visual = jnp.broadcast_to(jnp.arange(10) < visual_slots, (2, 10))
    parts = split_slots(x, visual_slots) if visual_slots else (x,)
    np.testing.assert_allclose(join_slots(experts(parts)), compute_both(experts, x, is_visual), atol=1e-5)


def test_serial_output_starts_as_the_text_projection():
    """With wo_ve at the identity a visual token leaves attention exactly as a text token does."""
    out = Output(tiny_model(), nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 10, 4, 8))
    np.testing.assert_array_equal(join_slots(out(split_slots(x, 6))), out.text(x))


def test_the_head_never_sees_visual_slots_of_the_loss():
    """Changing what stands in empty slots, of either block, changes neither loss nor gradients."""
    config = tiny_model()
    params = model_params.initialise(config, 0)
    batch = SPEC.fake(config, 3)
    empty = batch.segment_ids == 0
    other = dataclasses.replace(batch, tokens=np.where(empty, 5, batch.tokens))
    results = [loss_and_gradients(config)(params, b) for b in (batch, other)]
    jax.tree.map(np.testing.assert_array_equal, *results)


TOGETHER = BatchSpec(rows=1, visual_slots=54, text_slots=80, patch_slots=192)
ALONE = BatchSpec(rows=3, visual_slots=20, text_slots=40, patch_slots=64)


@pytest.mark.parametrize("family", ["internlm2", pytest.param("qwen3", marks=pytest.mark.slow)])
@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 2**20))
def test_packing_changes_neither_logits_nor_gradients(family: str, seed: int):
    """Samples packed into one row compute what each computes alone."""
    config = tiny_model(family)
    params = tiny_params(family)
    rng = np.random.default_rng(seed)
    samples = [fake_sample(rng, config, with_image=i != 1) for i in range(3)]
    context = config.special_id("<IMG_CONTEXT>")
    together, alone = TOGETHER.build([samples], context), ALONE.build([[sample] for sample in samples], context)
    (loss, logits), gradients = summed_loss(family)(params, together)
    (loss_alone, logits_alone), gradients_alone = summed_loss(family)(params, alone)
    for number in range(3):
        ours = in_order(together, logits, segment=number + 1)
        np.testing.assert_allclose(ours, in_order(alone, logits_alone, row=number), atol=1e-4)
    np.testing.assert_allclose(loss, loss_alone, rtol=1e-4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-4, rtol=1e-3), gradients, gradients_alone)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "attention", "dots", "offload"])
def test_rematerialisation_changes_no_gradient(remat: str):
    batch = SPEC.fake(tiny_model())
    params = model_params.initialise(tiny_model(), 0)
    plain, other = (loss_and_gradients(config)(params, batch)[1] for config in (tiny_model(), tiny_model(remat=remat)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), plain, other)


def test_bfloat16_compute_keeps_float32_parameters_and_gradients():
    config = tiny_model(compute_dtype="bfloat16")
    params = model_params.initialise(config, 0)
    batch = SPEC.fake(config)
    loss, gradients = loss_and_gradients(config)(params, batch)
    assert {x.dtype for x in jax.tree.leaves((params, gradients))} == {jnp.dtype("float32")}
    exact, _ = loss_and_gradients(tiny_model())(params, batch)
    assert 0 < abs(float(loss) - float(exact)) < 0.05 * float(exact)


@pytest.mark.parametrize("whole", [False, True])
def test_slots_and_reading_order(whole: bool):
    """There and back is nothing done, and the gradients are those of a gather."""
    visual = 2
    sequence = jnp.array([[2, 0, 1, 4, 3], [0, 3, 4, 2, 1]])  # the slot at each place
    layout = Layout(None, sequence, jnp.argsort(sequence, axis=1), jnp.ones_like(sequence), visual)
    x = jax.random.normal(jax.random.key(0), (2, 5, 3))
    parts = (x,) if whole else (x[:, :visual], x[:, visual:])
    weights = jax.random.normal(jax.random.key(1), x.shape)
    read = to_reading_order(parts, layout)
    np.testing.assert_array_equal(read, jnp.take_along_axis(x, sequence[..., None], 1))
    jax.tree.map(np.testing.assert_array_equal, to_slot_order(read, len(parts), layout), parts)
    ours = jax.grad(lambda parts: jnp.sum(to_reading_order(parts, layout) * weights))(parts)
    plain = jax.grad(lambda x: jnp.sum(jnp.take_along_axis(x, sequence[..., None], 1) * weights))(x)
    np.testing.assert_array_equal(jnp.concatenate(ours, axis=1), plain)
    back = jax.grad(lambda x: sum(jnp.sum(part**3) for part in to_slot_order(x, len(parts), layout)))(x)
    np.testing.assert_array_equal(back, 3 * x**2)


@pytest.mark.parametrize("causal", [True, False])
def test_long_rows_are_attended_in_chunks_with_the_same_result(causal: bool, monkeypatch: pytest.MonkeyPatch):
    q, k, v, segments = attention_inputs(length=93)
    attend = jax.value_and_grad(lambda q: jnp.sum(xla_attention.dense_attention(q, k, v, segments, causal=causal) ** 2))
    whole = attend(q)
    monkeypatch.setattr(xla_attention, "QUERY_CHUNK", 16)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), whole, attend(q))


def test_gradients_of_keys_and_values_are_float32_sums_over_chunks(monkeypatch: pytest.MonkeyPatch):
    """Of bfloat16 ones the error grew with the number of chunks."""
    random = np.random.default_rng(0)
    arrays = (random.normal(size=(1, 2048, 1, 8)) * scale + shift for scale, shift in ((0.3, 0), (0.3, 0), (1, 0)))
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in arrays)
    weights, segments = jnp.asarray(random.normal(size=q.shape) * 0.2 + 1), jnp.ones((1, 2048), jnp.int32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = attention_module.attention(q, k, v, segments, causal=False, backend="xla")
        return jnp.sum(out.astype(jnp.float32) * weights)

    def gradients(chunk: int) -> list[np.ndarray]:
        monkeypatch.setattr(xla_attention, "BLOCK", chunk)
        found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
        return [np.asarray(x, np.float64) for x in found]

    for whole, chunked in zip(gradients(2048), gradients(32), strict=True):
        assert np.linalg.norm(chunked - whole) < 0.006 * np.linalg.norm(whole)


def test_attention_reaches_farther_than_4096_tokens():
    """The released Qwen3 does not without flash attention. Only the first token has a value here."""
    length = 4608
    x = jnp.ones((1, length, 1, 2))
    v = jnp.zeros_like(x).at[0, 0].set(length)
    out = attention_module.attention(x, x, v, jnp.ones((1, length), jnp.int32), causal=True, backend="xla")
    np.testing.assert_allclose(out[0, -1, 0], 1, rtol=1e-5)


def test_rotation_is_float32_in_a_bfloat16_model():
    """The released InternLM2 stores its tables in the dtype that it is loaded with."""
    config = tiny_model(compute_dtype="bfloat16")
    layout = lambda params, batch: model_params.bind(config, params).decoder.layout(batch)  # noqa: E731
    rotation = jax.eval_shape(layout, model_params.shapes(config), SPEC.abstract()).rotation
    assert {table.dtype for table in rotation} == {jnp.dtype("float32")}


@pytest.mark.parametrize("causal", [True, False])
def test_splash_attention_agrees_with_xla(causal: bool):
    """The TPU kernel, interpreted on CPU, forward and backward, with a length that needs padding."""
    q, k, v, segments = attention_inputs(length=200, head_dim=64)
    used = (segments > 0)[..., None, None]

    def total(attend, q, k, v):
        return jnp.sum(jnp.where(used, attend(q, k, v, segments, causal=causal), 0.0) ** 2)

    splash = functools.partial(attention_module.splash_attention, interpret=True)
    results = [
        jax.jit(jax.value_and_grad(functools.partial(total, attend), argnums=(0, 1, 2)))(q, k, v)
        for attend in (splash, xla_attention.xla_attention)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4), *results)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2), (2, 1)])
def test_heads_in_groups_for_the_cores_of_a_device_compute_the_same(
    heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attention_module, "cores", lambda: 2)
    monkeypatch.setattr(attention_module, "KEY_CHUNK", 128)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (1, 256, n, 64)) for key, n in zip(keys, (heads, kv_heads, kv_heads), strict=True)
    )
    segments = jnp.where(jnp.arange(256) < 200, jnp.arange(256) // 70 + 1, 0)[None]
    used = (segments > 0)[..., None, None]

    def total(attend, q, k, v):
        return jnp.sum(jnp.where(used, attend(q, k, v, segments, causal=True), 0.0) ** 2)

    splash = functools.partial(attention_module.splash_attention, interpret=True)
    results = [
        jax.jit(jax.value_and_grad(functools.partial(total, attend), argnums=(0, 1, 2)))(q, k, v)
        for attend in (splash, xla_attention.xla_attention)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4), *results)


@pytest.mark.parametrize("causal", [True, False])
def test_splash_attention_passes_by_blocks_and_stays_right(causal: bool, monkeypatch: pytest.MonkeyPatch):
    """Rows of several blocks, segments of at most 60 places: fewer blocks are visited than a row has."""
    monkeypatch.setattr(attention_module, "SPLASH_BLOCK", 128)
    q, k, v, _ = attention_inputs(length=640, head_dim=16)
    segments = jnp.where(jnp.arange(640) < 600, jnp.arange(640) // 60 + 1, 0)[None].repeat(2, axis=0)
    used = (segments > 0)[..., None, None]

    def total(attend, q, k, v):
        return jnp.sum(jnp.where(used, attend(q, k, v, segments, causal=causal), 0.0) ** 2)

    splash = functools.partial(attention_module.splash_attention, longest=60, interpret=True)
    results = [
        jax.jit(jax.value_and_grad(functools.partial(total, attend), argnums=(0, 1, 2)))(q, k, v)
        for attend in (splash, xla_attention.xla_attention)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4), *results)
    assert attention_module.grid_width(640, 128, 60) == 3
    needed = needed_blocks(segments, 128, causal)
    assert needed.sum() < needed.size / 3
    assert np.all(np.diag(needed))


def test_blocks_that_are_visited_by_hand():
    needed = needed_blocks(np.array([[1, 1, 1, 2, 3, 3]], np.int32), 2, causal=False)
    np.testing.assert_array_equal(needed, [[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    blocks, compute = attention_module.visits(jnp.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]], bool), 2, axis=1)
    np.testing.assert_array_equal(blocks[0], [[0, 1], [1, 1], [2, 2]])
    np.testing.assert_array_equal(compute[0], [[2, 2], [2, 0], [2, 0]])


def test_rows_of_the_table_that_cannot_be_are_named():
    for rule, name in ((AxisRule("embde"), "embde"), (AxisRule("embed", ("fdsp",)), "fdsp")):
        with pytest.raises(UserError, match=name):
            sharding.use_rules([rule])


def attention_inputs(length: int, head_dim: int = 8):
    shapes = ((2, length, 4, head_dim), (2, length, 2, head_dim), (2, length, 2, head_dim))
    q, k, v = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    return q, k, v, jnp.repeat(jnp.array([[1, 1, 2, 3, 0], [1, 2, 2, 2, 3]]), -(-length // 5), axis=1)[:, :length]


@pytest.mark.parametrize(
    ("family", "mesh_config"),
    [
        ("internlm2", MeshConfig(tensor=2, context=2)),
        pytest.param("internlm2", MeshConfig(), marks=pytest.mark.slow),
        pytest.param("internlm2", MeshConfig(data=2), marks=pytest.mark.slow),
        pytest.param("internlm2", MeshConfig(tensor=2), marks=pytest.mark.slow),
        pytest.param("internlm2", MeshConfig(context=2), marks=pytest.mark.slow),
        pytest.param("qwen3", MeshConfig(tensor=2, context=2), marks=pytest.mark.slow),
    ],
)
def test_sharded_over_four_devices_computes_the_same(family: str, mesh_config: MeshConfig):
    config = tiny_model(family)
    params, batch = model_params.initialise(config, 0), SPEC.fake(config)
    single = jax.block_until_ready(loss_and_gradients(config)(params, batch))
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, model_params.shardings(config, mesh))
        rows = jax.device_put(batch, sharding.named(mesh, "batch"))
        sharded = jax.jit(jax.value_and_grad(functools.partial(loss_of, config)))(placed, rows)
    kernel = placed["decoder"]["layers"]["ffn"]["text"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 // mesh_config.data // mesh_config.context == kernel.size
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4), single, sharded)


def test_every_parameter_has_a_logical_axis_for_each_dimension():
    for family in FAMILIES:
        state = nnx.to_flat_state(model_params.abstract(tiny_model(family))[1])
        for path, variable in state:
            assert len(variable.get_metadata()["out_sharding"]) == variable.ndim, path


def test_structure_and_shapes_do_not_depend_on_a_mesh_in_scope():
    build = model_params.abstract.__wrapped__
    graph, state = build(tiny_model())
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:4])):
        other_graph, other_state = build(tiny_model())
        fresh = jax.eval_shape(lambda: model_params.initialise(tiny_model(), 0))
    assert jax.tree.structure(fresh) == jax.tree.structure(nnx.to_pure_dict(other_state))
    assert other_graph == graph
    describe = lambda x: (x.shape, x.dtype, x.sharding)  # noqa: E731
    assert jax.tree.map(describe, nnx.to_pure_dict(other_state)) == jax.tree.map(describe, nnx.to_pure_dict(state))
    assert nnx.to_pure_dict(nnx.get_partition_spec(other_state)) == nnx.to_pure_dict(nnx.get_partition_spec(state))


def test_a_text_token_never_depends_on_visual_weights_of_its_own():
    """Without images the gradient of every visual weight is exactly zero."""
    config = tiny_model()
    batch = build_batch(config, [[fake_sample(np.random.default_rng(0), config, with_image=False)]])
    _, gradients = loss_and_gradients(config)(model_params.initialise(config, 0), batch)
    for name, gradient in model_params.flatten(gradients).items():
        if "/visual/" in name or name.startswith(("vision/", "connector/")):
            assert not np.any(gradient), name


def test_loss_by_hand():
    """Cross-entropy of three slots computed with a calculator: weights 1, 0.5 and 0."""
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]]))
    scores = token_scores(logits, jnp.eye(3), jnp.array([[0, 1, -1]]))
    np.testing.assert_allclose(scores.cross_entropy, [[0.693147, 0.223144, 0.0]], atol=1e-5)
    np.testing.assert_array_equal(scores.predictions, [[0, 1, 2]])
    loss = weighted_mean(scores.cross_entropy, jnp.array([[1.0, 0.5, 0.0]]))
    np.testing.assert_allclose(loss, (0.693147 + 0.5 * 0.223144) / 1.5, atol=1e-5)


def test_loss_in_parts_of_the_vocabulary_is_the_same(monkeypatch: pytest.MonkeyPatch):
    """300 tokens in parts of 128, the last one not full."""
    x = jax.random.normal(jax.random.key(0), (2, 24, 8))
    head = jax.random.normal(jax.random.key(1), (8, 300))
    targets = jnp.arange(48).reshape(2, 24) * 6 - 1

    def score(x: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = token_scores(x, head, targets)
        return jnp.sum(scores.cross_entropy * jnp.arange(48).reshape(2, 24)), scores.predictions

    both = jax.value_and_grad(score, argnums=(0, 1), has_aux=True)
    whole = both(x, head)
    np.testing.assert_array_equal(whole[0][1], jnp.argmax(x @ head, axis=-1))
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 500)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), whole, both(x, head))


def test_padding_row_of_the_embedding_gets_no_gradient():
    config = tiny_model(decoder={"pad_token_id": 7})
    sample = fake_sample(np.random.default_rng(0), config, with_image=False)
    sample["text_tokens"][0] = 7
    batch = build_batch(config, [[sample]])
    _, gradients = loss_and_gradients(config)(model_params.initialise(config, 0), batch)
    assert not np.any(gradients["decoder"]["embed"]["embedding"][7])
    assert np.any(gradients["decoder"]["embed"]["embedding"][int(sample["text_tokens"][1])])


def test_to_slots_is_the_inverse_of_in_order():
    batch = build_batch(tiny_model(), [[fake_sample(np.random.default_rng(0), tiny_model(), with_image=True)]])
    values = np.arange(np.count_nonzero(batch.segment_ids))
    np.testing.assert_array_equal(
        in_order(batch, to_slots(batch, values[None], -1, np.ones((1, len(values)), bool))), values
    )
