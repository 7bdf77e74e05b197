"""Packed attention of the encoder: pairs of blocks, kernels interpreted on CPU, and their schedules."""

import contextlib
import functools
import importlib.util
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from tiny import tiny_model

from benchmarks import kernel_cycles
from navil_jax.config import MeshConfig, VisionConfig
from navil_jax.config.flags import load_config
from navil_jax.model import attention, blocks, encoder_attention, params, rope
from navil_jax.model.kernels import encoder, pairs, spare_rows, wide
from navil_jax.plan import kernels, topology
from navil_jax.plan.schedule import Cycles, grid_step
from navil_jax.plan.statistics import simulate
from navil_jax.sharding import make_mesh

ROOT = Path(__file__).parents[1]

needs_compiler = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="the TPU compiler is not installed")

segmentations = st.lists(st.lists(st.integers(1, 40), max_size=6), min_size=1, max_size=2)


def ids_of(rows: list[list[int]], length: int) -> np.ndarray:
    """Segments of these lengths, cut at the row's end, then empty positions."""
    ids = np.zeros((len(rows), length), np.int32)
    for row, lengths in zip(ids, rows, strict=True):
        filled = np.repeat(np.arange(1, len(lengths) + 1), lengths)[:length]
        row[: len(filled)] = filled
    return ids


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(segmentations, st.booleans(), st.booleans())
def test_pairs_are_the_needed_blocks_once_each(rows: list[list[int]], causal: bool, by_key: bool):
    ids = ids_of(rows, 96)
    found = pairs.block_pairs(ids, 8, causal=causal, by_key=by_key)
    used = int(found.used)
    listed = [(int(q), int(k)) for q, k in zip(found.query[:used], found.key[:used], strict=True)]
    needed = np.asarray(blocks.needed_blocks(ids, 8, causal))
    assert sorted(listed) == [tuple(pair) for pair in np.argwhere(needed)]
    held = [pair[by_key] for pair in listed]
    assert held == sorted(held)
    flags = np.asarray(found.flags[:used])
    assert [bool(flag & pairs.FIRST) for flag in flags] == [n == 0 or held[n - 1] != x for n, x in enumerate(held)]
    assert [bool(flag & pairs.LAST) for flag in flags] == [
        n + 1 == used or held[n + 1] != x for n, x in enumerate(held)
    ]
    flat, position = ids.reshape(-1), np.arange(ids.size)
    sees = flat[:, None] == flat
    if causal:
        sees &= position[:, None] >= position
    for (query, key), flag in zip(listed, flags, strict=True):
        whole = sees[query * 8 : query * 8 + 8, key * 8 : key * 8 + 8].all()
        assert whole or flag & pairs.PARTIAL


def test_a_width_holds_the_pairs_of_segments_that_are_no_longer():
    ids = ids_of([[30] * 3], 96)
    whole, narrow = pairs.block_pairs(ids, 8), pairs.block_pairs(ids, 8, width=2 * 30 // 8 + 3)
    assert len(narrow.query) < len(whole.query)
    used = int(whole.used)
    assert int(narrow.used) == used
    np.testing.assert_array_equal(narrow.key[:used], whole.key[:used])


@pytest.fixture(scope="module")
def made() -> dict[str, jax.Array]:
    random = np.random.default_rng(0)
    features = {name: jnp.asarray(random.normal(size=(2 * 64, 512)), jnp.bfloat16) for name in ("q", "k", "v", "out")}
    return features | {"angles": jnp.asarray(random.normal(size=(2, 256, 32)) * 3, jnp.float32)}


@functools.partial(jax.jit, static_argnames="shape")
def ours(q, k, v, gradient, ids, cos, sin, shape):
    inputs = encoder.make_inputs(ids, (cos, sin), shape.block, q.dtype)
    out, pullback = jax.vjp(lambda q, k, v: encoder.attend(q, k, v, inputs, shape), q, k, v)
    return out, *pullback(gradient)


def reference(q, k, v, gradient, ids, cos, sin, attend=None, dtype=jnp.float32):
    """By `model/attention` in `dtype`, turned likewise; ids [B, S]."""
    rows, length = ids.shape
    by_position = lambda x: x.T.reshape(rows, length, -1, 2 * cos.shape[-1]).astype(dtype)  # noqa: E731
    attend = attend or functools.partial(attention.attention, causal=False, backend="xla")

    def run(q, k, v):
        q, k = rope.rotate(q, (cos, sin)), rope.rotate(k, (cos, sin))
        return attend(q, k, v, ids)

    out, pullback = jax.vjp(run, *map(by_position, (q, k, v)))
    return tuple(x.reshape(rows * length, -1).T for x in (out, *pullback(by_position(gradient))))


def errors(found, true, used):
    """Norms of the errors where something is, over those of the truth."""
    pick = lambda x: np.asarray(x, np.float64)[:, used]  # noqa: E731
    return [
        np.linalg.norm(pick(a) - pick(b)) / max(np.linalg.norm(pick(b)), 1e-9) for a, b in zip(found, true, strict=True)
    ]


class AsTpu:
    """`jax.lax` with products of float32 as a TPU makes them by default: their factors are rounded to bfloat16."""

    def __getattr__(self, name: str):
        return getattr(jax.lax, name)

    def dot_general(self, a, b, *args, **options):
        return jax.lax.dot_general(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), *args, **options)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("rows", [[[256], [256]], [[1, 100, 60, 30], [128, 128]], [[], [37, 1]], [[3] * 80, [250, 6]]])
