"""What a sample costs on this machine, and what a plan makes of it."""

import dataclasses
import json
import re
import types
from pathlib import Path

import pytest
from made_sources import TOKENIZER, MadeSource, config, made

from navil_jax.config import Config
from navil_jax.data.features import fitting_features
from navil_jax.data.inspect.input_cost import STAGES, InputCost, SourceCost, check_same_images, measure, read_input_cost
from navil_jax.data.packing import SIZES
from navil_jax.data.pipeline import batch_spec
from navil_jax.data.run import OpenRun
from navil_jax.errors import UserError
from navil_jax.plan import input as host_input
from navil_jax.plan.cloud import CLOUDS
from navil_jax.plan.planner import Plan
from navil_jax.plan.topology import parse_topology


def cost(**changes: float) -> SourceCost:
    """10 ms of CPU and an image a sample."""
    seconds = dict(zip(STAGES, (0.001, 0.002, 0.001, 0.003, 0.001, 0.001, 0.001), strict=True))
    sizes = {"visual_tokens": 10.0, "text_tokens": 20.0, "patches": 40.0}
    found = SourceCost("a", 1.0, measured=50, usable=1.0, images=1.0, bytes=5000.0, **sizes, **seconds)
    return dataclasses.replace(found, **changes)


def test_all_stages_of_all_sources_are_measured(tmp_path: Path) -> None:
    settings = config(2)  # of weights 1 and 2
    broken = MadeSource(((80, 40, 5), (40, 0, 3), (0, 8, 20)))
    found = measure(OpenRun(settings, TOKENIZER, [broken, made(5)], False))
    first, second = found.sources
    assert (first.share, second.share) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert (first.measured, second.measured) == (3, 5)
    budgets = batch_spec(settings).budgets
    good = [fitting_features(broken[index], settings, TOKENIZER, budgets)[0] for index in (0, 2)]
    assert (first.usable, first.images) == (2 / 3, 1 / 3)
    for name in SIZES:
        assert getattr(first, name) == sum(len(features[name]) for features in good) / 3
    assert all(getattr(source, stage) > 0 for source in found.sources for stage in STAGES)
    found.write(tmp_path / "input.json")
    assert read_input_cost(tmp_path / "input.json") == found
    for said in ("images/s a core", "source0", "source1", "33.3%", "66.7%", "of this mixture"):
        assert said in found.text()


def test_virtual_cpus_are_those_of_the_page() -> None:
    page = (Path(__file__).parents[1] / "docs" / "tpu.md").read_text()
    head, _, row = page.partition("| host (chips) |")[2].splitlines()[:3]
    for cloud, machines, vcpus in zip(CLOUDS.values(), head.split("|"), row.split("|")[2:], strict=False):
        chips = re.findall(r"\d+", machines.partition("(")[2])
        assert cloud.vcpus == dict(zip(map(int, chips), map(int, vcpus.split(",")), strict=True))


def plan_of(settings: Config, topology: str, step: float) -> Plan:
    """A plan of 64 rows a step, each of 4 samples with 3 images."""
    statistics = types.SimpleNamespace(samples=4.0, images=3.0)
    timing = types.SimpleNamespace(step=step)
    return Plan(settings, parse_topology(topology), 64, None, statistics, timing, {}, None)  # type: ignore[arg-type]


def test_a_plan_says_what_each_host_needs() -> None:
    settings = config(patch_slots=400)
    found = host_input.host_input(plan_of(settings, "v5p-128", 0.5), None)
    assert (found.hosts, found.vcpus, found.cores, found.slowdown) == (16, 208, None, 1.0)
    assert (found.samples, found.images) == (64 / 16 * 4 / 0.5, 64 / 16 * 3 / 0.5)
    measured = InputCost("made", settings.images, 16, (cost(visual_tokens=1.0, text_tokens=1.0),))
    found = host_input.host_input(plan_of(settings, "v5p-128", 0.5), measured)
    samples = 64 / 16 / 0.5 * 0.95 * 400 / 40  # 76 a second
    assert (found.samples, found.cores) == (pytest.approx(samples), pytest.approx(samples * 0.010))
    assert (found.thread, found.bytes) == (pytest.approx(samples * 0.002), pytest.approx(samples * 5000))
    said = host_input.text(plan_of(settings, "v5p-128", 0.005), measured)
    for text in ("16 hosts needs 7,600 images/s", "measured 100 images/s a core: 76 of 208 vCPUs", "38.0 MB/s"):
        assert text in said
    assert "one thread of the trainer busy 1520% of the time" in said
    assert "WARNING: the input does not keep up, a step takes 0.076 s and not 0.005 s" in said
    assert "set config.data.workers=76, which is 0" in said
    assert "WARNING" not in host_input.text(plan_of(settings, "v5p-128", 0.5), measured)
    assert "data doctor" in host_input.text(plan_of(settings, "v5p-128", 0.5), None)
    assert host_input.cell(plan_of(settings, "v6e-8", 0.001), measured) == "6,080 of 180, too slow"
    assert json.loads(json.dumps(host_input.figures(plan_of(settings, "v5e-16", 0.5), measured)))["vcpus"] == 112


def test_the_mixture_is_the_mean_of_its_sources() -> None:
    settings = config()
    half_bad = cost(share=0.5, usable=0.5, images=0.5)
    found = InputCost("made", settings.images, 16, (cost(share=0.5), half_bad))
    assert found.core == pytest.approx(0.010 / 0.75)  # what is bad takes its time, too
    assert found.mean("images") == pytest.approx(1.0)
    assert found.samples_of_row(settings) == pytest.approx(0.95 / (40 / 0.75 / settings.data.patch_slots))


def test_other_files_and_other_images_are_refused(tmp_path: Path) -> None:
    path, settings = tmp_path / "input.json", config()
    found = InputCost("made", settings.images, 14, (cost(),))
    with pytest.raises(UserError, match=r"patch_size 14, and the recipe has 16; call data doctor"):
        check_same_images(found, settings, path)
    smaller = dataclasses.replace(found, patch_size=16, images=dataclasses.replace(settings.images, max_patches=8))
    with pytest.raises(UserError, match="max_patches 8, and the recipe has 24"):
        check_same_images(smaller, settings, path)
    with pytest.raises(UserError, match=r"input.json: cannot be read \(No such file"):
        read_input_cost(path)
    for text, said in (("{", "is no JSON"), ("[]", "is not InputCost"), ('{"a": 1}', "a: no such key")):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            read_input_cost(path)
    dataclasses.replace(found, sources=(cost(usable=0.0),)).write(path)
    assert "-" in dataclasses.replace(found, sources=(cost(usable=0.0),)).text()
    with pytest.raises(UserError, match="none of its samples can be used"):
        read_input_cost(path)
    assert json.loads(path.read_text())["sources"][0]["name"] == "a"
