"""The study command: the published points, plans with recipes that load, extrapolation, and users' mistakes."""

import dataclasses
import json
import math
import re
import types
from pathlib import Path

import numpy as np
import pytest
from check_html import check_page
from hypothesis import given, settings
from hypothesis import strategies as st

from navil_jax.config import stages
from navil_jax.config.flags import load_config, parse
from navil_jax.config.plain import differences
from navil_jax.model import params as model_params
from navil_jax.study import pod_plan
from navil_jax.study.__main__ import main
from navil_jax.study.analysis import analyse
from navil_jax.study.extrapolation import project
from navil_jax.study.findings import findings
from navil_jax.study.known_llms import KNOWN
from navil_jax.study.planner import advise, effective_samples, encoder_shape, repeating
from navil_jax.study.results import PUBLISHED, Row, parse_size, read_results, size, write_results
from navil_jax.train.optimizer import parameter_settings

CONFIGS = Path(__file__).parents[1] / "configs"


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_published_points_give_the_paper_line(capsys, tmp_path):
    status, out, _ = run(capsys, "fit", "--out", tmp_path / "fit.json")
    assert status == 0
    found = re.search(r"V\* = (\d+)M \(L / 1\.8B\)\^(0\.\d+)", out)
    assert float(found[1]) == pytest.approx(600, rel=0.05)
    assert float(found[2]) == pytest.approx(0.525, abs=0.01)
    laws = json.loads((tmp_path / "fit.json").read_text())
    line = next(law for law in laws if law["law"].startswith("log-log line"))
    assert line["values"]["exponent"]["low"] < 0.525 < line["values"]["exponent"]["high"]
    llm = next(law for law in laws if law["law"] == "loss is linear in log(LLM size)")
    assert llm["values"]["loss per doubling of the LLM"]["high"] < 0
    encoder = [law for law in laws if law["law"] == "loss saturates with encoder size"]
    assert all("too few data: 1 different sizes" in law["note"] for law in encoder)  # the paper gives optima alone


def test_published_rows_name_their_source():
    rows = read_results(PUBLISHED)
    assert all("arXiv 2510.08565" in row.source for row in rows)
    assert all(row.error == 0.01 for row in rows if row.kind == "loss")
    assert {(row.llm, row.encoder) for row in rows if row.kind == "optimal_encoder"} == {
        (5e8, 3e8),
        (1.8e9, 6e8),
        (7e9, 1.2e9),
    }


def test_figures_and_one_page(capsys, tmp_path):
    status, out, _ = run(capsys, "plot", "--out", tmp_path / "figures")
    assert status == 0
    drawn = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert {"loss_data.png", "loss_llm.png", "optimal_encoder.png"} == drawn
    assert "Depth against width: not drawn, needs at least three shapes" in out
    status, _, _ = run(capsys, "report", "--out", tmp_path / "r.html", "--markdown", tmp_path / "r.md")
    assert status == 0
    page = (tmp_path / "r.html").read_text()
    assert page.count("data:image/png;base64,") == 6  # light and dark
    check_page(page)
    assert "held-out loss against samples seen of" in page
    assert "| (3) Only extreme depth or width hurts. | - | no data |" in (tmp_path / "r.md").read_text()


def test_the_documented_verdicts_are_those_of_the_documented_runs():
    docs = Path(__file__).parents[1] / "docs"
    written = re.findall(r"^\| \((\d)\) .* \| ([a-z ]+) \|$", (docs / "study.md").read_text(), flags=re.MULTILINE)
    found = findings(analyse(read_results(docs / "study" / "small.jsonl")))
    assert written == [(str(finding.number), finding.verdict) for finding in found]


@pytest.mark.parametrize(("llm", "shape"), [("1.8B", (24, 1472, 23, 5888)), ("7B", (32, 1792, 28, 7168))])
def test_the_plan_advises_the_encoders_of_the_paper(capsys, llm, shape):
    status, out, _ = run(capsys, "plan", "--llm", llm, "--samples", "500M", "--have", "500M")
    assert status == 0
    depth, width, heads, mlp = shape
    assert f"depth {depth}, width {width}, {heads} heads of 64, MLP {mlp}" in out
    assert "EXTRAPOLATED" not in out
    assert "no sample is seen twice" in out
    assert re.search(r"expected loss 0\.\d+ \(0\.\d+ to [01]\.\d+\)", out)


