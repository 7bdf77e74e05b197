"""Golden memory of planned steps: `python tests/plan_golden.py [NAME ...]` compiles all cases, or those named.

plan_golden.json holds a device's bytes by category, at little effort of the compiler. The quick ones are compiled by
the tests; all take some minutes. Run it when a change of the model or the step is meant to change memory, and look at
the difference of the file.
"""

import dataclasses
import json
import sys
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
ROOT = FILE.parents[1]
TOLERANCE = 0.03  # of what the compiler decides; versions of libtpu differ

# Name -> recipe, slice, mesh, rows
CASES = {
    "tiny on v5e-8": ("tests/plan_recipe.py", "v5e-8", "fsdp=-1", 8),
    "tiny on v5p-16, tensor": ("tests/plan_recipe.py", "v5p-16", "fsdp=-1,tensor=2", 8),
    "2B S1.1 on v5p-128": ("configs/navil_2b_s1_1.py", "v5p-128", "fsdp=-1", 64),
    "2B S2 on v6e-64": ("configs/navil_2b_s2.py", "v6e-64", "fsdp=-1", 64),
    "9B S2 on v5p-128": ("configs/navil_9b_s2.py", "v5p-128", "fsdp=-1", 64),
}
QUICK = ("tiny on v5e-8",)


def figures(name: str) -> dict[str, float]:
    """Bytes of a device by category."""
    from navil_jax.config.flags import load_config
    from navil_jax.plan.__main__ import parse_mesh
    from navil_jax.plan.compile import compile_for
    from navil_jax.plan.topology import parse_topology

    recipe, topology, mesh, rows = CASES[name]
    config = load_config(ROOT / recipe)
    config = dataclasses.replace(config, mesh=parse_mesh(mesh, config.mesh))
    found = compile_for(config, parse_topology(topology), rows, effort="fast")
    if found.memory is None:
        return found.state | {"too much": found.total}
    return found.state | {"temporaries": found.memory["temp"], "program": found.memory["generated_code"]}


def read() -> dict[str, dict[str, float]]:
    """The golden figures by case."""
    return json.loads(FILE.read_text())


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    known = read() if FILE.is_file() else {}
    known |= {name: figures(name) for name in sys.argv[1:] or CASES}
    FILE.write_text(json.dumps({name: known[name] for name in CASES if name in known}, indent=2) + "\n")