def test_values_and_gradients_are_those_of_float32(
    rows: list[list[int]], scale: float, made: dict[str, jax.Array], monkeypatch: pytest.MonkeyPatch
):
    """And about as far from them as splash attention; also where scores leave the range of the shift.

    Its products are rounded here as a TPU rounds them.
    """
    monkeypatch.setattr(attention.splash, "lax", AsTpu())
    ids, scaled = jnp.asarray(ids_of(rows, 256)), made["q"] * scale
    arrays = (scaled, made["k"], made["v"], made["out"], ids, jnp.cos(made["angles"]), jnp.sin(made["angles"]))
    shape = encoder.Shape(64, 256, 128, 1, 2**25, True)
    found, true, used = ours(*arrays, shape), reference(*arrays), np.asarray(ids.reshape(-1) > 0)
    splash = functools.partial(attention.splash_attention, causal=False, interpret=True)
    theirs = reference(*arrays, attend=jax.jit(splash), dtype=jnp.bfloat16)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in found)
    for mine, other in zip(errors(found, true, used), errors(theirs, true, used), strict=True):
        assert mine <= 1.15 * other, (mine, other)


@pytest.mark.slow
def test_the_guard_takes_over_where_scores_leave_their_range(made: dict[str, jax.Array], monkeypatch):
    ids = jnp.asarray(ids_of([[100, 156], [256]], 256))
    arrays = (made["q"], made["k"], made["v"], made["out"], ids, jnp.cos(made["angles"]), jnp.sin(made["angles"]))
    shape = encoder.Shape(64, 256, 128, 1, 2**25, True)
    spare = ours(*arrays, shape)
    _, _, fits = encoder.widened(*arrays[:2], encoder.make_inputs(ids, arrays[-2:], 128, jnp.bfloat16), shape)
    assert fits
    monkeypatch.setattr(spare_rows, "MOST_BOUND", 0.0)
    jax.clear_caches()
    exact = ours(*arrays, shape)
    jax.clear_caches()
    assert max(errors(exact, reference(*arrays), np.ones(512, bool))) < 0.01
    assert 0 < max(errors(spare, exact, np.ones(512, bool))) < 0.01