def test_a_plan_outside_the_measured_sizes_says_so(capsys):
    _, out, _ = run(capsys, "plan", "--llm", "70B", "--samples", "600M")
    assert "EXTRAPOLATED: the LLM is 10 times above the largest measured" in out
    assert "the LLM is extrapolated" in out


@pytest.mark.parametrize(("llm", "samples", "loss"), [(1.8e9, 116e6, 0.796), (7e9, 14.7e6, 1.24), (5e8, 58e6, 1.31)])
def test_the_expected_loss_is_the_measured_one_where_there_is_one(llm, samples, loss):
    analysis = analyse(read_results(PUBLISHED))
    advice = advise(analysis, llm, samples, have=None, image=(640, 480), words=100)
    assert advice.loss.value == pytest.approx(loss, abs=1e-6)
    assert advice.loss.low < loss < advice.loss.high
    assert advice.loss.high - advice.loss.low < 0.04
    further = advise(analysis, llm, 600e6, None, (640, 480), 100)
    assert further.loss.value < 0.8 * loss
    assert "samples are extrapolated" in " ".join(further.loss_notes)


def test_stages_are_those_of_the_paper_at_its_size(capsys):
    _, out, _ = run(capsys, "plan", "--llm", "1.8B", "--samples", "741.58M", "--have", "20M")
    for line in (
        "  S1.1      490M  70,000 x 7,000",
        "  S1.2      185M  40,000 x 4,614",
        "  S2         67M  30,000 x 2,234",
    ):
        assert line in out
    assert "S1.1: 24 epochs; shrink" in out
    assert "S2: 3.4 epochs; repeat" in out


@pytest.mark.parametrize("llm", ["1.8B", "8B"])
def test_recipes_of_a_plan_load_and_start_where_the_one_before_ends(capsys, tmp_path, llm):
    status, out, _ = run(capsys, "plan", "--llm", llm, "--samples", "500M", "--out", tmp_path / "my.py")
    assert status == 0, out
    before = "runs/my_init"
    for name, trained in (("my.py", False), ("my_s1_2.py", False), ("my_s2.py", True)):
        config, _ = parse(["--config", str(tmp_path / name)], "Trains.")
        assert config.init_from == before
        before = config.workdir
        assert config.model.vision.head_dim == 64
        if llm != "1.8B":
            continue
        settings = parameter_settings(config.optimizer, model_params.shapes(config.model))
        assert settings["decoder/layers/ffn/text/up/kernel"].trainable == trained
        assert settings["decoder/layers/qkv/text/q/kernel"].trainable == (name != "my.py")
        assert settings["decoder/layers/ffn/visual/up/kernel"].trainable
        assert not settings["vision/layers/norm1/scale"].weight_decay
    status, _, err = run(capsys, "plan", "--llm", llm, "--samples", "500M", "--out", tmp_path / "my.py")
    assert status == 2
    assert "exists; give another name or remove it" in err


@pytest.mark.parametrize(
    ("llm", "samples", "model", "lengths"),
    [("1.8B", "741.58M", "navil_2b", stages.NAVIL_2B), ("8B", "595.256M", "navil_9b", stages.NAVIL_9B)],
)
def test_recipes_of_a_plan_and_of_the_paper_are_one_definition(capsys, tmp_path, llm, samples, model, lengths):
    """At the paper's size they differ in the names of folders, and in how the samples at hand fill a row."""
    status, out, _ = run(capsys, "plan", "--llm", llm, "--samples", samples, "--out", tmp_path / "my.py")
    assert status == 0, out
    free = ("workdir", "init_from", "data.sources.0.path", "data.rows", "data.visual_slots", "data.text_slots")
    free += ("data.patch_slots", "model.vision")  # the plan's encoder for 8B is a head wider than the paper's
    for stage, length in lengths.items():
        written = load_config(tmp_path / ("my.py" if stage is stages.S1_1 else f"my_{stage.key}.py"))
        shipped = load_config(CONFIGS / f"{model}_{stage.key}.py")
        own = dataclasses.replace(length, rows=written.data.rows, visual_slots=written.data.visual_slots)
        base = load_config(CONFIGS / f"{model}.py")
        assert shipped == stage.config(base, model, length)
        assert written == stage.config(dataclasses.replace(base, model=written.model), "my", own)
        assert [key for key in differences(written, shipped) if not key.startswith(free)] == []


