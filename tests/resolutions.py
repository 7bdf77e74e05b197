"""Tests the lowest, the newest or the locked versions that requirements.txt allows, in an environment of their own.

    python tests/resolutions.py lowest --python 3.11
    python tests/resolutions.py newest --python 3.13 tests/test_step.py -k resume
    python tests/resolutions.py locked --python 3.12

Without tests of your own choice, those of the core that take no more than seconds are run. The lock, which pods
install, is written anew from requirements.txt and requirements-tpu.txt with:

    python tests/resolutions.py write-lock
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESOLUTION = {"lowest": "lowest-direct", "newest": "highest"}
ROOMS_ABOVE = ("benchmark", "docs", "evaluate", "launch", "multihost", "plan", "study")  # not the core
SHOWN = ("jax", "flax", "numpy", "numba", "orbax-checkpoint", "grain", "tensorflow-datasets", "pyarrow", "datasets")
UV = (sys.executable, "-m", "uv")
LOCK = ROOT / "launch" / "lock.txt"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("resolution", choices=[*RESOLUTION, "locked", "write-lock"])
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}", metavar="VERSION")
    options, tests = parser.parse_known_args()
    if options.resolution == "write-lock":
        return write_lock()
    tests = tests or ["-m", "not slow", *(f"--ignore-glob=*/test_{room}*" for room in ROOMS_ABOVE)]
    with tempfile.TemporaryDirectory() as folder:
        python = f"{folder}/bin/python"
        subprocess.run([*UV, "venv", "--quiet", "--python", options.python, folder], check=True)
        for arguments in installed(options.resolution):
            subprocess.run([*UV, "pip", "install", "--quiet", "--python", python, *arguments], check=True)
        found = subprocess.check_output([*UV, "pip", "freeze", "--python", python], text=True).splitlines()
        print(subprocess.check_output([python, "--version"], text=True).strip(), end=": ")
        print(*(line for line in found if line.partition("==")[0] in SHOWN), flush=True)
        return subprocess.run([python, "-m", "pytest", *tests], cwd=ROOT).returncode


def installed(resolution: str) -> list[list[str]]:
    """Arguments of `uv pip install`, one call after the other."""
    dev = (ROOT / "requirements-dev.txt").read_text().splitlines()
    if resolution != "locked":
        return [["--resolution", RESOLUTION[resolution], f"--requirements={ROOT / 'requirements.txt'}", *dev]]
    return [["--require-hashes", f"--requirements={LOCK}"], [f"--constraints={LOCK}", *dev]]


def write_lock() -> int:
    command = [*UV, "pip", "compile", "requirements.txt", "requirements-tpu.txt", "--quiet", "--upgrade", "--universal"]
    command += ["--python-version", "3.11", "--generate-hashes", "--no-annotate", "--output-file", str(LOCK)]
    command += ["--custom-compile-command", "python tests/resolutions.py write-lock"]
    return subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
