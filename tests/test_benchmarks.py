"""The benchmarks run, and routing costs what docs and docstrings say."""

from pathlib import Path

import pytest
from tiny import tiny_model

from benchmarks import step_time
from benchmarks.routing_flops import Workload, flops, serial_flops
from navil_jax.config import ModelConfig

SIZES = {"width": 128, "mlp_dim": 512, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "vocab_size": 1024}
SLOTS = 256


def config(family: str) -> ModelConfig:
    return tiny_model(family, SIZES)


def test_the_compiler_counts_every_product():
    """Forward and backward are 3 x 2 FLOPs per weight and token, and 3 x 4 per score and feature of attention."""
    decoder = config("qwen3").decoder
    kernels = 2 * decoder.width * (decoder.num_heads + decoder.num_kv_heads) * decoder.head_dim
    products = 6 * SLOTS * (kernels + 3 * decoder.width * decoder.mlp_dim)
    attention = 12 * SLOTS**2 * decoder.num_heads * decoder.head_dim
    counted = flops(Workload(config("qwen3"), SLOTS, SLOTS // 2, "one set", "none"))
    assert products + attention < counted < 1.1 * (products + attention)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["internlm2", "qwen3"])
def test_routing_costs_at_most_a_twentieth_and_computing_both_costs_more(family: str):
    model, visual = config(family), SLOTS // 2
    routed, one, both = (flops(Workload(model, SLOTS, visual, form, "none")) for form in ("routed", "one set", "both"))
    extra = serial_flops(model, visual)
    assert (extra > 0) == (family == "internlm2")  # wo_ve after wo: stated, and no part of the routing
    assert (routed - extra) / one <= 1.05
    assert routed >= one + 0.99 * extra
    assert both / one > 1.5


@pytest.mark.slow
def test_head_on_text_slots_saves_the_visual_share_of_it():
    model, visual = config("internlm2"), SLOTS * 9 // 10
    text, everywhere = (flops(Workload(model, SLOTS, visual, "routed", head)) for head in ("text slots", "all slots"))
    saved = 6 * visual * model.decoder.width * model.decoder.vocab_size
    assert saved <= everywhere - text <= 1.1 * saved


@pytest.mark.slow
def test_step_time_prints_a_table(capsys: pytest.CaptureFixture):
    recipe = Path(__file__).parent / "toy_recipe.py"
    assert step_time.main(["--config", str(recipe), "--steps", "2", "--new-tokens", "3"]) == 0
    rows = dict(line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    assert rows["compilations of the training step"] == "1"
    assert rows["compiled prefill programs"] == rows["compiled decoding programs"] == "1"
    assert float(rows["tokens per second (real ones)"].replace(",", "")) > 0
    assert 0 <= float(rows["padding, share of token slots"].rstrip("%")) < 100


def test_step_time_refuses_nothing_to_measure(capsys: pytest.CaptureFixture):
    recipe = Path(__file__).parent / "toy_recipe.py"
    assert step_time.main(["--config", str(recipe), "--new-tokens", "1"]) == 2
    assert "--new-tokens at least 2" in capsys.readouterr().err
