"""The planner: what rows hold, what fits, what is printed, and a real plan of a tiny model."""

import dataclasses
import importlib.util
import json
import shlex
from pathlib import Path

import numpy as np
import plan_golden
import pytest
from matplotlib.figure import Figure
from plan_recipe import get_config

from navil_jax.config import AxisRule, Config, MeshConfig
from navil_jax.config.flags import parse
from navil_jax.data.pipeline import batch_spec
from navil_jax.errors import UserError
from navil_jax.generate.programs import Programs
from navil_jax.model import params as model_params
from navil_jax.model.flops import total
from navil_jax.plan import __main__ as command
from navil_jax.plan import compile as compiling
from navil_jax.plan import planner, report
from navil_jax.plan.compile import Compiled
from navil_jax.plan.hlo import Collective, Loop, Program
from navil_jax.plan.planner import as_json, batch_shards, largest_rows, make_plan
from navil_jax.plan.statistics import MIXTURES, simulate
from navil_jax.plan.topology import GIB, parse_topology

RECIPE = str(Path(__file__).parent / "plan_recipe.py")
NO_LIBTPU = importlib.util.find_spec("libtpu") is None


@pytest.mark.parametrize("mixture", list(MIXTURES))
def test_simulated_rows_keep_their_budgets(mixture: str):
    config = get_config()
    found = simulate(config, mixture, rows=8)
    data, counts = config.data, found.counts
    assert all(0 < share <= 1 for share in found.fill.values())
    assert counts.visual_tokens <= data.visual_slots
    assert counts.patches <= data.patch_slots
    assert len(found.token_lengths) == len(found.patch_lengths) == 8
    assert all(sum(row) <= data.visual_slots + data.text_slots for row in found.token_lengths)
    pairs = np.mean([sum(n * (n + 1) / 2 for n in row) for row in found.token_lengths])
    assert counts.token_pairs == pytest.approx(pairs)
    assert counts.patch_pairs == pytest.approx(np.mean([sum(n * n for n in row) for row in found.patch_lengths]))
    assert counts.window_pairs <= counts.patch_pairs
    assert counts.targets <= counts.text_tokens
    again = simulate(config, mixture, rows=8)
    assert again == found


def test_rows_of_a_text_model():
    config = get_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vision=None))
    found = simulate(config, rows=4)
    assert found.counts.patches == found.counts.visual_tokens == 0
    assert found.fill["text"] > 0.5


