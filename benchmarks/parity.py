"""How far every tensor is from the released code: `JAX_PLATFORMS=cpu python -m benchmarks.parity`.

Runs all golden cases of tests/golden in float32 and prints, as Markdown, the largest absolute difference of every
group of tensors. The numbers of the released code are stored there; nothing but the repository is needed. The exit
status is 1 if a difference is above its tolerance. The golden tests assert the same pairs.
"""

import importlib.metadata
import platform
import sys
from pathlib import Path

import jax

from navil_jax.convert.verify.compare import TOLERANCES, Group, all_pairs, by_group
from navil_jax.convert.verify.golden import is_golden, load_case

CASES = Path(__file__).parents[1] / "tests" / "golden"
INTRODUCTION = """# Parity with the released code

Largest absolute difference between navil_jax and the released PyTorch code, both in float32, over the tensors of a
group. Weights, inputs and the released outputs are those of `tests/golden`. An empty field means that the case holds
no such tensor.
"""
NOTES = """\
- Gradients: norm and projection of every parameter's gradient in the checkpoint's layout, divided by the released norm
  + 0.01, so that the tolerance is 1e-4 of the norm plus 1e-6.
- Text accuracy in percent. Generated tokens: 0 means that all are the same.
- The float32 numbers of the released code are themselves up to 7.8e-06 (logits) away from its float64 ones.
"""


def table(columns: dict[str, dict[str, Group]]) -> str:
    """Groups down, cases across."""
    rows = [["group", *columns, "tolerance"], ["---"] * (len(columns) + 2)]
    for group, tolerance in TOLERANCES.items():
        cells = [f"{case[group].difference:.1e}" if group in case else "" for case in columns.values()]
        rows.append([group, *cells, f"{tolerance:.0e}"])
    counts = [str(sum(group.tensors for group in case.values())) for case in columns.values()]
    rows.append(["tensors compared", *counts, ""])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    folders = sorted(folder for folder in CASES.iterdir() if is_golden(folder))
    columns = {folder.name: by_group(all_pairs(load_case(folder))) for folder in folders}
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("jax", "flax", "numpy"))
    print(f"{INTRODUCTION}\n{table(columns)}\n\n{NOTES}")
    print(f"Made by `JAX_PLATFORMS=cpu python -m benchmarks.parity > docs/parity.md` on {jax.default_backend()} with")
    print(f"{versions}, Python {platform.python_version()}.")
    good = all(group.within for case in columns.values() for group in case.values())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
