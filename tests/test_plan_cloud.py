"""Google Cloud's names for the planner's slices, and the compiler's flags by generation."""

import dataclasses
import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest
from plan_recipe import get_config

from navil_jax.errors import UserError
from navil_jax.plan import __main__ as command
from navil_jax.plan import compile as compiling
from navil_jax.plan import planner
from navil_jax.plan.cloud import (
    CLOUDS,
    check_slice,
    check_zone,
    cloud_of,
    hosts_per_slice,
    libtpu_init_args,
    shape_text,
)
from navil_jax.plan.topology import GENERATIONS, Slice, parse_topology, slice_shapes

ANSWER = dict.fromkeys(field.name for field in dataclasses.fields(compiling.Compiled) if field.name != "effort")
RECIPE = str(Path(__file__).parent / "plan_recipe.py")
NO_LIBTPU = importlib.util.find_spec("libtpu") is None
# Names of slices, and their shapes and machines in xpk 1.16.0.
XPK = {
    "v4-8": ("2x2x1", 1, "ct4p-hightpu-4t"),
    "v4-512": ("4x8x8", 64, "ct4p-hightpu-4t"),
    "v5litepod-8": ("2x4", 2, "ct5lp-hightpu-4t"),
    "v5litepod-16": ("4x4", 4, "ct5lp-hightpu-4t"),
    "v5litepod-256": ("16x16", 64, "ct5lp-hightpu-4t"),
    "v5p-8": ("2x2x1", 1, "ct5p-hightpu-4t"),
    "v5p-128": ("4x4x4", 16, "ct5p-hightpu-4t"),
    "v5p-384": ("4x4x12", 48, "ct5p-hightpu-4t"),
    "v5p-768": ("4x8x12", 96, "ct5p-hightpu-4t"),
    "v5p-1536": ("8x8x12", 192, "ct5p-hightpu-4t"),
    "v5p-4096": ("8x16x16", 512, "ct5p-hightpu-4t"),
    "v6e-1": ("1x1", 1, "ct6e-standard-1t"),
    "v6e-4": ("2x2", 1, "ct6e-standard-4t"),
    "v6e-8": ("2x4", 2, "ct6e-standard-4t"),
    "v6e-256": ("16x16", 64, "ct6e-standard-4t"),
    "tpu7x-2": ("1x1x1", 1, "tpu7x-standard-1t"),
    "tpu7x-128": ("4x4x4", 16, "tpu7x-standard-4t"),
    "tpu7x-2048": ("8x8x16", 256, "tpu7x-standard-4t"),
}


@pytest.mark.parametrize("name", XPK)
def test_slices_are_those_of_xpk(name: str):
    place = parse_topology(name)
    check_slice(place)
    cloud = cloud_of(place.generation)
    assert cloud.type_name(place) == name
    assert (shape_text(place), hosts_per_slice(place), cloud.machine_type(place)) == XPK[name]


def test_every_slice_of_xpk_has_the_same_shape_here():
    """Or is named by its shape, or is refused; against the package itself where it is installed."""
    names = pytest.importorskip("xpk.core.system_characteristics").UserFacingNameToSystemCharacteristics
    known = 0
    for generation in GENERATIONS:
        for shape in slice_shapes(generation):
            place = Slice(generation, shape)
            try:
                check_slice(place)
            except UserError:
                continue
            name = cloud_of(generation).type_name(place)
            if name in names:
                known += 1
                assert (names[name].topology, names[name].vms_per_slice) == (shape_text(place), hosts_per_slice(place))
    assert known > 200


@pytest.mark.parametrize(
    ("name", "called"), [("v5p:4x4x16", "v5p-4x4x16"), ("v4-768", "v4-4x8x12"), ("2xv5e-256", "v5litepod-256")]
)
def test_another_shape_than_the_usual_one_is_in_the_name(name: str, called: str):
    place = parse_topology(name)
    assert cloud_of(place.generation).type_name(place) == called


