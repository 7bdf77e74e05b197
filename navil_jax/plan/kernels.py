"""What the kernels of a program take: cycles that the TPU compiler schedules, from a table or measured when needed.

`kernel_cycles.json` beside this file holds the kernels of the recipes; `python -m navil_jax.plan.kernels` writes it
anew from the compiler. A kernel of other sizes is compiled when a plan meets it (seconds), and kept beside the plans.

Static cycles over public measurements (marin's splash attention on v5p, tokamax' and tpu-inference's on v6e and tpu7x;
see docs/tpu.md) give a factor for each generation, `topology.Generation.kernel_factor`.
"""

import argparse
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from navil_jax.plan.compile import cache_folder, compiler_environment
from navil_jax.plan.hlo import Kernel
from navil_jax.plan.schedule import BUNDLES, SLOTS, Cycles, read_folder
from navil_jax.plan.topology import GENERATIONS, Generation

TABLE = Path(__file__).with_name("kernel_cycles.json")
BLOCKS = 32  # of the arrays that a kernel is compiled for; more than VMEM holds
PRODUCTS = {
    "packed_fwd": 2,
    "packed_bwd": 5,
    "wide_fwd": 2,
    "wide_bwd": 5,
    "splash_fwd": 2,
    "splash_dq": 3,
    "splash_dkv": 4,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel and the sizes that its schedule depends on."""

    name: str  # a key of PRODUCTS, or packed_widen_queries, packed_widen_keys, packed_narrow, packed_inner
    width: int  # features of a head
    block: int
    heads: int = 1  # of a grid step
    tile: int = 0
    causal: bool = False
    sharing: int = 1  # query heads that share a key


def case_of(kernel: Kernel) -> Case | None:
    """The case of a kernel in a program; None: one of which nothing is known."""
    settings = json.loads(kernel.settings) if kernel.settings else {}
    if kernel.name.startswith(("packed_", "wide_")):
        name = kernel.name.removesuffix("_spare").removesuffix("_exact")
        return Case(name, **settings)
    for word in ("fwd", "dq", "dkv"):
        if kernel.name.startswith("splash") and f"_{word}" in kernel.name:
            width = int(next(shape for shape in kernel.operands if shape[0] != "s").split(",")[-1].rstrip("]"))
            block = settings.get("block_q" if word == "fwd" else f"block_q_{word}", 512)
            return Case(f"splash_{word}", width, block, causal=not kernel.label.startswith("vision"))
    return None


@functools.cache
def cycles(case: Case, generation: str) -> Cycles:
    """Cycles of a grid step, from the table, from what was measured before, or measured now."""
    if found := table().get((case, generation)):
        return found
    versions = ",".join(importlib.metadata.version(package) for package in ("jax", "libtpu"))
    key = hashlib.sha256(f"{case} {generation} {versions}".encode()).hexdigest()[:32]
    file = cache_folder() / f"kernel-{key}.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(dataclasses.asdict(measure(case, generation))))
    return Cycles(**json.loads(file.read_text()))


@functools.cache
def table() -> dict[tuple[Case, str], Cycles]:
    records = json.loads(TABLE.read_text()) if TABLE.is_file() else []
    return {(Case(**one["case"]), one["generation"]): Cycles(**one["cycles"]) for one in records}


def measure(case: Case, generation: str) -> Cycles:
    """Compiles a kernel for one device, in a process of its own, and reads its schedule.

    Raises:
      RuntimeError: the compiler refuses it, or wrote no schedule.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        flags += "--xla_jf_dump_llo_pass_label_regex=packed-bundles-post-ra|utilization"
        environment = compiler_environment("full") | {"LIBTPU_INIT_ARGS": flags}  # read once, when libtpu loads
        command = [
            sys.executable,
            "-m",
            "navil_jax.plan.kernels",
            "--compile",
            json.dumps(dataclasses.asdict(case)),
            generation,
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        for file in Path(folder).iterdir():
            if not file.name.endswith((BUNDLES, SLOTS)):
                file.unlink()
        found = read_folder(Path(folder)) if not done.returncode else {}
    matching = [one for name, one in found.items() if _matches(name, case)]
    if len(matching) != 1:
        raise RuntimeError(f"no schedule of {case} for {generation}:\n{done.stderr[-3000:]}")
    return matching[0]


def _matches(name: str, case: Case) -> bool:
    if not case.name.startswith("splash"):
        return case.name in name
    return name.startswith("splash") and f"_{case.name.removeprefix('splash_')}" in name


def compile_on_one_device(
    generation: Generation, program: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]
) -> Any:
    """Compiles for one device of a generation what `program` returns: a function, and its abstract arguments.

    To be called in a process of its own, with `compile.compiler_environment`.
    """
    import jax
    import numpy as np
    from jax.experimental import topologies

    from navil_jax.sharding import MESH_AXES

    options = {"chip_config_name": generation.chip_config} if generation.chip_config != "default" else {}
    name = f"{generation.libtpu}:{'x'.join('1' * generation.dimensions)}"
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=name, chips_per_host_bounds=(1, 1, 1), **options
    )
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]).reshape((1,) * len(MESH_AXES)), MESH_AXES)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh):
        function, arguments = program()
        return jax.jit(function, in_shardings=whole, out_shardings=whole).lower(*arguments).compile()


def _program(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The case's kernel as a function, and abstract arguments."""
    import jax
    import jax.numpy as jnp

    length = BLOCKS * case.block
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    if case.name.startswith("splash"):
        from navil_jax.model import attention

        attention.SPLASH_BLOCK = case.block
        attend = functools.partial(attention.splash_attention, causal=case.causal)
        wide = array(1, length, 16, case.width)

        def both(q: Any, k: Any, v: Any, ids: Any, gradient: Any) -> Any:
            out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, ids), q, k, v)
            return out, pullback(gradient)

        return both, (wide, wide, wide, array(1, length, dtype=jnp.int32), wide)
    return _packed_program(case, length, array)


