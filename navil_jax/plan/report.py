"""Plans as text, tables and an image."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from navil_jax.console import table
from navil_jax.data.inspect.input_cost import InputCost
from navil_jax.model.flops import PARTS
from navil_jax.plan import input as host_input
from navil_jax.plan.planner import Inference, Plan, executed_over_useful
from navil_jax.plan.timing import Timing
from navil_jax.plan.topology import GIB, Slice

SHOWN_COSTS = 8  # of the largest ones


def text(plan: Plan, cost: InputCost | None = None) -> str:
    """The whole plan, for people. Args: cost: of a sample on the hosts' CPUs, where it was measured."""
    parts = [_head(plan), _rows(plan), _memory(plan)]
    if plan.timing:
        parts += [_time(plan, plan.timing), _costs(plan, plan.timing), _collectives(plan.timing), _flops(plan)]
        parts.append(host_input.text(plan, cost))
    else:
        parts.append("time: not modelled, as " + ("the step does not fit" if not plan.fits else "effort is fast"))
    if not plan.fits:
        parts.append(_advice(plan))
    return "\n\n".join([*parts, _sources(plan)])


def _head(plan: Plan) -> str:
    place, mesh = plan.place, plan.compiled.mesh
    shape = " x ".join(map(str, place.shape))
    slices = f"{place.slices} slices of " if place.slices > 1 else ""
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one device"
    verdict = "FITS" if plan.fits else "DOES NOT FIT"
    return (
        f"{place.name}: {slices}{shape} chips, {place.hosts} hosts, {place.devices} devices "
        f"({plan.compiled.device_kind}); mesh {axes}\n"
        f"{plan.rows} rows a step, {plan.rows / plan.shards:g} for each of {plan.shards} groups of devices: {verdict}"
    )


def _rows(plan: Plan) -> str:
    data, found = plan.config.data, plan.statistics
    counts = found.counts
    fill = ", ".join(f"{name} {share:.0%}" for name, share in found.fill.items())
    lines = [
        f"rows of {data.visual_slots:,} visual, {data.text_slots:,} text and {data.patch_slots:,} patch slots hold",
        f"  {found.samples:.1f} samples, {counts.visual_tokens:,.0f} visual and {counts.text_tokens:,.0f} text tokens, "
        f"{counts.patches:,.0f} patches (filled: {fill})",
        f"  {found.origin}",
    ]
    if min(found.fill.values()) < 0.9:
        advice = found.advice
        lines.append(
            f"  these samples would fill {advice.visual_slots:,} visual, {advice.text_slots:,} text and "
            f"{advice.patch_slots:,} patch slots alike"
        )
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    compiled, limit = plan.compiled, plan.place.generation.hbm
    if math.isinf(compiled.total):
        return f"the compiler refuses it: {compiled.refusal}"
    lines = [f"HBM of a device: {compiled.total / GIB:.2f} of {limit / GIB:.2f} GiB (compiler)"]
    for name, size in compiled.state.items():
        if size:
            lines.append(f"  {size / GIB:8.2f}  {name}")
    if compiled.memory:
        memory = compiled.memory
        others = {
            "padding of their layouts": memory["argument"] - sum(compiled.state.values()),
            "activations, gradients and other temporaries": memory["temp"],
            "results that replace no argument": memory["output"] - memory["alias"],
            "program": memory["generated_code"],
        }
        lines += [f"  {size / GIB:8.2f}  {name}" for name, size in others.items() if size > 0.005 * GIB]
        if memory["host_temp"]:
            lines.append(f"  {memory['host_temp'] / GIB:8.2f}  on the host (offloaded), not counted above")
    else:
        rest = compiled.total - sum(compiled.state.values())
        lines.append(f"  {rest / GIB:8.2f}  activations, gradients, other temporaries and the program")
    if plan.largest_rows is not None:
        most = plan.largest_rows
        per = most / plan.shards
        lines.append(
            f"largest batch that fits: {most} rows, {per:g} for each group (by memory at little effort)"
            if most
            else "not even one row for each group of devices fits"
        )
    return "\n".join(lines)


