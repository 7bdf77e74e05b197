"""Useful FLOPs: against counts by hand and against what the compiler counts."""

import dataclasses

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from tiny import tiny_model

from navil_jax.batch import Batch, BatchSpec
from navil_jax.config import ModelConfig, OptimizerConfig, VisionConfig
from navil_jax.model import params as model_params
from navil_jax.model import xla_attention
from navil_jax.model.flops import PARTS, Counts, count_batch, peak_flops, total, useful_flops
from navil_jax.train.loss import weighted_mean
from navil_jax.train.optimizer import merge, split_trainable

SPEC = BatchSpec(rows=2, visual_slots=40, text_slots=60, patch_slots=160)
COUNTS = Counts(100, 2000, 700, 25, 60, 900, 30)


def names(config: ModelConfig) -> set[str]:
    return set(model_params.flatten(model_params.shapes(config)))


def fake(config: ModelConfig, seed: int = 0) -> Batch:
    return jax.tree.map(np.asarray, SPEC.fake(config, seed))


def rows_of(batch: Batch, row: int) -> Batch:
    return jax.tree.map(lambda x: x[row : row + 1], batch)


@pytest.mark.parametrize("family", ["internlm2", "qwen3"])
def test_forward_by_hand(family: str):
    """The tiny model: encoder 2 x 16 (MLP 24, second layer full), decoder 2 x 32 (MLP 48, 4 heads of 8, 2 KV heads)."""
    parts = useful_flops(tiny_model(family), COUNTS, ())
    serial = 25 * 32 * 32 if family == "internlm2" else 0
    expected = {
        "vision linear": 2 * 100 * (768 * 16 + 2 * (4 * 16 * 16 + 2 * 16 * 24)),
        "vision attention": 4 * 16 * (2000 + 700),
        "connector": 2 * 25 * (64 * 32 + 32 * 32),
        "decoder linear": 2 * 2 * (85 * (32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 48) + serial),
        "decoder attention": 4 * 2 * 900 * 32,
        "head": 2 * 30 * 32 * 96,
    }
    assert {name: part.forward for name, part in parts.items()} == expected
    assert all(part.backward == 0 for part in parts.values())


def test_backward_by_hand_where_all_trains():
    """Twice the forward pass, but for the gradient of pixels."""
    config = tiny_model()
    parts = useful_flops(config, COUNTS, names(config))
    pixels = 2 * 100 * 768 * 16
    for name, part in parts.items():
        assert part.backward == 2 * part.forward - (pixels if name == "vision linear" else 0)


def test_frozen_weights_have_no_gradient_of_their_own():
    config = tiny_model()
    trained = {name for name in names(config) if not name.startswith("decoder") or "visual" in name}
    trained |= {"decoder/special_embed/embedding"}
    parts = useful_flops(config, COUNTS, trained)
    assert parts["head"].backward == parts["head"].forward
    assert parts["decoder attention"].backward == 2 * parts["decoder attention"].forward
    visual = 2 * 2 * 25 * (32 * (32 + 16 + 16) + 3 * 32 * 48 + 32 * 32)
    assert parts["decoder linear"].backward == parts["decoder linear"].forward + visual


def updates(config: ModelConfig) -> set[str]:
    return {name for name in names(config) if name.endswith(("/lora_a", "/lora_b"))}


def test_low_rank_updates_by_hand():
    """Rank 3 beside every matrix but the head: what enters and leaves a matrix counts, and nothing trains a kernel."""
    plain, config = tiny_model(), tiny_model(lora_rank=3)
    base = useful_flops(plain, COUNTS, ())
    adapted, trained = useful_flops(config, COUNTS, ()), useful_flops(config, COUNTS, updates(config))
    first = (768, 16)
    vision = [(16, 3 * 16), (16, 16), (16, 24), (24, 16)]
    token = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    thin = {
        "vision linear": 100 * (sum(first) + 2 * sum(map(sum, vision))),
        "connector": 25 * (64 + 32 + 32 + 32),
        "decoder linear": 2 * (85 * sum(map(sum, token)) + 25 * (32 + 32)),
    }
    not_needed = {  # gradients of pixels, and of the frozen text embedding below the first q, k and v
        "vision linear": 2 * 100 * 768 * (16 + 3),
        "decoder linear": 2 * 60 * 32 * (32 + 16 + 16 + 3 * 3),
    }
    for name in PARTS:
        added = 2 * 3 * thin.get(name, 0)
        assert adapted[name].forward == trained[name].forward == base[name].forward + added
        assert adapted[name].backward == 0
        through = base[name].forward * (2 if "attention" in name else 1)  # of the frozen part
        assert trained[name].backward == through + 2 * added - not_needed.get(name, 0)


def test_the_first_update_that_trains_has_nothing_below():
    """Of one matrix 32 -> 48: gradients of a (which needs that of x a) and of b, and none of x."""
    config = tiny_model("qwen3", {"depth": 1}, lora_rank=3)
    name = "decoder/layers/ffn/text/up"
    both, a, b = (
        useful_flops(config, COUNTS, {f"{name}/{factor}" for factor in factors})["decoder linear"]
        for factors in (("lora_a", "lora_b"), ("lora_a",), ("lora_b",))
    )
    down = 2 * 60 * 48 * 32 + 2 * 60 * 3 * (48 + 32)  # the way back to what trains, through the frozen matrix after it
    inputs, outputs = 2 * 60 * 3 * 32, 2 * 60 * 3 * 48
    assert both.backward == down + inputs + 2 * outputs
    assert a.backward == down + inputs + outputs
    assert b.backward == down + outputs