def _packed_program(case: Case, length: int, array: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    import jax.numpy as jnp

    from navil_jax.model.attention import vmem_bytes
    from navil_jax.model.kernels import flash, spare_rows, wide
    from navil_jax.model.kernels.pairs import Pairs

    blocks = flash.Blocks(case.block, case.tile, case.heads, vmem_bytes())
    heads = 2 * case.heads if case.heads > 1 else 8
    thin, filled = array(heads * case.width, length), array(heads * flash.LANES, length)
    rotation = (array(case.width // 2, length, dtype=jnp.float32),) * 2
    number = array(64, dtype=jnp.int32)
    pairs = (number, number, number, array(dtype=jnp.int32))
    options: dict[str, Any] = {"block": case.block}
    sums, ids = array(2, 2 * case.heads, length, dtype=jnp.float32), array(length, dtype=jnp.int32)
    rows = [array(length, heads // sharing * case.width) for sharing in (1, case.sharing)]
    match case.name:
        case "wide_fwd":

            def wide_forward(q: Any, k: Any, v: Any, ids: Any, *pairs: Any) -> Any:
                return wide.forward(q, k, v, Pairs(*pairs), blocks, ids, causal=case.causal)

            return wide_forward, (rows[0], rows[1], rows[1], ids, *pairs)
        case "wide_bwd":
            of_rows: dict[str, Any] = {"causal": case.causal, "row": 2 * case.block}

            def wide_backward(q: Any, k: Any, v: Any, g: Any, sums: Any, ids: Any, *pairs: Any) -> Any:
                return wide.backward(q, k, v, g, sums, Pairs(*pairs), blocks, ids, **of_rows)

            return wide_backward, (rows[0], rows[1], rows[1], rows[0], sums, ids, *pairs)
        case "packed_fwd":
            run = lambda q, k, v, *pairs: flash.forward(q, k, v, Pairs(*pairs), blocks, width=case.width)  # noqa: E731
            return run, (filled, filled, thin, *pairs)
        case "packed_bwd":
            options = {"width": case.width, "row": 2 * case.block}

            def packed_backward(q: Any, k: Any, v: Any, g: Any, sums: Any, *pairs: Any) -> Any:
                return flash.backward(q, k, v, g, sums, Pairs(*pairs), blocks, **options)

            return packed_backward, (filled, filled, thin, thin, sums, *pairs)
        case "packed_inner":
            return functools.partial(spare_rows.inner_products, width=case.width, **options), (thin, thin)
        case "packed_narrow":
            narrow = functools.partial(spare_rows.narrow, scale=0.5, dtype=jnp.bfloat16, **options)
            return narrow, (array(*thin.shape, dtype=jnp.float32), *rotation)

    def widen(x: Any, cos: Any, sin: Any, below: Any, limits: Any = None) -> Any:
        return spare_rows.widen(x, cos, sin, below, limits, scale=0.5, **options)

    below, limits = array(spare_rows.BELOW, length), array(heads, dtype=jnp.float32)
    return widen, (thin, *rotation, below, *(() if case.name == "packed_widen_keys" else (limits,)))


RECIPES = (  # the kernels of the recipes: the encoder's forward and backward, and the decoder's
    *(Case("packed_fwd", 64, 512, heads, 512) for heads in (8, 12, 14)),
    *(Case("packed_bwd", 64, 512, heads, 256) for heads in (2, 4)),
    *(Case(name, 64, 512) for name in ("packed_widen_queries", "packed_widen_keys", "packed_narrow", "packed_inner")),
    *(Case("wide_fwd", 128, 512, 4, 128, causal=True, sharing=sharing) for sharing in (1, 2, 4)),
    *(Case("wide_bwd", 128, 512, 4, 256, causal=True, sharing=sharing) for sharing in (1, 2, 4)),
    *(Case("wide_fwd", 128, 512, heads, 128) for heads in (4, 6, 7)),
    *(Case("wide_bwd", 128, 512, heads, 256) for heads in (1, 2, 3)),
    *(Case(f"splash_{word}", 128, block, causal=True) for word in ("fwd", "dq", "dkv") for block in (512, 1024)),
    *(Case(f"splash_{word}", 64, block) for word in ("fwd", "dq", "dkv") for block in (512, 1024)),
)


def main(argv: Sequence[str]) -> int:
    """Writes the table: every recipe's kernel on every generation."""
    parser = argparse.ArgumentParser(prog="python -m navil_jax.plan.kernels", description=main.__doc__)
    parser.add_argument("--compile", nargs=2, help=argparse.SUPPRESS)  # a case, by a process of its own
    by_name = {one.name: one for one in GENERATIONS}
    if given := parser.parse_args(argv).compile:
        compile_on_one_device(by_name[given[1]], lambda: _program(Case(**json.loads(given[0]))))
        return 0
    records = []
    for generation in by_name:
        for case in RECIPES:
            try:
                found = measure(case, generation)
            except RuntimeError as error:
                print(f"{generation} {case}: left out, {str(error).strip().splitlines()[-1][:200]}", file=sys.stderr)
                continue
            print(generation, case, found)
            cycles_of = dataclasses.asdict(found) | {"matrix": round(found.matrix, 3)}
            records.append({"generation": generation, "case": dataclasses.asdict(case), "cycles": cycles_of})
    TABLE.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
