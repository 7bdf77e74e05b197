"""Cycles of an encoder layer outside attention, by the TPU compiler; `benchmarks/kernel_cycles.py` asks.

The layer is compiled for one device, forward and backward, its input kept (no recomputation).
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from navil_jax.config.flags import load_config
from navil_jax.plan.compile import compiler_environment
from navil_jax.plan.hlo import summarise
from navil_jax.plan.kernels import PRODUCTS, case_of, compile_on_one_device, cycles
from navil_jax.plan.topology import GENERATIONS, Generation

ROOT = Path(__file__).parents[1]


def layer_cycles(generation: Generation, patches: int, attention: str) -> float:
    """The compiler's estimate of all fusions and copies, and the schedules of the small kernels."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "layer.hlo"
        command = [sys.executable, "-m", __name__, generation.name, str(patches), attention, str(out)]
        done = subprocess.run(command, env=compiler_environment("full"), capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(f"the layer does not compile: {done.stderr.strip().splitlines()[-1]}")
        program = summarise(out.read_text())
    total = sum(sum(loop.cycles.values()) for loop in program.loops)
    for kernel in (kernel for loop in program.loops for kernel in loop.kernels):
        case = case_of(kernel)
        if case is not None and case.name not in PRODUCTS:
            heads = next(shape for shape in kernel.operands if shape[0] != "s" and "," in shape)
            rows, length = (int(size) for size in heads.partition("[")[2].rstrip("]").split(",")[:2])
            total += cycles(case, generation.name).computed * (rows // 256) * (length // case.block) / generation.cores
    return total


def _layer(patches: int, attention: str) -> tuple[Any, tuple[Any, ...]]:
    """Forward and backward of a layer as a function, and abstract arguments."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from navil_jax.model import layers
    from navil_jax.model.vision import VisionEncoder

    model = load_config("configs/navil_2b_s1_1.py").model
    assert model.vision is not None
    vision = dataclasses.replace(model.vision, depth=1, full_attention_layers=None)
    model = dataclasses.replace(model, vision=vision, attention=attention, remat="none")
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((), ())
    ):  # Flax looks up axis names in a mesh in scope
        graph, state = nnx.split(nnx.eval_shape(lambda: VisionEncoder(model, nnx.Rngs(0))))
    features = jax.ShapeDtypeStruct((1, patches, vision.width), jnp.bfloat16)
    coords, scales = (jax.ShapeDtypeStruct((1, patches, *more), jnp.int32) for more in ((2,), ()))

    def run(state: Any, x: Any, coords: Any, scales: Any, gradient: Any) -> Any:
        encoder = nnx.merge(graph, state)
        layout = encoder.layout(coords, scales, 4096)
        form, weights = nnx.split(encoder.layers)
        weights = jax.tree.map(lambda leaf: leaf[0], weights)
        apply = lambda weights, x: layers.unsharded(nnx.merge(form, weights), model)(x, layout)  # noqa: E731
        out, pullback = jax.vjp(apply, weights, x)
        return out, pullback(gradient)

    return run, (state, features, coords, scales, features)


if __name__ == "__main__":
    _name, _patches, _attention, _out = sys.argv[1:]
    _generation = next(one for one in GENERATIONS if one.name == _name)
    _compiled = compile_on_one_device(_generation, lambda: _layer(int(_patches), _attention))
    Path(_out).write_text(_compiled.as_text() or "")
    print(json.dumps({"compiled": _name}))