def _time(plan: Plan, timing: Timing) -> str:
    peak = plan.place.generation.peak
    compute, kernels = sum(timing.compute.values()), sum(timing.kernels.values())
    hidden = max(0.0, sum(timing.collectives.values()) - timing.exposed)
    chips = plan.place.chips
    samples = "steps x batch_samples" if plan.config.batch_samples else "steps x samples of a step"
    return "\n".join(
        [
            f"step: {timing.step:.3f} s modelled ({timing.slowest:.3f} s if no collective were hidden)",
            f"  {compute:8.3f}  compute (compiler's cycles at {plan.place.generation.clock / 1e9:g} GHz)",
            f"  {kernels:8.3f}  attention kernels (model)",
            f"  {timing.waiting:8.3f}  waiting for the device with the heaviest attention (model)",
            f"  {timing.exposed:8.3f}  collectives that nothing hides; {hidden:.3f} s more run beside work (model)",
            f"MFU: {plan.mfu:.1%} modelled (useful FLOPs on real tokens; peak {peak / 1e12:g} TFLOP/s a device, bf16)",
            f"{plan.tokens_per_second:,.0f} tokens/s ({plan.tokens_per_second / chips:,.0f} a chip), "
            f"{plan.samples_per_second:,.1f} samples/s",
            f"{plan.days:.2f} days, {plan.chip_hours:,.0f} chip-hours for {plan.samples:,.0f} samples ({samples})",
        ]
    )


def _costs(plan: Plan, timing: Timing) -> str:
    costs = dict(timing.compute) | {f"{tower} attention kernels": time for tower, time in timing.kernels.items()}
    costs["waiting for the heaviest rows"] = timing.waiting
    costs["collectives that nothing hides"] = timing.exposed
    largest = sorted(costs.items(), key=lambda item: -item[1])[:SHOWN_COSTS]
    return "\n".join(
        ["largest costs:"] + [f"  {seconds:8.3f}  {seconds / timing.step:5.1%}  {name}" for name, seconds in largest]
    )


def _collectives(timing: Timing) -> str:
    rows = [
        (kind, f"{size / GIB:.2f}", f"{timing.collective_counts[kind]:,}", f"{timing.collectives[kind]:.3f}")
        for kind, size in sorted(timing.collective_bytes.items(), key=lambda item: -item[1])
    ]
    return table(("collectives of a device and step", "GiB", "count", "seconds"), rows) if rows else "no collectives"


def _flops(plan: Plan) -> str:
    ratios = executed_over_useful(plan)
    rows = [
        (
            part,
            f"{plan.useful[part].forward / 1e12:.1f}",
            f"{plan.useful[part].backward / 1e12:.1f}",
            f"{ratios[part]:.2f}" if part in ratios else "-",
        )
        for part in PARTS
        if plan.useful[part].forward
    ]
    return (
        table(("useful FLOPs of a step (T)", "forward", "backward", "executed/useful"), rows)
        + "\n  executed: with empty slots; in attention with the masked pairs of whole blocks; without recomputation"
    )


def _advice(plan: Plan) -> str:
    """By how much it does not fit, and what to change."""
    return "\n".join([f"{_excess(plan)}. What helps:", *(f"  {line}" for line in _remedies(plan))])


def _excess(plan: Plan) -> str:
    over = (plan.compiled.total - plan.place.generation.hbm) / GIB
    return "Too much for each device" if math.isinf(over) else f"{over:.2f} GiB too much for each device"


def _remedies(plan: Plan) -> list[str]:
    """What to change, by what takes the most."""
    compiled, config = plan.compiled, plan.config
    state = sum(compiled.state.values())
    lines = []
    if plan.largest_rows:
        lines.append(f"fewer rows: --batch {plan.largest_rows} fits")
        if config.optimizer.microbatches == 1:
            lines.append("the same rows in parts: --config.optimizer.microbatches=2 (as many steps, less memory)")
    elif plan.largest_rows == 0:
        lines.append(
            "not even one row fits: split rows (--mesh fsdp=-1,context=2) or weights (--mesh fsdp=-1,tensor=2)"
        )
    if config.model.remat in ("none", "attention", "dots"):
        lines.append("recompute in the backward pass: --config.model.remat=full")
    if state > plan.place.generation.hbm / 2:
        lines.append("parameters and optimizer take most: more chips, or more of them on the axis fsdp")
        if compiled.mesh["data"] > 1:
            lines.append(
                f"every one of data={compiled.mesh['data']} groups holds all parameters: --mesh data=1,fsdp=-1"
            )
    lines.append("shorter rows: fewer slots (config.data.visual_slots, text_slots, patch_slots)")
    return lines


def _sources(plan: Plan) -> str:
    generation, compiled = plan.place.generation, plan.compiled
    return (
        f"From the TPU compiler: memory, cycles outside of kernels, which collectives (compiled in "
        f"{compiled.seconds:.0f} s, {compiled.host_bytes / GIB:.1f} GiB of host memory).\n"
        f"From the compiler's schedules: cycles of attention kernels (static, times {generation.kernel_factor:g}).\n"
        f"From a model: collectives at {generation.link / 1e9:g} GB/s a link and direction; the rows' contents.\n"
        "Left out: the host (start-up, checkpoints, evaluation), contention on the network, slow or lost "
        "chips. Nothing of it was run on a TPU."
    )


