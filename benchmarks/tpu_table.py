"""The table of docs/tpu.md: every stage of NaViL-2B and 9B, planned on several slices.

    python -m benchmarks.tpu_table                       # what is missing is compiled, minutes each
    python -m benchmarks.tpu_table --only 9b_s2 --write  # those whose name holds 9b_s2; puts the tables into the page

Figures of each plan are kept in benchmarks/tpu_plans/, one JSON file each; those whose program has changed since are
compiled anew when the file is deleted. Nothing runs on a TPU: see docs/tpu.md for what the figures are.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from navil_jax.config.flags import load_config
from navil_jax.console import markdown_table
from navil_jax.errors import UserError, report_user_errors
from navil_jax.plan.__main__ import parse_mesh
from navil_jax.plan.planner import as_json, batch_shards, make_plan
from navil_jax.plan.statistics import simulate
from navil_jax.plan.topology import GIB, parse_topology

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "tpu_plans"
PAGE = ROOT / "docs" / "tpu.md"
BEGIN, END = "<!-- table: python -m benchmarks.tpu_table --write -->", "<!-- end of the table -->"
COSTS = "<!-- table of costs: python -m benchmarks.tpu_table --write -->", "<!-- end of costs -->"

STAGES = ("s1_1", "s1_2", "s2")
SLICES = ("v5e-256", "v5p-128", "v6e-64", "v6e-256", "tpu7x-128")


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table."""

    recipe: str
    topology: str
    mesh: str = "fsdp=-1"
    remat: str = "attention"

    @property
    def name(self) -> str:
        return f"{self.recipe}_{self.topology}_{self.mesh.replace('=', '').replace(',', '_')}_{self.remat}"


# (model, slice) -> mesh and remat, where they are others than fsdp=-1 and "attention". The encoder of the 2B model is
# 1,472 = 64 x 23 wide, so that its parameters divide over at most 64 devices.
OTHERS: dict[tuple[str, str], tuple[str, str]] = {
    ("navil_2b", "v5e-256"): ("data=4,fsdp=64", "full"),
    ("navil_2b", "v6e-256"): ("data=4,fsdp=64", "attention"),
    ("navil_2b", "tpu7x-128"): ("data=2,fsdp=64", "attention"),
    ("navil_9b", "v5e-256"): ("fsdp=128,context=2", "full"),
    ("navil_9b", "v6e-64"): ("fsdp=-1", "full"),
    ("navil_9b", "v6e-256"): ("fsdp=-1", "full"),
    ("navil_9b_tpu", "v6e-64"): ("fsdp=-1", "full"),
}


def cases() -> list[Case]:
    """All lines, in the order of the table."""
    found = []
    for model in ("navil_2b", "navil_9b"):
        for stage in STAGES:
            for topology in SLICES:
                found.append(Case(f"{model}_{stage}", topology, *OTHERS.get((model, topology), ())))
    for model in ("navil_2b_tpu", "navil_9b_tpu"):
        for stage in ("s1_1", "s2"):
            for topology in ("v5p-128", "v6e-64"):
                found.append(Case(f"{model}_{stage}", topology, *OTHERS.get((model, topology), ())))
    return found


def measure(case: Case) -> dict[str, Any]:
    """The figures of a case, compiled if they are not kept.

    Raises:
      UserError: the planner refuses the case.
    """
    file = FOLDER / f"{case.name}.json"
    if not file.is_file():
        config = load_config(ROOT / "configs" / f"{case.recipe}.py")
        model = dataclasses.replace(config.model, remat=case.remat)
        config = dataclasses.replace(config, mesh=parse_mesh(case.mesh, config.mesh), model=model)
        place = parse_topology(case.topology)
        mixture = "instructions" if case.recipe.endswith("s2") else "captions"
        rows = batch_shards(config.mesh, place)  # one for each group of devices
        figures = as_json(make_plan(config, place, simulate(config, mixture), rows, search=False))
        FOLDER.mkdir(exist_ok=True)
        file.write_text(json.dumps(figures, indent=2) + "\n")
    return json.loads(file.read_text())


def line(case: Case, figures: dict[str, Any]) -> dict[str, str]:
    """A line of the table."""
    cells = {
        "recipe": _recipe(case),
        "slice": case.topology,
        "mesh": case.mesh.replace("fsdp=-1", "fsdp").replace(",", ", "),
        "remat": case.remat,
    }
    rest = ("HBM GiB", "step s", "kernels s", "waiting s", "exposed s", "MFU", "tokens/s/chip", "days", "compile s")
    if figures["hbm_bytes"] is None:
        return cells | dict.fromkeys(rest, "refused")
    memory = f"{figures['hbm_bytes'] / GIB:.1f} / {figures['hbm_limit_bytes'] / GIB:.1f}"
    if not figures["fits"]:
        return cells | dict.fromkeys(rest, "does not fit") | {"HBM GiB": memory}
    timing = figures["timing"]
    return cells | {
        "HBM GiB": memory,
        "step s": f"{figures['step_seconds']:.2f}",
        "kernels s": f"{sum(timing['kernels'].values()):.2f}",
        "waiting s": f"{timing['waiting']:.2f}",
        "exposed s": f"{timing['exposed']:.2f}",
        "MFU": f"{figures['mfu']:.1%}",
        "tokens/s/chip": f"{figures['tokens_per_second'] / figures['chips']:,.0f}",
        "days": f"{figures['days']:.1f}",
        "compile s": f"{figures['compile_seconds']:.0f}",
    }


def costs(case: Case, figures: dict[str, Any]) -> dict[str, str]:
    """What the three largest parts of a step are, and how much of the kernels and products is useful."""
    timing, ratios = figures["timing"], figures["executed_over_useful"]
    parts = dict(timing["compute"]) | {f"{tower} attention": time for tower, time in timing["kernels"].items()}
    parts |= {"waiting for the heaviest rows": timing["waiting"], "collectives": timing["exposed"]}
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    names = ("vision linear", "vision attention", "decoder linear", "decoder attention", "head")
    return {
        "recipe": _recipe(case),
        "slice": case.topology,
        "largest costs": ", ".join(f"{name} {seconds / figures['step_seconds']:.0%}" for name, seconds in largest),
    } | {name: f"{ratios[name]:.2f}" for name in names}


def _recipe(case: Case) -> str:
    return case.recipe.removeprefix("navil_").replace("_s", " s")


def kept(case: Case) -> dict[str, Any] | None:
    file = FOLDER / f"{case.name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def write(text: str, begin: str, end: str) -> None:
    """Puts a table between two marks of the page."""
    before, _, rest = PAGE.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise UserError(f"{PAGE}: the lines {begin} and {end} are missing")
    PAGE.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="plans cases whose name holds this; others are taken as kept")
    parser.add_argument("--kept", action="store_true", help="compiles nothing")
    parser.add_argument("--write", action="store_true", help=f"puts the tables into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args(argv)
    lines, largest = [], []
    for case in cases():
        wanted = not options.kept and options.only in case.name
        figures = measure(case) if wanted else kept(case)
        if figures:
            lines.append(line(case, figures))
        if figures and "timing" in figures:
            largest.append(costs(case, figures))
    for found, marks in ((lines, (BEGIN, END)), (largest, COSTS)):
        text = markdown_table(found) if found else "Nothing is planned yet."
        print(text, end="\n\n")
        if options.write:
            write(text, *marks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
