"""Time and memory of converting weights: `python -m benchmarks.weights --config configs/navil_2b.py --folder DIR`.

Makes a folder with the recipe's tensors in bfloat16 (random, sharded as on the hub), imports and exports it, each in a
process of its own, and compares all tensors byte for byte. Prints, for each, the seconds, the bytes per second beside
those of a plain copy of the same files, and the peak of resident memory beside the largest parameter. Needs three times
the model's size on disk; everything made is deleted.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from navil_jax.config import Config
from navil_jax.config.flags import load_config
from navil_jax.convert.exporting import export_checkpoint
from navil_jax.convert.hf_config import to_hf_config
from navil_jax.convert.importing import import_checkpoint
from navil_jax.convert.params import tensor_info
from navil_jax.convert.reader import TensorFolder
from navil_jax.convert.stored import SHARD_BYTES, TensorInfo
from navil_jax.convert.writer import write_safetensors
from navil_jax.model import params as model_params

TOKENIZER = Path(__file__).parents[1] / "tests" / "golden" / "prompts" / "tokenizer"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def make_folder(config: Config, folder: Path) -> None:
    """A checkpoint of the recipe's model with random bits."""
    folder.mkdir(parents=True)
    params = model_params.flatten(model_params.shapes(config.model))
    info = tensor_info(config.model, {name: TensorInfo(leaf.shape, BFLOAT16) for name, leaf in params.items()})
    bits = np.random.default_rng(0)

    def value(name: str) -> np.ndarray:
        return np.frombuffer(bits.bytes(info[name].nbytes), BFLOAT16).reshape(info[name].shape)

    write_safetensors(folder, info, value, SHARD_BYTES)
    (folder / "config.json").write_text(json.dumps(to_hf_config(config, dtype="bfloat16")))
    for file in TOKENIZER.glob("*token*"):
        shutil.copy(file, folder)


def copy(source: Path, target: Path) -> None:
    """What the disk can do: the weight files, read and written."""
    target.mkdir()
    for file in source.glob("*.safetensors"):
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as opened:
            os.fsync(opened.fileno())


STEPS: dict[str, Callable[[Path, Path], None]] = {
    "copy": copy,
    "import": import_checkpoint,
    "export": export_checkpoint,
}


def measure(step: str, source: Path, target: Path) -> tuple[float, int]:
    """(seconds, peak of resident bytes) of a step in a process of its own, start and imports included."""
    command = [sys.executable, "-m", "benchmarks.weights", "--step", step, "--folder", source, "--target", target]
    began = time.monotonic()
    done = subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, text=True)
    return time.monotonic() - began, int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="recipe whose model is made")
    parser.add_argument("--folder", type=Path, required=True, help="where; must not exist")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        STEPS[options.step](options.folder, options.target)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    config = load_config(options.config)
    largest = max(leaf.size for leaf in model_params.flatten(model_params.shapes(config.model)).values()) * 2
    folder = options.folder
    try:
        make_folder(config, folder / "source")
        size = sum(tensor.nbytes for tensor in TensorFolder(folder / "source").tensors.values())
        print(f"{options.config}: {size / 1e9:.2f} GB in bfloat16, largest parameter {largest / 2**30:.2f} GiB")
        print("| step | seconds | MB/s | peak memory, GiB |\n|---|---:|---:|---:|")
        for step, source, target in (
            ("copy", "source", "copied"),
            ("import", "source", "run"),
            ("export", "run", "out"),
        ):
            seconds, peak = measure(step, folder / source, folder / target)
            print(f"| {step} | {seconds:.0f} | {size / seconds / 1e6:.0f} | {peak / 2**30:.2f} |", flush=True)
            shutil.rmtree(folder / "copied", ignore_errors=True)
        first, last = TensorFolder(folder / "source"), TensorFolder(folder / "out")
        assert first.keys() == last.keys()
        assert all(np.array_equal(first[name].view(np.uint16), last[name].view(np.uint16)) for name in first)
        print(f"all {len(first)} tensors are equal, byte for byte")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