def inference_text(found: Sequence[Inference], place: Slice) -> str:
    """Prefill and decoding, a line each."""
    lines = []
    for one in found:
        compiled, what = one.compiled, {"prefill": "prompts as long as a row", "decode": "a token for each"}[one.task]
        need = f"{compiled.total / GIB:.2f} of {place.generation.hbm / GIB:.2f} GiB"
        time = f"{one.timing.step * 1e3:,.1f} ms modelled" if one.timing else "DOES NOT FIT"
        lines.append(f"{one.task} of {one.rows} rows ({what}): {need}, {time}")
    return "\n".join(lines)


COLUMNS = (
    *("topology", "mesh", "rows/group", "HBM GiB", "largest"),
    *("step s", "MFU", "tokens/s", "days", "chip-hours", "input of a host"),
)


def row(plan: Plan, cost: InputCost | None = None) -> dict[str, str]:
    """One line of the table of a sweep, by column. Args: cost: as of `text`."""
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.compiled.mesh.items() if size > 1)
    cells = {
        "topology": plan.place.name,
        "mesh": mesh,
        "rows/group": f"{plan.rows / plan.shards:g}",
        "HBM GiB": f"{plan.compiled.total / GIB:.1f} of {plan.place.generation.hbm / GIB:.1f}",
        "largest": "-" if plan.largest_rows is None else f"{plan.largest_rows / plan.shards:g}",
    }
    if not plan.timing:
        return cells | dict.fromkeys(COLUMNS[5:], "-" if plan.fits else "does not fit")
    return cells | {
        "step s": f"{plan.timing.step:.3f}",
        "MFU": f"{plan.mfu:.1%}",
        "tokens/s": f"{plan.tokens_per_second:,.0f}",
        "days": f"{plan.days:.1f}",
        "chip-hours": f"{plan.chip_hours:,.0f}",
        "input of a host": host_input.cell(plan, cost),
    }


def draw(path: str | Path, plans: Sequence[Plan]) -> None:
    """A line per plan: the memory that it needs, and where its step's time goes or why it has none."""
    from matplotlib.figure import Figure  # needed by nothing else here

    figure = Figure(figsize=(12, 1.8 + 0.6 * len(plans)), layout="constrained")
    memory, time = figure.subplots(1, 2, sharey=True, width_ratios=(1, 2))
    places = range(len(plans))
    needed = [plan.compiled.total / plan.place.generation.hbm for plan in plans]
    shown = [min(share, 2.0) for share in needed]
    memory.barh(places, shown, color=["tab:blue" if plan.fits else "tab:red" for plan in plans])
    for place, (plan, share) in enumerate(zip(plans, needed, strict=True)):
        said = "another memory is full" if math.isinf(share) else row(plan)["HBM GiB"] + " GiB"
        memory.text(0.02, place, said, va="center", fontsize=8, color="white", fontweight="bold")
    memory.axvline(1, color="black", linestyle="--")
    memory.set(xlim=(0, max(1.1, *shown)), xlabel="memory of a device, as a share of what it has")
    memory.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    names = [f"{plan.place.name}\n{row(plan)['mesh']}, {plan.rows / plan.shards:g} rows a group" for plan in plans]
    memory.set_yticks(places, names, fontsize=8)
    memory.invert_yaxis()
    _draw_time(time, plans)
    figure.savefig(path, dpi=130)


def _draw_time(axes: Any, plans: Sequence[Plan]) -> None:
    """Bars of seconds, on matplotlib's axes."""
    times = {
        "compute (compiler)": [sum(p.timing.compute.values()) if p.timing else 0.0 for p in plans],
        "attention kernels (model)": [sum(p.timing.kernels.values()) if p.timing else 0.0 for p in plans],
        "waiting for the heaviest rows (model)": [p.timing.waiting if p.timing else 0.0 for p in plans],
        "collectives not hidden (model)": [p.timing.exposed if p.timing else 0.0 for p in plans],
    }
    ends = [0.0] * len(plans)
    for name, values in times.items():
        axes.barh(range(len(plans)), values, left=ends, label=name)
        ends = [a + b for a, b in zip(ends, values, strict=True)]
    for place, (plan, end) in enumerate(zip(plans, ends, strict=True)):
        axes.text(end, place, f" {_verdict(plan)}", va="center", fontsize=8)
    axes.set(xlim=(0, 1.5 * max(ends) or 1.0), xlabel="modelled seconds a step")
    if max(ends):
        axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    else:
        axes.set(xticks=[], xlabel="no time is modelled")


def _verdict(plan: Plan) -> str:
    if not plan.fits:
        return f"does not fit: {_excess(plan)}\n {_remedies(plan)[0]}"
    return f"{plan.days:.1f} days, MFU {plan.mfu:.0%}" if plan.timing else "fits"
