"""What attention kernels take of a TPU, by the compiler's own schedules: `python -m benchmarks.kernel_cycles`.

Nothing runs on a TPU: the compiler writes down the schedule of every kernel, a bundle of instructions a cycle
(`navil_jax/plan/schedule.py`). For each generation

    share of peak        products of a pair of blocks (two forward, five backward) over what the matrix units could
                         do in the cycles of its grid step
    empty steps          steps of the grid that compute nothing, on the rows of NaViL-2B's first stage
    pairs computed       for each pair of positions that is needed, on the same rows
    layer over ideal     an encoder layer, forward and backward, outside attention: the compiler's estimate of its
                         fusions and the schedules of its small kernels, over its matrix products at peak (--layer; a
                         minute each; the estimates are right within a sixth on v5p and too long on v6e)

    python -m benchmarks.kernel_cycles                       # measures what the table of the planner lacks
    python -m benchmarks.kernel_cycles --chip v5p --layer
    python -m benchmarks.kernel_cycles --json cycles.json    # a list of {chip, what, unit, ours, splash, aim, better}
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from navil_jax.config.flags import load_config
from navil_jax.console import markdown_table
from navil_jax.errors import UserError, report_user_errors
from navil_jax.model.flops import Counts, useful_flops
from navil_jax.paths import new_file
from navil_jax.plan.kernels import PRODUCTS, Case, cycles
from navil_jax.plan.statistics import BatchStatistics, executed_pairs, simulate
from navil_jax.plan.topology import GENERATIONS, Generation

CHIPS = ("v5e", "v5p", "v6e", "tpu7x")
AIMS = {  # share of the peak, forward and backward
    "v5e": (0.60, 0.65),
    "v5p": (0.60, 0.65),
    "v6e": (0.28, 0.26),
    "tpu7x": (0.28, 0.26),
}
MATRIX_UNITS = {  # of a core: their side, how many, and rows that each takes in a cycle
    "v5e": (128, 4, 1),
    "v5p": (128, 4, 1),
    "v6e": (256, 2, 2),
    "tpu7x": (256, 2, 2),
}
LAYER_AIMS = {"v5p": 1.3, "v6e": 1.7}
PACKED = {"forward": Case("packed_fwd", 64, 512, 12, 512), "backward": Case("packed_bwd", 64, 512, 4, 256)}
CAUSAL = {
    "forward": Case("wide_fwd", 128, 512, 4, 128, causal=True, sharing=2),
    "backward": Case("wide_bwd", 128, 512, 4, 256, causal=True, sharing=2),
}
BACKWARD_HEADS = {
    "v5e": 3,
    "v6e": 3,
}  # of 128 whose gradients fit VMEM in rows of 49,152 patches; else 1
SPLASH = {"forward": ("splash_fwd",), "backward": ("splash_dq", "splash_dkv")}


def cycles_at_peak(case: Case, generation: Generation, products: int) -> float:
    """Cycles of a core for the products of a grid step, were its matrix units always full."""
    side, units, rows = MATRIX_UNITS[generation.name]
    return products * case.heads * case.block**2 * case.width / (units * rows * side**2)


def share(case: Case, generation: Generation) -> float:
    """Of the peak, that a computed step of one of our kernels reaches."""
    return cycles_at_peak(case, generation, PRODUCTS[case.name]) / cycles(case, generation.name).computed


def splash_share(way: str, width: int, block: int, causal: bool, generation: Generation) -> float:
    """As `share`; splash attention's backward pass is two kernels."""
    found = [Case(name, width, block, causal=causal) for name in SPLASH[way]]
    taken = sum(cycles(case, generation.name).computed for case in found)
    return cycles_at_peak(found[0], generation, 2 if way == "forward" else 5) / taken


