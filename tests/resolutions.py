"""Tests the lowest or the newest versions that requirements.txt allows, in an environment of their own.

    python tests/resolutions.py lowest --python 3.11
    python tests/resolutions.py newest --python 3.13 tests/test_step.py -k resume

Without tests of your own choice, those of the core that take no more than seconds are run.
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("resolution", choices=RESOLUTION)
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}", metavar="VERSION")
    options, tests = parser.parse_known_args()
    tests = tests or ["-m", "not slow", *(f"--ignore-glob=*/test_{room}*" for room in ROOMS_ABOVE)]
    uv = [sys.executable, "-m", "uv"]
    with tempfile.TemporaryDirectory() as folder:
        python = f"{folder}/bin/python"
        subprocess.run([*uv, "venv", "--quiet", "--python", options.python, folder], check=True)
        files = [f"--requirements={ROOT / name}" for name in ("requirements.txt", "requirements-dev.txt")]
        install = [*uv, "pip", "install", "--quiet", "--python", python, "--resolution", RESOLUTION[options.resolution]]
        subprocess.run([*install, *files], check=True)
        installed = subprocess.check_output([*uv, "pip", "freeze", "--python", python], text=True).splitlines()
        print(subprocess.check_output([python, "--version"], text=True).strip(), end=": ")
        print(*(line for line in installed if line.partition("==")[0] in SHOWN), flush=True)
        return subprocess.run([python, "-m", "pytest", *tests], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