def compiled(rows: int, need: float) -> Compiled:
    """As the compiler would answer, where a program needs so many bytes."""
    gather = Collective("all-gather", 1e8, (0, 1, 2, 3), True, "decoder FeedForward")
    body = Loop("body", 24, {"decoder FeedForward": 1e6, "vision VisionLayer backward": 2e6}, (gather,), ())
    sizes = {"argument": need / 2, "output": 0.0, "alias": 0.0, "temp": need / 2, "generated_code": 0.0, "host_temp": 0}
    fits = need <= parse_topology("v5e-8").generation.hbm
    return Compiled(
        device_kind="TPU v5 lite",
        mesh={"data": 1, "fsdp": 8, "tensor": 1, "context": 1},
        devices=[[x, y, 0, 0, 0] for x in range(2) for y in range(4)],
        state={"batch": 1e6 * rows, "trained parameters": need / 4},
        memory=sizes if fits else None,
        exhausted=None if fits else need,
        refusal="" if fits else "Ran out of memory",
        program=Program((body,)) if fits else None,
        seconds=1.0,
        host_bytes=GIB,
        effort="full",
    )


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A compiler for which a program needs 2 GiB and 1.5 GiB for each row of a device; gives the rows asked for."""
    asked = []

    def compile_for(config: Config, place: object, rows: int, *_: object, **__: object) -> Compiled:
        asked.append(rows)
        return compiled(rows, (2 + 1.5 * rows / 8) * GIB)

    monkeypatch.setattr(planner, "compile_for", compile_for)
    return asked


def test_the_largest_batch_is_found_in_few_compilations(linear: list[int]):
    assert largest_rows(get_config(), parse_topology("v5e-8"), 8) == 9 * 8  # 2 + 1.5 x 9 = 15.5 of 15.75 GiB
    assert len(linear) <= 4


@pytest.mark.parametrize("curve", [lambda n: 17.0, lambda n: 10 + 3 * n, lambda n: 14 + 0.01 * n, lambda n: 2 + n**1.5])
def test_any_curve_of_memory(monkeypatch: pytest.MonkeyPatch, curve):
    monkeypatch.setattr(planner, "compile_for", lambda config, place, rows, **_: compiled(rows, curve(rows / 8) * GIB))
    expected = max((n for n in range(1, planner.MOST_ROWS + 1) if curve(n) <= 15.75), default=0)
    assert largest_rows(get_config(), parse_topology("v5e-8"), 8) == 8 * expected


def test_figures_of_a_plan(linear: list[int]):
    config, place = dataclasses.replace(get_config(), batch_samples=50), parse_topology("v5e-8")
    found = make_plan(config, place, simulate(config, rows=4), rows=16)
    step = 24 * 3e6 / 1.5e9
    assert found.timing.step == pytest.approx(step)  # the gather is hidden
    assert found.mfu == pytest.approx(total(found.useful) / (step * 8 * 197e12))
    counts = found.statistics.counts
    assert found.tokens_per_second == pytest.approx(16 * (counts.visual_tokens + counts.text_tokens) / step)
    assert found.samples == 100 * 50
    assert found.days == pytest.approx(5000 / (16 * found.statistics.samples / step) / 86400)
    assert found.chip_hours == pytest.approx(found.days * 24 * 8)
    assert found.largest_rows == 72
    text = report.text(found)
    for said in ("v5e-8: 2 x 4 chips", "FITS", "5.00 of 15.75 GiB", "72 rows, 9 for each", "0.048 s modelled", "MFU"):
        assert said in text
    assert "decoder FeedForward" in text
    assert json.loads(json.dumps(as_json(found)))["step_seconds"] == pytest.approx(step)


def test_what_does_not_fit_says_what_helps(linear: list[int]):
    config, place = get_config(), parse_topology("v5e-8")
    found = make_plan(config, place, simulate(config, rows=4), rows=80)
    text = report.text(found)
    assert not found.fits
    assert "DOES NOT FIT" in text
    assert "1.25 GiB too much" in text
    assert "--batch 72 fits" in text
    assert report.row(found)["MFU"] == "does not fit"


def test_the_image_says_what_does_not_fit_and_what_helps(linear: list[int], tmp_path: Path, monkeypatch):
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    config, place = get_config(), parse_topology("v5e-8")
    plans = [make_plan(config, place, simulate(config, rows=4), rows=rows) for rows in (16, 80)]
    for some in (plans, plans[:1], plans[1:]):
        report.draw(tmp_path / "plan.png", some)
        texts = [text.get_text() for axis in drawn[-1].axes for text in axis.texts]
        assert any("of 15.8 GiB" in text for text in texts)
        assert all(axis.get_xlim()[0] == 0 for axis in drawn[-1].axes)
    assert any("1.25 GiB too much" in text and "--batch 72" in text for text in texts)


def test_a_program_that_the_compiler_lets_pass_may_still_be_too_large(monkeypatch: pytest.MonkeyPatch):
    passed = dataclasses.replace(compiled(8, 10 * GIB), memory=compiled(8, 10 * GIB).memory | {"temp": 15 * GIB})
    monkeypatch.setattr(planner, "compile_for", lambda *_, **__: passed)
    config = get_config()
    found = make_plan(config, parse_topology("v5e-8"), simulate(config, rows=4), rows=8, search=False)
    assert (found.fits, found.timing) == (False, None)
    assert "4.25 GiB too much" in report.text(found)
    assert report.row(found)["MFU"] == "does not fit"


def test_another_memory_may_be_exhausted(monkeypatch: pytest.MonkeyPatch):
    refused = dataclasses.replace(compiled(8, 100 * GIB), exhausted=None, refusal="Used 1.25M of 1.00M smem")
    monkeypatch.setattr(planner, "compile_for", lambda *_, **__: refused)
    config = get_config()
    found = make_plan(config, parse_topology("v5e-8"), simulate(config, rows=4))
    assert (found.fits, found.largest_rows) == (False, 0)
    assert "the compiler refuses it: Used 1.25M of 1.00M smem" in report.text(found)
    assert as_json(found)["hbm_bytes"] is None


def test_the_most_that_fit_can_be_asked_for(linear: list[int]):
    config = get_config()
    assert make_plan(config, parse_topology("v5e-8"), simulate(config, rows=4), rows=0).rows == 72


def test_inference_is_lowered_without_parameters(linear: list[int]):
    config, place = get_config(), parse_topology("v5e-8")
    lowered = Programs(config.model, None).lower(batch_spec(config), 512)
    logits, cache = lowered["decode"].out_info
    assert logits.shape == (8, 2012)
    assert cache.keys.shape == (2, 8, 2, 1536, 128)  # 1,024 slots and room for 512 more
    prefill, decode = planner.plan_inference(config, place, simulate(config, rows=2))
    assert (prefill.rows, decode.rows, decode.task) == (8, 8, "decode")
    lines = report.inference_text([prefill, decode], place).splitlines()
    assert lines[0] == "prefill of 8 rows (prompts as long as a row): 3.50 of 15.75 GiB, 48.0 ms modelled"
    assert lines[1].startswith("decode of 8 rows (a token for each)")


def test_rows_must_divide(linear: list[int]):
    config = get_config()
    with pytest.raises(UserError, match=r"--batch: 12 rows do not divide by the 8 groups .* take 8 or 16"):
        make_plan(config, parse_topology("v5e-8"), simulate(config, rows=4), rows=12)


def test_meshes():
    mesh = command.parse_mesh("fsdp=-1,tensor=2", Config().mesh)
    assert (mesh.data, mesh.fsdp, mesh.tensor) == (1, -1, 2)
    assert batch_shards(mesh, parse_topology("v5p-128")) == 32
    with pytest.raises(UserError, match="--mesh: 'fdsp=2' is no AXIS=SIZE; axes are data, fsdp, tensor, context"):
        command.parse_mesh("fdsp=2", Config().mesh)
    assert batch_shards(command.parse_mesh("data=2", Config().mesh), parse_topology("2xv5e-16")) == 32
    with pytest.raises(UserError, match="--mesh: data=1 does not divide by 2 slices; take data=2"):
        batch_shards(Config().mesh, parse_topology("2xv5e-16"))
    with pytest.raises(UserError, match=r"--mesh: .*tensor=3.* does not make the 64 devices of v5p-128"):
        batch_shards(command.parse_mesh("tensor=3", Config().mesh), parse_topology("v5p-128"))


def test_rules_of_the_mesh_say_who_has_rows_of_their_own():
    place, rules = parse_topology("v5e-8"), (AxisRule("batch", ("data",)),)
    assert batch_shards(MeshConfig(data=2, rules=rules), place) == 2
    assert batch_shards(MeshConfig(data=2), place) == 8
    with pytest.raises(UserError, match="no mesh axis dat;"):
        batch_shards(MeshConfig(rules=(AxisRule("batch", ("dat",)),)), place)


def test_a_sweep_makes_a_table_and_an_image(linear: list[int], tmp_path: Path, capsys: pytest.CaptureFixture):
    files = {name: str(tmp_path / name) for name in ("plans.png", "plans.json")}
    arguments = ["--config", RECIPE, "--sweep", "v5e-8,v5e-4", "--mesh", "fsdp=-1", "--batch", "80", "--no-search"]
    assert command.main([*arguments, "--png", files["plans.png"], "--json", files["plans.json"]]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(" | ")[0].strip("| ") == "topology"
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["v5e-8", "v5e-4"]
    assert "does not fit" in lines[2]
    assert Path(files["plans.png"]).stat().st_size > 1000
    assert [plan["topology"] for plan in json.loads(Path(files["plans.json"]).read_text())] == ["v5e-8", "v5e-4"]


def test_the_resolved_table_of_shardings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)  # it needs no compiler
    arguments = ["--config", RECIPE, "--topology", "v5e-8", "--mesh", "fsdp=4,tensor=2", "--shardings"]
    assert command.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {words[1]: words[2:-1] for line in lines if len(words := [cell.strip() for cell in line.split("|")]) > 3}
    assert cells["batch"] == ["data x fsdp"]
    up = "decoder/layers/ffn/visual/up/kernel"
    assert cells[up] == ["2 x 512 x 1,024", "fsdp 4, tensor 2", "2 x 128 x 512", "0.50", "yes"]
    names = {name for name in cells if "/" in name}
    assert names == set(model_params.flatten(model_params.shapes(get_config().model)))
    assert lines[-1].startswith("Each device holds: trained 0.0")
    assert command.main([*arguments[:5], "tensor=16", "--shardings"]) == 2
    assert "does not make the 8 devices" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--topology: which slice?"),
        (["--topology", "v5p-130"], "the nearest one is v5p-128"),
        (["--topology", "v5e-8", "--mesh", "tensor=3"], "does not make the 8 devices of v5e-8"),
        (["--topology", "v5e-8", "--batch", "9"], "--batch: 9 rows do not divide"),
        (["--topology", "v5e-8", "--input", "no.json"], "no.json: cannot be read (No such file or directory); give"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture):
    assert command.main(["--config", RECIPE, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_commands_of_the_page_are_understood(monkeypatch: pytest.MonkeyPatch):
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    lines = (root / "docs" / "tpu.md").read_text().splitlines()
    commands = [
        shlex.split(line, comments=True) for line in lines if line.startswith(".venv/bin/python -m navil_jax.plan ")
    ]
    assert len(commands) >= 4
    for words in commands:
        config, options = parse(words[3:], command.ABOUT, command.add_options)
        for name in (options.sweep or options.topology).split(","):
            place = parse_topology(name)
            for text in options.mesh:
                assert batch_shards(command.parse_mesh(text, config.mesh), place) > 0


def test_without_the_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    assert command.main(["--config", RECIPE, "--topology", "v5e-8"]) == 2
    assert f"pip install '{compiling.LIBTPU}'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(NO_LIBTPU, reason="libtpu, the TPU compiler, is not installed")
@pytest.mark.parametrize("name", plan_golden.QUICK)
def test_memory_is_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Regenerate after a change that is meant: python tests/plan_golden.py"""
    monkeypatch.setenv("NAVIL_PLAN_CACHE", str(tmp_path))
    found, expected = plan_golden.figures(name), plan_golden.read()[name]
    assert found.keys() == expected.keys()
    for category, size in expected.items():
        tolerance = plan_golden.TOLERANCE if category in ("temporaries", "program") else 1e-6
        assert found[category] == pytest.approx(size, rel=tolerance), category
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(compiling.subprocess, "run", None)
    assert plan_golden.figures(name) == found  # from what is remembered