def test_every_generation_is_in_the_table():
    assert list(CLOUDS) == [generation.name for generation in GENERATIONS]
    for cloud in CLOUDS.values():
        assert cloud.zones and (cloud.runtime or cloud.image)


@pytest.mark.parametrize("name", ["v5e-4", "v5e-1", "v5p-2", "v4-2", "v4-12288"])
def test_slices_that_one_can_plan_for_and_not_rent(name: str):
    with pytest.raises(UserError, match=f"^{name}: Google Cloud has no such slice, they go from "):
        check_slice(parse_topology(name))


def test_zones():
    v5p = parse_topology("v5p-8").generation
    check_zone(v5p, "us-east5-a")
    with pytest.raises(UserError, match=r"^us-west4-a has v5e, and v5p is in us-central1-a, "):
        check_zone(v5p, "us-west4-a")
    with pytest.raises(UserError, match=r"^moon-east1-a has no TPUs, and v5p is in "):
        check_zone(v5p, "moon-east1-a")


def test_flags_of_the_compiler():
    assert libtpu_init_args("", parse_topology("v5e-16")) == ""
    assert libtpu_init_args(" --a=1   --b ", parse_topology("v5e-16")) == "--a=1 --b"
    assert "--xla_tpu_enable_data_parallel_all_reduce_opt=true" in libtpu_init_args(
        "recommended", parse_topology("2xv6e-16")
    )
    with pytest.raises(UserError, match=r"^recommended: no flags are recommended for v4"):
        libtpu_init_args("recommended", parse_topology("v4-8"))
    with pytest.raises(UserError, match=r"^xla_a: is no flag; they begin with --, or say recommended"):
        libtpu_init_args("xla_a", parse_topology("v5p-8"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The compiler's flags at every compilation; nothing is compiled."""
    found: list[str] = []

    def compile_for(*_: object, **__: object) -> None:
        found.append(os.environ["LIBTPU_INIT_ARGS"])
        raise UserError("enough")

    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--of_before=1")
    monkeypatch.setattr(planner, "compile_for", compile_for)
    return found


def test_a_plan_compiles_with_the_flags_that_the_pods_run_with(asked: list[str]):
    options = ["--config", RECIPE, "--sweep", "v5p-8,tpu7x-16", "--no-search", "--batch", "16"]
    command.main(options)
    command.main([*options, "--libtpu-init-args", "recommended"])
    assert asked[:2] == ["--of_before=1"] * 2
    assert asked[2:] == [libtpu_init_args("recommended", parse_topology(name)) for name in ("v5p-8", "tpu7x-16")]


@pytest.mark.skipif(NO_LIBTPU, reason="libtpu, the TPU compiler, is not installed")
def test_a_plan_of_other_flags_is_another_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Answers of the compiler are kept; one for other flags is not taken."""
    asked = []

    def run(words: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess:
        asked.append(env.get("LIBTPU_INIT_ARGS", ""))
        Path(words[-1]).write_text(json.dumps(ANSWER))
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setenv("NAVIL_PLAN_CACHE", str(tmp_path))
    monkeypatch.setattr(compiling.subprocess, "run", run)
    for flags in ("", "--a=1", "--a=2", "--a=1", ""):
        monkeypatch.setenv("LIBTPU_INIT_ARGS", flags)
        compiling.compile_for(get_config(), parse_topology("v5p-8"), 8)
    assert asked == ["", "--a=1", "--a=2"]


@pytest.mark.slow
@pytest.mark.skipif(NO_LIBTPU, reason="libtpu, the TPU compiler, is not installed")
def test_a_flag_that_the_compiler_has_not_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.setenv("NAVIL_PLAN_CACHE", str(tmp_path))
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    options = ["--config", RECIPE, "--topology", "v5p-8", "--effort", "fast", "--no-search"]
    assert command.main([*options, "--libtpu-init-args=--xla_tpu_no_such_flag=1"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "error: LIBTPU_INIT_ARGS: this TPU compiler has no flag --xla_tpu_no_such_flag"