def test_nothing_flows_below_what_trains():
    config = tiny_model()
    head = useful_flops(config, COUNTS, {"decoder/head/kernel"})
    assert {name for name, part in head.items() if part.backward} == {"head"}
    assert head["head"].backward == head["head"].forward
    text = useful_flops(config, COUNTS, {name for name in names(config) if name.startswith("decoder")})
    assert {name for name, part in text.items() if not part.backward} == {
        "vision linear",
        "vision attention",
        "connector",
    }


def test_a_text_model():
    config = tiny_model("qwen3", {"attention_experts": False, "ffn_experts": False}, vision=None, special_token_ids=())
    parts = useful_flops(config, Counts(0, 0, 0, 0, 10, 55, 9), names(config))
    assert [name for name in PARTS if parts[name].forward] == ["decoder linear", "decoder attention", "head"]
    assert parts["decoder linear"].backward == 2 * parts["decoder linear"].forward
    assert total(parts) == sum(part.forward + part.backward for part in parts.values())


def test_counts_are_those_of_loops():
    config = tiny_model()
    batch = fake(config)
    counts = count_batch(batch, config)
    token_pairs = patch_pairs = window_pairs = 0
    side = config.vision.window_size
    for row in range(SPEC.rows):
        lengths: dict[int, int] = {}
        for segment in batch.segment_ids[row].tolist():
            lengths[segment] = lengths.get(segment, 0) + (segment > 0)
        token_pairs += sum(n * (n + 1) // 2 for n in lengths.values())
        full: dict = {}
        windows: dict = {}
        for block, (y, x) in zip(batch.patch_blocks[row].tolist(), batch.patch_coords[row].tolist(), strict=True):
            full[block] = full.get(block, 0) + (block > 0)
            windows[block, y // side, x // side] = windows.get((block, y // side, x // side), 0) + (block > 0)
        patch_pairs += sum(n * n for n in full.values())
        window_pairs += sum(n * n for n in windows.values())
    used = batch.segment_ids > 0
    assert counts == Counts(
        patches=np.count_nonzero(batch.patch_blocks),
        patch_pairs=patch_pairs,
        window_pairs=window_pairs,
        visual_tokens=np.count_nonzero(used[:, :40]),
        text_tokens=np.count_nonzero(used[:, 40:]),
        token_pairs=token_pairs,
        targets=np.count_nonzero(batch.loss_weights),
    )
    assert window_pairs < patch_pairs


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**20))
def test_rows_add_up_and_padding_is_worth_nothing(seed: int):
    config = tiny_model()
    batch = fake(config, seed)
    whole = dataclasses.astuple(count_batch(batch, config))
    parts = [dataclasses.astuple(count_batch(rows_of(batch, row), config)) for row in range(SPEC.rows)]
    assert whole == tuple(map(sum, zip(*parts, strict=True)))
    empty = jax.tree.map(np.zeros_like, batch)
    assert total(useful_flops(config, count_batch(empty, config), names(config))) == 0


WIDE = {"depth": 1, "width": 128, "mlp_dim": 512, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "vocab_size": 512}


def wide(family: str) -> ModelConfig:
    vision = VisionConfig(depth=1, width=128, mlp_dim=512, num_heads=4)
    return tiny_model(family, WIDE, vision=vision, special_token_ids=tuple(range(500, 512)))


EVERYTHING = OptimizerConfig()
EXPERTS = OptimizerConfig(trainable=("**/visual/**",))
VISION = OptimizerConfig(trainable=("vision/**", "connector/**"))
UPDATES = OptimizerConfig(trainable=("**/lora_a", "**/lora_b"))
HEAD = OptimizerConfig(trainable=("decoder/head/**",))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "optimizer"),
    [
        ("internlm2", None),
        ("internlm2", EXPERTS),
        ("qwen3", EVERYTHING),
        ("internlm2", VISION),
        ("qwen3", HEAD),
        ("internlm2", UPDATES),
        ("qwen3", UPDATES),
    ],
)
def test_the_compiler_counts_the_same(family: str, optimizer: OptimizerConfig | None, monkeypatch: pytest.MonkeyPatch):
    """Full slots and dense masks, so that executed and useful are the same; elementwise work is the small rest."""
    monkeypatch.setattr(xla_attention, "block_attention", xla_attention.dense_attention)  # loops are counted once
    config = dataclasses.replace(wide(family), lora_rank=16 if optimizer is UPDATES else 0)
    spec = BatchSpec(rows=1, visual_slots=128, text_slots=128, patch_slots=512)
    batch, shapes = spec.abstract(), model_params.shapes(config)
    counts = Counts(512, 512**2, 512**2, 128, 128, 256**2, 128)

    def loss(trainable: dict, frozen: dict, batch: Batch) -> jax.Array:
        model = model_params.bind(config, merge(trainable, frozen))
        x = model(batch)[0]
        logits = model.logits(x[:, spec.visual_slots :])
        everything = logits.mean() + x.mean()  # visual slots of a single layer would serve nothing else
        return weighted_mean(logits[..., 0], batch.loss_weights[:, spec.visual_slots :]) + everything

    trainable, frozen = split_trainable(optimizer or EVERYTHING, shapes)
    compiled = jax.jit(jax.value_and_grad(loss) if optimizer else loss).lower(trainable, frozen, batch).compile()
    trained = set(model_params.flatten(trainable)) if optimizer else ()
    useful = total(useful_flops(config, counts, trained))
    assert useful < compiled.cost_analysis()["flops"] < 1.15 * useful


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
    ],
)
def test_peaks(kind: str, peak: float | None):
    assert peak_flops(kind) == peak
