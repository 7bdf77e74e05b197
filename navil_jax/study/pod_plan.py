"""Days and chip-hours of a plan on a TPU slice, by the pod planner (`python -m navil_jax.plan`)."""

import dataclasses
import tempfile
from pathlib import Path

from navil_jax.config.flags import load_config
from navil_jax.plan.planner import Plan, batch_shards, make_plan
from navil_jax.plan.statistics import simulate
from navil_jax.plan.topology import Slice, parse_topology
from navil_jax.study.known_llms import KnownLlm
from navil_jax.study.planner import Advice
from navil_jax.study.recipe_file import write_recipes


def slice_plan(advice: Advice, llm: KnownLlm, topology: str) -> str:
    """Compiles every stage for the slice and adds up the time; takes minutes.

    Raises:
      UserError: no such slice, the TPU compiler is missing, or a stage cannot be laid out on it.
    """
    place = parse_topology(topology)
    lines, days = [f"\non {topology} ({place.chips} chips), for packed rows of the planner's own mixtures:"], 0.0
    with tempfile.TemporaryDirectory() as folder:
        paths = write_recipes(Path(folder) / "planned.py", advice, llm)
        for path, stage in zip(paths, advice.stages, strict=True):
            plan = _stage_plan(path, stage.recipe.name, place)
            if not plan.fits:
                lines.append(f"  {stage.recipe.name}: does not fit; take a larger slice")
                continue
            days += plan.days
            lines.append(
                f"  {stage.recipe.name}: {plan.days:.1f} days, {plan.chip_hours:,.0f} chip-hours; "
                f"{plan.rows} rows a step, "
                f"{plan.samples_per_second:,.0f} samples/s, {plan.mfu:.0%} of the peak (modelled)"
            )
    lines.append(f"  together {days:.1f} days, {days * 24 * place.chips:,.0f} chip-hours (docs/tpu.md says how sure)")
    return "\n".join(lines)


def _stage_plan(path: Path, stage: str, place: Slice) -> Plan:
    """With the recipe's rows, or as many as fit where those do not."""
    config = load_config(path)
    shards = batch_shards(config.mesh, place)
    rows = max(1, round(config.data.rows / shards)) * shards
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, rows=rows))
    statistics = simulate(config, "instructions" if stage == "S2" else "captions")
    first = make_plan(config, place, statistics, effort="fast", search=False)
    return make_plan(config, place, statistics, rows=None if first.fits else 0, search=False)