def test_words_of_segments_differ_by_more_than_any_score():
    """All 65,536: the code is linear, so that the least weight of a word is the least distance of two."""
    signs = np.asarray(spare_rows.code(jnp.arange(65_536)))
    assert np.all(np.abs(signs) == 1)
    differing = (signs[:, 1:] != signs[:, :1]).sum(0)
    assert 2 * spare_rows.STEP * differing.min() == 264
    of_queries, of_keys = spare_rows.rows_below(jnp.asarray([0, 1, 57_345, 1]), jnp.bfloat16)
    added = np.asarray(of_queries.T @ of_keys, np.float32)
    assert np.all((added == 0) == (np.array([0, 1, 2, 1])[:, None] == [0, 1, 2, 1]))
    assert added.max() == 0


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_road_of_kernels_is_the_plain_road(devices: int, lora_rank: int, monkeypatch: pytest.MonkeyPatch):
    """Three heads of 64, which do not fill registers; rows over two devices, heads over two."""
    vision = VisionConfig(depth=1, width=192, mlp_dim=64, num_heads=3)
    config = tiny_model(vision=vision, compute_dtype="bfloat16", lora_rank=lora_rank)
    made = {"vision": params.initialise(config, 0)["vision"]}
    random = np.random.default_rng(0)
    coords = np.stack(np.divmod(np.arange(200), 16), -1)[None].repeat(2, 0).astype(np.int32)
    scales = ids_of([[120, 60], [200]], 200)
    patches = random.integers(0, 256, (2, 200, vision.patch_dim), np.uint8)
    weights = jnp.asarray(random.normal(size=(2, 50, 4 * 192)), jnp.float32).at[0, 45:].set(0)  # there nothing is
    rest = {name: part for name, part in params.initialise(config, 0).items() if name != "vision"}

    def value(trained: params.Params) -> jax.Array:
        encode = params.bind(config, rest | trained).vision
        return jnp.sum(encode(patches, coords, scales).astype(jnp.float32) * weights)

    def run() -> tuple[np.ndarray, dict[str, np.ndarray]]:
        found, gradients = jax.jit(jax.value_and_grad(value))(made)
        return np.asarray(found), {name: np.asarray(x) for name, x in params.flatten(gradients).items()}

    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()) if devices == 4 else None
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        plain = run()
        shape = encoder_attention.kernel_shape

        def interpreted(*arguments):
            found = shape(*arguments)
            assert found is not None
            return encoder.Shape(*found[:-1], interpret=True)

        monkeypatch.setattr(encoder_attention, "kernel_shape", interpreted)
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, tpu, default: tpu(*arguments))
        jax.clear_caches()
        packed = run()
    assert abs(packed[0] - plain[0]) < 0.02 * np.linalg.norm(weights)
    for name, gradient in plain[1].items():
        assert np.linalg.norm(packed[1][name] - gradient) <= 0.02 * np.linalg.norm(gradient), name


def test_heads_of_a_step_fill_registers_and_memory():
    shape = encoder.Shape(64, 57_344, 512, cores=2, vmem=58 * 2**20)
    assert encoder.heads_per_step(shape, 24) == 12
    assert encoder.heads_per_step(shape, 28) == 14
    assert encoder.heads_per_step(shape, 24, backward=True) == 2
    assert encoder.heads_per_step(encoder.Shape(64, 57_344, 512, 1, 100 * 2**20), 24, backward=True) == 4
    assert encoder.heads_per_step(encoder.Shape(64, 57_344, 512, 2, 15 * 2**20), 24, backward=True) == 0


def test_a_schedule_by_hand():
    """A loop whose step may skip six products, with a first visit of three bundles inside them."""
    lines = ["     0   :  { %s0 = smov 0 }"]
    lines += ["   0x1 LB: > { %p1 = scmp 1  ;;  %2 = sbr.rel (%p1) target bundleno = 20 (0x14), region = 3 }"]
    lines += [f"   {number:#x}   : > {{}}" for number in range(2, 6)]
    lines += [f"   {number:#x}   : > {{ %v{number} = vmatmul.bf16.gmra.mxu0 %v1 }}" for number in range(6, 12)]
    lines += ["   0xc   : > { %9 = sbr.rel (%p1) target bundleno = 20 (0x14), region = 4 }"]
    lines += [f"   {number:#x}   : > {{}} /* comment\n of two lines */" for number in range(13, 17)]
    lines += [f"   {number:#x}   : > {{ %10 = vst [vmem:[#a]] %v1 }}" for number in range(17, 20)]
    lines += ["  0x14 PF: > { %3 = sbr.rel (!%p4) target bundleno = 1 (0x1), region = 9 }"]
    lines += [f"  {number:#x}   : > {{}}" for number in range(21, 25)] + ["  0x19   :  { %4 = vsyncpa 1 }"]
    slots = "== CAPACTIY:\nMXU, VALU\n 4 4\n== UTILIZATION:\n" + "1 0\n" * len(lines)
    assert grid_step("= key =\n" + "\n".join(lines), slots) == Cycles(empty=10, work=11, once=3, matrix=0.25)


