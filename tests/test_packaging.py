"""What is installed: one list of versions, and recipes that are found outside a checkout."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from navil_jax.config.flags import load_config
from navil_jax.errors import UserError
from navil_jax.study.grid import load_study

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OF_THEIR_OWN = {
    "beam",
    "dev",
    "heic",
    "jxl",
    "lmms-eval",
    "plan",
    "serve",
    "tpu",
}  # docs install them one by one


def requirements(name: str) -> list[str]:
    return (ROOT / name).read_text().splitlines()


def test_the_requirements_are_those_of_the_package_with_its_extras():
    wanted = set(PROJECT["dependencies"]).union(*(EXTRAS[name] for name in EXTRAS.keys() - OF_THEIR_OWN))
    assert sorted(requirements("requirements.txt")) == sorted(wanted)
    assert requirements("requirements-dev.txt") == EXTRAS["dev"]
    assert requirements("requirements-tpu.txt") == EXTRAS["tpu"]


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"].values()))
def test_every_console_script_has_a_main(command: str):
    module, _, name = command.partition(":")
    path = ROOT / f"{module.replace('.', '/')}.py"
    assert re.search(rf"^def {name}\(argv: Sequence\[str\] \| None = None\) -> int:", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"].values()))
def test_help_answers_without_jax(command: str):
    module = command.partition(":")[0].removesuffix(".__main__")
    code = f"""
import runpy, sys
sys.argv = ["x", "--help"]
try:
    runpy.run_module({module!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code
assert "jax" not in sys.modules
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert said.returncode == 0, said.stderr
    assert "--help" in said.stdout


def test_recipes_of_the_package_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here = load_config(ROOT / "configs" / "navil_2b_s1_1.py")
    study = load_study(ROOT / "configs" / "study" / "quick.py")
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/navil_2b_s1_1.py") == here
    assert load_study(Path("configs/study/quick.py")) == study


def test_a_recipe_of_the_folder_goes_before_that_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "configs" / "demo.py"
    mine.parent.mkdir()
    mine.write_text("from navil_jax.config import Config\n\n\ndef get_config():\n    return Config(steps=3)\n")
    assert load_config("configs/demo.py").steps == 3


@pytest.mark.parametrize("path", ["demo.py", "configs/none.py", "configs/../../secret.py"])
def test_other_names_are_not_searched_for(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such config file"):
        load_config(path)