def test_a_topology_adds_days_and_chip_hours(capsys, monkeypatch):
    asked = []

    def made(config, place, statistics, rows=None, effort="full", search=True):
        asked.append((config.workdir, config.data.rows, rows if effort == "full" else effort, statistics))
        fits = rows == 0 or "s1_1" not in config.workdir
        days = {"runs/planned_s1_1": 10.0, "runs/planned_s1_2": 5.0, "runs/planned_s2": 2.5}[config.workdir]
        figures = {"days": days, "chip_hours": days * 24 * place.chips, "samples_per_second": 500.0, "mfu": 0.4}
        return types.SimpleNamespace(fits=fits, timing=fits or None, rows=128, **figures)

    monkeypatch.setattr(pod_plan, "make_plan", made)
    monkeypatch.setattr(pod_plan, "simulate", lambda config, mixture: mixture)
    status, out, _ = run(capsys, "plan", "--llm", "1.8B", "--samples", "742M", "--topology", "v5p-128")
    assert status == 0
    assert "S1.1: 10.0 days, 15,360 chip-hours; 128 rows a step, 500 samples/s, 40% of the peak" in out
    assert "together 17.5 days, 26,880 chip-hours" in out
    assert [entry[2] for entry in asked] == ["fast", 0, "fast", None, "fast", None]
    assert [entry[0][-4:] for entry in asked[::2]] == ["s1_1", "s1_2", "d_s2"]
    assert all(rows % 64 == 0 for _, rows, _, _ in asked)  # as many as there are chips
    assert [entry[3] for entry in asked[::2]] == ["captions", "captions", "instructions"]
    status, _, err = run(capsys, "plan", "--llm", "1.8B", "--samples", "742M", "--topology", "v5x-1")
    assert status == 2
    assert "v5x-1" in err


def test_known_language_models_have_about_their_size():
    for llm in KNOWN:
        d = llm.decoder
        attention = d.width * d.head_dim * (2 * d.num_heads + 2 * d.num_kv_heads)
        total = d.depth * (attention + 3 * d.width * d.mlp_dim) + d.vocab_size * d.width * (
            1 if d.tie_embeddings else 2
        )
        assert total == pytest.approx(llm.parameters, rel=0.12), llm.name


@settings(max_examples=30, deadline=None)
@given(parameters=st.floats(2e6, 2e10))
def test_an_encoder_of_any_size_has_whole_heads(parameters):
    shape = encoder_shape(parameters)
    assert shape.width == 64 * shape.heads
    assert shape.parameters == pytest.approx(parameters, rel=0.25)


@settings(max_examples=30, deadline=None)
@given(samples=st.floats(1, 1e9), have=st.floats(1, 1e9))
def test_repeated_samples_are_never_worth_more_than_new_ones(samples, have):
    worth = effective_samples(samples, have)
    assert min(samples, have) <= worth * (1 + 1e-9)
    assert worth <= samples * (1 + 1e-9)


def test_when_to_repeat_and_when_to_shrink():
    assert repeating(0.5) == "no sample is seen twice"
    assert repeating(3).startswith("repeat")
    assert "or shrink to 4 epochs" in repeating(10)
    assert repeating(40).startswith("shrink")


@given(st.floats(1, 9.99e12))
def test_sizes_are_read_as_they_are_written(parameters):
    assert parse_size(size(parameters), "--llm") == pytest.approx(parameters, rel=0.006)


