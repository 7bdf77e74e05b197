"""Plans a run on TPUs without one: `python -m navil_jax.plan --config configs/navil_2b.py --topology v5p-128`."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from navil_jax.config import Config, MeshConfig, validate
from navil_jax.config.flags import parse
from navil_jax.config.ranges import Amount, Axis, Count, read_as
from navil_jax.console import markdown_table, say
from navil_jax.errors import UserError, report_user_errors
from navil_jax.paths import local_path, new_drawing, new_file
from navil_jax.plan.cloud import libtpu_init_args
from navil_jax.plan.mixtures import MIXTURES
from navil_jax.plan.topology import Slice, parse_topology

if TYPE_CHECKING:
    from navil_jax.plan.planner import Plan

ABOUT = """Compiles the training step for a TPU slice and says what it needs. No TPU and no network is needed; the TPU
compiler is (pip install libtpu).

does NaViL-2B's first stage fit 64 v5p chips, and how long does it take:
  python -m navil_jax.plan --config configs/navil_2b_s1_1.py --topology v5p-128 --batch 64

the largest batch that fits, and only whether it fits (five times faster):
  python -m navil_jax.plan --config configs/navil_2b_s1_1.py --topology v6e-64 --batch 0
  python -m navil_jax.plan --config configs/navil_2b_s1_1.py --topology v6e-64 --effort fast

whether the hosts' CPUs keep up, by what data doctor measured on some machine:
  python -m navil_jax.plan --config configs/stage1.py --topology v5p-128 --input reports/stage1/input.json

how every parameter lies on the slice:
  python -m navil_jax.plan --config configs/navil_9b_s2.py --topology v5p-128 --mesh fsdp=32,tensor=2 --shardings

several slices and meshes, as a table and an image:
  python -m navil_jax.plan --config configs/navil_9b_s2.py --sweep v5p-128,v6e-256,v5e-256 --mesh fsdp=-1 \\
    --mesh fsdp=-1,tensor=2 --png plans.png

How to read it: docs/tpu.md. Exit status: 0 all fit, 1 something does not fit, 2 bad input (one line says what)."""


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    config, options = parse(sys.argv[1:] if argv is None else argv, ABOUT, add_options, command="plan")
    names = [name for name in (options.sweep or options.topology or "").split(",") if name]
    if not names:
        raise UserError("--topology: which slice? For example v5p-128, v5e-256, v6e-64 or 2xv5e-256")
    places = [parse_topology(name, options.slices) for name in names]
    meshes = [parse_mesh(text, config.mesh) for text in options.mesh] or [config.mesh]
    for mesh in meshes:
        validate(dataclasses.replace(config, mesh=mesh))
    return _show(config, options, places, meshes)


def _show(config: Config, options: argparse.Namespace, places: Sequence[Slice], meshes: Sequence[MeshConfig]) -> int:
    """Prints, draws and writes what was asked for; the exit status."""
    import jax  # --help needs none of these

    from navil_jax.data.inspect.input_cost import check_same_images, read_input_cost
    from navil_jax.plan import input as host_input
    from navil_jax.plan import report, shardings
    from navil_jax.plan.planner import as_json, plan_inference

    jax.config.update("jax_platforms", "cpu")  # shapes are all that is computed here; a device stays free
    if options.shardings:
        for place in places:
            for mesh in meshes:
                print(shardings.text(dataclasses.replace(config, mesh=mesh), place))
        return 0
    cost = read_input_cost(options.input) if options.input else None
    if cost:
        check_same_images(cost, config, options.input)
    plans, lines = [], []
    for place in places:
        for mesh in meshes:
            try:
                plans.append(_plan(dataclasses.replace(config, mesh=mesh), place, options))
            except UserError as error:
                if not options.sweep:
                    raise
                lines.append({"topology": place.name, "mesh": str(error)})
                continue
            lines.append(report.row(plans[-1], cost))
            if not options.sweep:
                say(report.text(plans[-1], cost))
            if options.inference:
                found = plan_inference(plans[-1].config, place, plans[-1].statistics)
                say(report.inference_text(found, place))
    if len(lines) > 1 or options.sweep:
        print(markdown_table(lines))
    if options.png and plans:
        report.draw(options.png, plans)
    elif options.png:
        print(f"{options.png}: not drawn, as there is no plan", file=sys.stderr)
    if options.json:
        figures = [as_json(plan) | ({"input": host_input.figures(plan, cost)} if plan.timing else {}) for plan in plans]
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if len(plans) == len(lines) and all(plan.fits for plan in plans) else 1


def _plan(config: Config, place: Slice, options: argparse.Namespace) -> "Plan":
    from navil_jax.plan.planner import make_plan
    from navil_jax.plan.statistics import simulate

    if options.libtpu_init_args is not None:
        os.environ["LIBTPU_INIT_ARGS"] = libtpu_init_args(options.libtpu_init_args, place)  # the compiler reads it
    return make_plan(
        config,
        place,
        simulate(config, options.mixture),
        rows=options.batch,
        effort=options.effort,
        search=not options.no_search,
        hlo=str(options.hlo or ""),
    )


def parse_mesh(text: str, mesh: MeshConfig) -> MeshConfig:
    """`fsdp=-1,tensor=2` -> the mesh with these axes changed.

    Raises:
      UserError: no such axis, or not a number.
    """
    axes = [field.name for field in dataclasses.fields(MeshConfig) if field.name != "rules"]
    sizes: dict[str, Any] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        try:
            sizes[axes[axes.index(name)]] = read_as(Axis)(size)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UserError(f"--mesh: {part!r} is no AXIS=SIZE; axes are {', '.join(axes)}") from error
    return dataclasses.replace(mesh, **sizes)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--topology", metavar="NAME", help="slice as Google Cloud names it, such as v5p-128; 2xv5e-256 for two slices")
    add("--slices", type=read_as(Count), default=1, help="number of such slices (default: 1)")
    add("--sweep", metavar="NAMES", help="several slices, separated by commas: prints a table")
    add(
        "--mesh",
        action="append",
        default=[],
        metavar="AXES",
        help="such as fsdp=-1,tensor=2; may be given several times",
    )
    add(
        "--batch",
        type=read_as(Amount),
        metavar="ROWS",
        help="rows of the global batch; 0: the most that fit (default: data.rows)",
    )
    add(
        "--libtpu-init-args",
        metavar="FLAGS",
        help="of the compiler, as the pods run with; recommended: those of the generation (plan/cloud.py)",
    )
    add("--mixture", choices=list(MIXTURES), default="captions", help="what the rows are taken to hold (docs/tpu.md)")
    text = "the doctor's input.json: says how many CPU cores of each host the input takes (docs/tpu.md)"
    add("--input", type=local_path, metavar="FILE", help=text)
    add("--effort", choices=["full", "fast"], default="full", help="fast: only whether it fits")
    add("--no-search", action="store_true", help="does not look for the largest batch that fits")
    add("--shardings", action="store_true", help="prints how every parameter lies on the slice, and compiles nothing")
    add("--inference", action="store_true", help="also compiles prefill and decoding (navil_jax/generate/engine.py)")
    add("--json", type=new_file, metavar="FILE", help="writes all figures")
    add("--png", type=new_drawing, metavar="FILE", help="draws where the time of each step goes")
    add("--hlo", type=new_file, metavar="FILE", help="keeps the compiled program's text")


if __name__ == "__main__":
    sys.exit(main())
