"""The benchmarks run, and routing costs what docs and docstrings say."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from made_cleaning import needs_packages
from tiny import tiny_model

from benchmarks import (
    decode,
    dense_text,
    elastic,
    goodput,
    layer_time,
    near_duplicates,
    saves,
    serve_load,
    step_time,
    torch_step,
)
from benchmarks.routing_flops import Workload, flops, serial_flops
from navil_jax.config import ModelConfig
from navil_jax.data.pipeline import batch_spec
from navil_jax.errors import UserError
from navil_jax.model import params as model_params

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
def test_layer_time_prints_a_line_for_each_form(capsys: pytest.CaptureFixture):
    recipe = Path(__file__).parent / "plan_recipe.py"
    assert layer_time.main(["--config", str(recipe), "--runs", "1"]) == 0
    lines = [line.strip("| ").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [cells[0].strip() for cells in lines[1:]] == [
        "decoder, routed",
        "decoder, one set",
        "decoder, both",
        "encoder",
    ]
    assert all(float(cells[1].replace(",", "")) > 0 and float(cells[2].replace(",", "")) > 0 for cells in lines[1:])


def test_layer_time_refuses_rows_without_room_for_an_image(capsys: pytest.CaptureFixture):
    assert layer_time.main(["--slots", "100"]) == 2
    assert "take at least 256" in capsys.readouterr().err


@pytest.mark.slow
def test_step_time_prints_a_table(capsys: pytest.CaptureFixture):
    recipe = Path(__file__).parent / "toy_recipe.py"
    assert step_time.main(["--config", str(recipe), "--steps", "2", "--new-tokens", "3"]) == 0
    rows = dict(line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    assert rows["compilations of the training step"] == "1"
    assert rows["compiled prefill programs"] == rows["compiled decoding programs"] == "1"
    assert float(rows["tokens per second (real ones)"].replace(",", "")) > 0
    assert 0 <= float(rows["padding, share of token slots"].rstrip("%")) < 100


@pytest.mark.slow
def test_decode_prints_both_ways_side_by_side(capsys: pytest.CaptureFixture):
    recipe = Path(__file__).parent / "toy_recipe.py"
    arguments = ["--config", str(recipe), "--batch", "2", "--new-tokens", "3", "--turns", "1", "--side", "64"]
    assert decode.main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"| {what}, {way} |" in out for what in ("prefill", "decode") for way in ("one at a time", "2 together"))


def test_step_time_refuses_nothing_to_measure(capsys: pytest.CaptureFixture):
    recipe = Path(__file__).parent / "toy_recipe.py"
    assert step_time.main(["--config", str(recipe), "--new-tokens", "1"]) == 2
    assert "--new-tokens at least 2" in capsys.readouterr().err


@pytest.mark.parametrize(("shape", "parameters"), [("llama2-7b", 6_738_415_616), ("qwen3-8b", 8_190_735_360)])
def test_dense_shapes_have_the_parameters_of_the_released_models(shape: str, parameters: int):
    def count(case: dense_text.Case) -> int:
        return sum(x.size for x in model_params.flatten(model_params.shapes(case.config.model)).values())

    one, two = dense_text.Case(shape), dense_text.Case(shape, share=0.3, sets=2)
    assert count(one) == parameters
    decoder = one.config.model.decoder
    attention = 2 * decoder.width * (decoder.num_heads + decoder.num_kv_heads) * decoder.head_dim
    norms = 2 * decoder.head_dim if decoder.qk_norm else 0
    layer = attention + norms + 3 * decoder.width * decoder.mlp_dim
    assert count(two) - parameters == decoder.depth * layer


def test_dense_rows_have_the_same_slots_whatever_is_visual():
    specs = [batch_spec(case.config) for case in dense_text.cases()]
    assert {(spec.rows, spec.row_slots, spec.patch_slots) for spec in specs} == {(16, 8192, 0)}
    assert {spec.visual_slots for spec in specs} == {0, 2432, 4096, 6528}


def test_page_shows_the_kept_figures_of_dense_steps():
    kept, page = json.loads(dense_text.FILE.read_text()), dense_text.PAGE.read_text()
    assert dense_text.text_table(kept) in page
    assert dense_text.experts_table(kept) in page


def test_maxtext_folder_without_programs_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="holds no NAME"):
        dense_text.read(tmp_path)


def test_the_model_beside_pytorch_has_the_size_that_is_said_and_fills_its_row():
    config, features = torch_step.model(), torch_step.sample(torch_step.model())
    count = sum(x.size for x in model_params.flatten(model_params.shapes(config)).values())
    assert round(count / 1e6) == 12
    assert len(features["visual_tokens"]) + len(features["text_tokens"]) == 512
    assert len(features["patches"]) == len(features["patch_coords"]) == 1232


def test_an_interpreter_that_is_not_there_is_named(capsys: pytest.CaptureFixture):
    assert torch_step.main(["--torch-python", "no/python"]) == 2
    assert "no/python" in capsys.readouterr().err


def test_sides_that_find_different_losses_are_not_compared():
    class Ours:
        def gradient(self) -> float:
            return 1.0

    with pytest.raises(UserError, match="gradient: the sides differ"):
        torch_step.measure(Ours(), lambda name: (0.1, 1.1), ["gradient"], 1)


@pytest.mark.slow
def test_the_load_of_a_server_loses_nothing(tmp_path: Path, capsys):
    pytest.importorskip("uvicorn")
    recipe = str(Path(__file__).with_name("toy_recipe.py"))
    sizes = ["--clients=8", "--requests=24", "--slots=4", "--new-tokens=8"]
    assert serve_load.main(["--config", recipe, *sizes]) == 0
    rows = dict(line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line)
    assert rows["clients, requests, slots"] == "8, 24, 4"
    assert rows["lost"] == rows["programs compiled after the warm-up"] == "0"
    start, _, end = map(float, rows["memory: start, half, end"].replace(" MiB", "").split(", "))
    assert start < end < start + 300


@needs_packages
@pytest.mark.slow
def test_near_duplicates_prints_recall_and_precision_of_every_kind_of_image(capsys: pytest.CaptureFixture):
    assert near_duplicates.main(["--originals", "3", "--records", "2000"]) == 0
    said = capsys.readouterr().out
    for line in ("resized to a half ", "cropped by 5%, left ", "precision "):
        rows = [row.removeprefix(line).split() for row in said.splitlines() if row.startswith(line)]
        assert [len(row) for row in rows if all(cell.endswith("%") for cell in row)] == [4, 4]
    assert "samples/s/core" in said


def lived(workdir: Path, lives: list[list[dict]], losses: list[float]) -> Path:
    """What lives of a run of one process leave, and its log."""
    for number, notes in enumerate(lives):
        (workdir / "rows" / str(number)).mkdir(parents=True)
        (workdir / "rows" / str(number) / "0.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes))
    log = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return workdir


def test_runs_are_compared_by_rows_and_losses_and_other_rows_are_seen(tmp_path: Path):
    notes = [{"step": step, "rows": [[[0, step], [0, step + 9]]]} for step in (1, 2, 3)]
    whole = lived(tmp_path / "whole", [notes], [4.0, 2.0, 1.0])
    parts = lived(tmp_path / "parts", [notes[:2], notes[1:]], [4.0, 2.001, 1.0])
    steps, rows, worst = elastic.compared(parts, whole)
    assert steps == "steps: 3 and 3, each with a loss: 3 and 3"
    assert rows == "rows and sample ids of every step: equal (6 samples in them)"
    assert worst.startswith("largest difference of a loss: 5.0e-04 of it")
    other = lived(tmp_path / "other", [[notes[0] | {"rows": [[[0, 7]]]}, *notes[1:]]], [4.0, 2.0, 1.0])
    assert "DIFFERENT" in elastic.compared(other, whole)[1]
    twice = lived(tmp_path / "twice", [notes, [notes[2] | {"rows": [[[0, 7]]]}]], [4.0, 2.0, 1.0])
    with pytest.raises(UserError, match="step 3 was taken twice, with other rows"):
        elastic.rows_by_step(twice)


def test_goodput_refuses_a_run_without_room_for_its_injuries(capsys: pytest.CaptureFixture):
    assert goodput.main(["--steps", "100"]) == 2
    assert "has no room for three injuries; take at least 400" in capsys.readouterr().err


def test_saves_writes_and_restores_a_state(tmp_path: Path, capsys: pytest.CaptureFixture):
    recipe = Path(__file__).parent / "toy_recipe.py"
    assert saves.main(["--config", str(recipe), "--state", "--folder", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(f"| {what} |" in out for what in ("a save, until it is complete", "reading its files", "restoring"))
    assert list(tmp_path.iterdir()) == []


def test_saves_prints_steps_with_and_without_saves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """With a step that computes nothing."""
    state = SimpleNamespace(params={"a": jnp.ones(2**18)}, optimizer={"m": jnp.ones(2)}, ema={})
    monkeypatch.setattr(saves, "initial_params", lambda *_: None)
    monkeypatch.setattr(saves, "initial_state", lambda *_: state)
    monkeypatch.setattr(saves, "make_train_step", lambda *_: lambda state, batch: (state, {}))
    recipe = Path(__file__).parent / "toy_recipe.py"
    assert saves.main(["--config", str(recipe), "--blocks", "2", "--config.checkpoint_every=2"]) == 0
    rows = dict(line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    assert rows["a save every"] == "2 steps, 1.0 MiB each"
    assert rows["blocks of each kind"] == "2 of 4 steps"
    assert rows["saves"].startswith("4, of which ")
    assert 0 <= float(rows["steps waited for a save"].split(" s")[0]) < 60
