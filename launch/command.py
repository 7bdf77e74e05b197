"""The command of every host: checked, with the run's folder and the environment that the settings ask for."""

import contextlib
import itertools
import re
from pathlib import Path

from launch.settings import ROOT, Settings
from navil_jax.config.flags import parse
from navil_jax.errors import UserError
from navil_jax.plan.cloud import libtpu_init_args

COMPILED = "compiled"  # folder of the bucket with compiled programs: a restart need not compile anew


def complete(command: list[str], settings: Settings) -> list[str]:
    """The whole command of a host.

    Raises:
      UserError: there is none, or it begins with a variable.

    Example: python -m navil_jax.train ... ->
      env JAX_COMPILATION_CACHE_DIR=gs://b/compiled python -m navil_jax.train ... --config.workdir=gs://b/navil
    """
    if not command:
        raise UserError("the command is missing; it comes after --")
    if re.match(r"\w+=", command[0]):
        raise UserError(f"{command[0]}: is no program; set variables with env: -- env {command[0]} PROGRAM ...")
    if not any(word.partition("=")[0] == "--config.workdir" for word in command):
        command = [*command, f"--config.workdir={settings.workdir}"]
    variables = [f"JAX_COMPILATION_CACHE_DIR={settings.bucket}/{COMPILED}"]
    if flags := libtpu_init_args(settings.libtpu_init_args, settings.place):
        variables.append(f"LIBTPU_INIT_ARGS={flags}")
    return ["env", *variables, *command]


def check_training(command: list[str]) -> None:
    """Reads what a training command is given as the hosts will, who have this repository: a mistake costs no slice.

    Raises:
      UserError: there is no such recipe in the repository, or a setting is wrong.
    """
    pairs = list(itertools.pairwise(command))
    if ("-m", "navil_jax.train") not in pairs:
        return
    given = command[pairs.index(("-m", "navil_jax.train")) + 2 :]
    if {"--help", "-h"} & set(given) or given[:1] in (["watch"], ["report"]):
        return
    with contextlib.chdir(ROOT):
        recipe = Path(parse(given, "")[1].config).resolve()
    if not recipe.is_relative_to(ROOT.resolve()):
        raise UserError(f"{recipe}: is outside of {ROOT}, which is all that hosts get; put the recipe into it")
