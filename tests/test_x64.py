"""Settings of JAX that do not go with this program are a user's mistake with one line to say so."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from navil_jax.config import Config, MeshConfig
from navil_jax.convert.upcycling import initialise_from
from navil_jax.errors import UserError
from navil_jax.sharding import make_mesh

TESTS = Path(__file__).parent


def test_no_mesh_with_64_bit_types() -> None:
    with jax.enable_x64(True), pytest.raises(UserError, match="JAX_ENABLE_X64"):
        make_mesh(MeshConfig())
    assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("default_prng_impl", "rbg"), ("threefry_partitionable", False), ("random_seed_offset", 7)],
)
def test_no_mesh_with_other_random_numbers(name: str, value: object) -> None:
    usual = getattr(jax.config, f"jax_{name}")
    jax.config.update(f"jax_{name}", value)
    try:
        with pytest.raises(UserError, match=f"JAX_{name.upper()}: with {value} a seed makes other .*; unset it$"):
            make_mesh(MeshConfig(), jax.devices()[:1])
        with pytest.raises(UserError, match=f"JAX_{name.upper()}"):
            initialise_from(Path(), Config(), Path())
    finally:
        jax.config.update(f"jax_{name}", usual)
    assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    "command",
    [("train", "--config", TESTS / "toy_recipe.py", "--config.workdir={}"), ("chat", "--checkpoint", "{}")],
    ids=["train", "chat"],
)
def test_commands_refuse_64_bit_types(command: tuple, tmp_path: Path) -> None:
    name, *arguments = command
    arguments = [str(argument).format(tmp_path / "run") for argument in arguments]
    environment = os.environ | {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-m", f"navil_jax.{name}", *arguments]
    done = subprocess.run(line, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: JAX_ENABLE_X64: 64-bit types are switched on")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