def records(generation: Generation, rows: BatchStatistics) -> list[dict[str, Any]]:
    """The figures of one generation."""
    lines = []
    for way, aim in zip(("forward", "backward"), AIMS[generation.name], strict=True):
        for tower, width, ours, goal in (("encoder", 64, PACKED, aim), ("decoder", 128, CAUSAL, None)):
            causal = tower == "decoder"
            lines.append(
                {
                    "what": f"{tower} attention {way}, heads of {width}, blocks of 512",
                    "unit": "share of peak",
                    "ours": round(share(ours[way], generation), 3),
                    "splash": round(splash_share(way, width, 512, causal, generation), 3),
                    "aim": goal,
                    "better": "higher",
                }
            )
    wide = Case("wide_fwd", 128, 512, 6, 128), Case("wide_bwd", 128, 512, BACKWARD_HEADS.get(generation.name, 1), 256)
    for way, case in zip(("forward", "backward"), wide, strict=True):
        what = f"encoder attention {way}, heads of 128, blocks of 512"
        ours = round(share(case, generation), 3)
        lines.append(
            {"what": what, "unit": "share of peak", "ours": ours, "splash": None, "aim": None, "better": "higher"}
        )
    for tower, lengths, slots, needed, aim in (
        ("encoder", rows.patch_lengths, rows.patch_slots, rows.counts.patch_pairs, 1.4),
        ("decoder", rows.token_lengths, rows.token_slots, rows.counts.token_pairs, 1.4),
    ):
        ours, theirs = (executed_pairs(lengths, slots, block, block, tower == "decoder") for block in (512, 1024))
        of_grid = float(np.mean(theirs)) / (-(-slots // 1024) * 1024) ** 2
        what = f"grid steps that compute nothing, {tower}"
        lines.append(
            {"what": what, "unit": "share", "ours": 0.0, "splash": round(1 - of_grid, 2), "aim": 0, "better": "lower"}
        )
        lines.append(
            {
                "what": f"pairs computed for one needed, {tower}, 2B S1.1",
                "unit": "ratio",
                "ours": round(float(np.mean(ours)) / needed, 2),
                "splash": round(float(np.mean(theirs)) / needed, 2),
                "aim": aim,
                "better": "lower",
            }
        )
    return [{"chip": generation.name} | line for line in lines]


def layer_record(generation: Generation) -> dict[str, Any]:
    """The encoder layer outside attention, of NaViL-2B over 49,152 patches."""
    from benchmarks.encoder_layer_cycles import layer_cycles

    config = load_config("configs/navil_2b_s1_1.py")
    vision = config.model.encoder
    patches = 49_152
    counts = Counts(patches, 0, 0, 0, 0, 0, 0)
    names = {"vision/layers/qkv/kernel"}
    linear = useful_flops(config.model, counts, names)["vision linear"].forward / vision.depth
    ideal = 3 * linear / generation.peak * generation.clock
    ours, splash = (layer_cycles(generation, patches, attention) for attention in ("auto", "splash"))
    return {
        "chip": generation.name,
        "what": "encoder layer outside attention, forward and backward",
        "unit": "time over ideal",
        "ours": round(ours / ideal, 2),
        "splash": round(splash / ideal, 2),
        "aim": LAYER_AIMS.get(generation.name),
        "better": "lower",
    }


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=CHIPS, action="append", help="of these alone (default: all)")
    parser.add_argument("--layer", action="store_true", help="also compiles an encoder layer")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="writes the figures")
    options = parser.parse_args(argv)
    by_name = {one.name: one for one in GENERATIONS}
    rows = simulate(load_config("configs/navil_2b_s1_1.py"), "captions")
    found: list[dict[str, Any]] = []
    for chip in options.chip or CHIPS:
        try:
            found += records(by_name[chip], rows)
            found += [layer_record(by_name[chip])] if options.layer else []
        except RuntimeError as error:
            raise UserError(f"{chip}: {str(error).splitlines()[0]}") from error
    print(markdown_table([{name: "-" if cell is None else str(cell) for name, cell in line.items()} for line in found]))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