PUBLIC = [  # splash attention, causal, heads of 128: marin's pull request 6330, and a timing of tokamax
    ("v5p", 8192, 512, 0.778e-3),
    pytest.param("v6e", 1024, 128, 174.3e-6, marks=[needs_compiler, pytest.mark.slow]),  # compiled for it
]


@pytest.mark.parametrize(("generation", "length", "block", "seconds"), PUBLIC)
def test_modelled_times_are_within_seven_hundredths_of_public_measurements(
    generation: str, length: int, block: int, seconds: float
):
    heads, blocks = 8, length // block
    chip = next(one for one in topology.GENERATIONS if one.name == generation)
    step = kernels.cycles(kernels.Case("splash_fwd", 128, block, causal=True), generation)
    taken = blocks**2 * step.empty + blocks * (blocks + 1) / 2 * step.work + blocks * step.once
    assert heads / chip.cores * taken / chip.clock * chip.kernel_factor == pytest.approx(seconds, rel=0.07)


@pytest.mark.parametrize("generation", kernel_cycles.CHIPS)
def test_the_kernels_reach_their_aims(generation: str, monkeypatch: pytest.MonkeyPatch):
    """By the table, which the compiler made; nothing is compiled here."""
    monkeypatch.setattr(kernels, "measure", lambda case, _: pytest.fail(f"{case} is not in the table"))
    rows = simulate(load_config(ROOT / "configs" / "navil_2b_s1_1.py"), "captions")
    chip = next(one for one in topology.GENERATIONS if one.name == generation)
    lines = {line["what"]: line for line in kernel_cycles.records(chip, rows)}
    encoder = [line for what, line in lines.items() if what.startswith("encoder attention") and "of 64" in what]
    assert len(encoder) == 2 and all(line["ours"] >= line["aim"] > 0 for line in encoder)
    assert all(line["ours"] > 1.5 * line["splash"] for line in encoder)
    pairs = lines["pairs computed for one needed, encoder, 2B S1.1"]
    assert pairs["ours"] <= pairs["aim"] < pairs["splash"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("generation", ["v5p", "v6e"])
@pytest.mark.parametrize("name", ["packed_fwd", "packed_bwd", "packed_widen_queries", "wide_fwd", "wide_bwd"])
def test_kernels_take_no_more_cycles_than_the_table_says(name: str, generation: str):
    """The table is of one version of the compiler; others are some hundredths away."""
    case = next(case for case in kernels.RECIPES if case.name == name)
    kept, found = kernels.table()[case, generation], kernels.measure(case, generation)
    assert found.computed <= 1.05 * kept.computed, f"{case}: {found}, the table has {kept}"


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "kv_heads", "causal"), [(4, 4, True), (4, 2, True), (8, 2, True), (6, 6, False)])
@pytest.mark.parametrize("rows", [[[250], [100, 70]], [[3] * 60, []]])
def test_kernels_for_heads_of_128_agree_with_xla(heads: int, kv_heads: int, causal: bool, rows: list[list[int]]):
    random = np.random.default_rng(0)
    ids = jnp.asarray(ids_of(rows, 250))
    make = lambda n: jnp.asarray(random.normal(size=(2, 250, n, 128)), jnp.bfloat16)  # noqa: E731
    q, k, v, gradient = make(heads), make(kv_heads), make(kv_heads), make(heads)
    shape = wide.Shape(heads, heads // kv_heads, causal, 256, 128, 2, 1, wide.OTHER_BYTES + 4 * 4 * 128 * 256, True)
    found = [shape.blocks(128, backward=backward) for backward in (False, True)]
    assert [one and one.heads for one in found] == ([6, 3] if heads == 6 else [4, 4])
    ways = (
        (functools.partial(attention.wide_attention, shape=shape), jnp.bfloat16),
        (functools.partial(attention.attention, causal=causal, backend="xla"), jnp.float32),
    )
    found = []
    for attend, dtype in ways:
        run = jax.jit(functools.partial(attend, segment_ids=ids))
        out, pullback = jax.vjp(run, *(x.astype(dtype) for x in (q, k, v)))
        found.append((out, *pullback(gradient.astype(dtype))))
    used = np.asarray(ids > 0)
    for mine, true in zip(*found, strict=True):
        mine, true = (np.asarray(x, np.float64) for x in (mine, true))
        assert np.isfinite(mine).all()
        assert np.linalg.norm((mine - true)[used]) < 0.006 * np.linalg.norm(true[used])
