"""MaxText's training step, compiled for a TPU slice as its own `train_compile` does, for `benchmarks.dense_text`.

Runs in an environment of MaxText's own, and imports nothing of this project:

    python3.12 -m venv maxtext && maxtext/bin/pip install "maxtext[tpu]==0.2.5"
    maxtext/bin/python benchmarks/maxtext_step.py runs/maxtext llama2-7b full

The arguments are a folder for what comes out, NAME.hlo (the compiled program's text) and NAME.json (its memory, the
places of the devices, the dtypes of the state), a model of MaxText's and its remat_policy; more settings may follow.
"""

import collections
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
from maxtext.trainers.pre_train import train_compile

SETTINGS = (
    "compile_topology=v5p-32",
    "compile_topology_num_slices=1",
    "per_device_batch_size=1",
    "max_target_length=8192",
    "attention=flash",
    # Without it XLA turns products with FSDP's weights into loops of partial ones, twice as slow.
    "compile_xla_flags=--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",
)
MEMORY = ("argument", "output", "alias", "temp", "generated_code", "host_temp")


def main(folder: Path, model: str, remat_policy: str, settings: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{model} {remat_policy}"
    settings = [f"model_name={model}", f"remat_policy={remat_policy}", *SETTINGS, *settings]
    compile_step = train_compile.jit_and_compile

    def keep(function: Any, arguments: tuple, keywords: dict, mesh: jax.sharding.Mesh, *rest: Any) -> Any:
        began = time.monotonic()
        compiled = compile_step(function, arguments, keywords, mesh, *rest)
        memory = compiled.memory_analysis()
        (folder / f"{name}.hlo").write_text(compiled.as_text())
        found = {
            "model": model,
            "remat_policy": remat_policy,
            "settings": settings,
            "seconds": time.monotonic() - began,
            "memory": {part: getattr(memory, f"{part}_size_in_bytes") for part in MEMORY},
            "devices": [[*device.coords, device.core_on_chip, 0] for device in mesh.devices.flat],
            "state": dict(collections.Counter(str(leaf.dtype) for leaf in jax.tree.leaves(arguments[0]))),
            "versions": {package: importlib.metadata.version(package) for package in ("maxtext", "jax", "libtpu")},
        }
        (folder / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
        return compiled

    train_compile.jit_and_compile = keep
    train_compile.main([train_compile.__file__, *settings])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