def made_log(folder, steps, exponent=0.4, noise=0.02, floor=0.5):
    folder.mkdir()
    n = np.arange(1, steps + 1)
    losses = floor + 3 * n**-exponent + noise * np.random.default_rng(0).standard_normal(steps)
    lines = (
        {"step": int(step), "loss": float(loss), "learning_rate": 1e-3} for step, loss in zip(n, losses, strict=True)
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return losses


@pytest.mark.parametrize("exponent", [0.3, 0.6])
def test_a_noisy_curve_is_carried_on(exponent):
    held, n = 0, np.arange(1, 2001)
    for seed in range(8):
        losses = 0.5 + 3 * n**-exponent + 0.05 * np.random.default_rng(seed).standard_normal(2000)
        found = project(n, losses, 8000)
        draws = found.law.loss(8000)[1:]
        low, high = np.quantile(draws, [0.025, 0.975])
        held += low <= 0.5 + 3 * 8000**-exponent <= high
    assert held >= 6


def test_extrapolate_says_whether_going_on_pays(capsys, tmp_path):
    made_log(tmp_path / "early", 300)
    status, out, _ = run(capsys, "extrapolate", tmp_path / "early")
    assert status == 0
    assert "going on is likely to pay" in out
    assert (tmp_path / "early" / "extrapolation.png").stat().st_size > 10_000
    made_log(tmp_path / "late", 4000, exponent=1.0)
    _, out, _ = run(capsys, "extrapolate", tmp_path / "late", "--to", "100K")
    assert "going on is unlikely to pay" in out
    assert "at step 100,000:" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fit", "none.jsonl"), "none.jsonl: no such results file"),
        (("plan", "--llm", "1.8X", "--samples", "5M"), "--llm: '1.8X' is no positive size"),
        (("plan", "--llm", "5", "--samples", "5M"), "--llm: 5 parameters; write the size as 1.8B"),
        (("plan", "--llm", "1B", "--samples", "-5"), "--samples: '-5' is no positive size"),
        (("plan", "--llm", "1B", "--samples", "5M", "--image", "big"), "--image: 'big' is not a size"),
        (("plan", "--llm", "100B", "--samples", "5M", "--out", "x.py"), "no language model of about this size"),
        (("plan", "--llm", "8B", "--samples", "5M", "--out", "x.json"), "--out: x.json: a recipe is a Python file"),
        (("extrapolate", "nowhere"), "nowhere/metrics.jsonl: no log of a run"),
        (("run", "--config", "none.py"), "none.py: no such study file"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    if "--samples" in arguments and "-5" in arguments:
        arguments = ("plan", "--llm", "1B", "--samples=-5")
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "r.jsonl:2: not JSON"),
        ("[]", "r.jsonl:2: not an object"),
        ('{"llm": 1e9, "los": 1}', "r.jsonl:2: no field 'los'"),
        ('{"llm": 1e9, "samples": 5}', "r.jsonl:2: loss: must be a positive number, not None"),
        ('{"llm": 1e9, "samples": 5, "loss": -1}', "r.jsonl:2: loss: must be a positive number, not -1"),
        ('{"kind": "best", "llm": 1e9}', "r.jsonl:2: kind: 'best' is neither"),
    ],
)
def test_a_bad_line_of_results_is_named(capsys, tmp_path, line, message):
    path = tmp_path / "r.jsonl"
    path.write_text('{"llm": 1e9, "samples": 5, "loss": 1}\n' + line + "\n")
    status, _, err = run(capsys, "fit", path)
    assert status == 2
    assert message in err


def test_results_come_back_as_they_were_written(tmp_path):
    own = Row(1e6, samples=3, loss=2.0, losses={"a": 2.0}, seed=4, initialised=False)
    rows = [*read_results(PUBLISHED), own]
    write_results(tmp_path / "r.jsonl", rows)
    assert read_results(tmp_path / "r.jsonl") == rows
    assert math.isclose(rows[-1].loss, 2.0)


def test_pilot_runs_without_optima_cannot_plan(capsys, tmp_path):
    write_results(tmp_path / "r.jsonl", [Row(1e6, samples=3, loss=2.0)])
    status, _, err = run(capsys, "plan", "--llm", "1B", "--samples", "5M", "--results", tmp_path / "r.jsonl")
    assert status == 2
    assert "the results do not say which encoder is optimal" in err


def test_too_short_a_run_is_not_extrapolated(capsys, tmp_path):
    made_log(tmp_path / "run", 5)
    status, _, err = run(capsys, "extrapolate", tmp_path / "run")
    assert status == 2
    assert "too few data for a law: 5 points" in err
    status, _, err = run(capsys, "extrapolate", tmp_path / "run", "--metric", "eval/x/loss")
    assert status == 2
    assert "no 'eval/x/loss' in" in err
