"""The command of every host: checked, with the run's folder and the environment that the settings ask for."""

import re

from launch.settings import Settings
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
