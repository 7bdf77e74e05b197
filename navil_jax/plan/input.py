"""Input: what each host of a slice has to read for the modelled steps, and what of its CPUs that takes."""

import dataclasses
import math
from typing import Any

from navil_jax.data.inspect.input_cost import IN_TRAINER, STAGES, InputCost
from navil_jax.plan.cloud import host_vcpus
from navil_jax.plan.planner import Plan


@dataclasses.dataclass(frozen=True)
class Input:
    """Of one host, by the second.

    Attributes:
      vcpus: that it has; None: not known.
      cores: of the kind that was measured, busy with samples; None: nothing was measured.
      thread: share of the time in which the trainer's one thread that packs rows is busy with workers' samples.
      bytes: of encoded images and texts.
    """

    hosts: int
    samples: float
    images: float
    vcpus: int | None
    images_per_core: float | None = None
    cores: float | None = None
    thread: float | None = None
    bytes: float | None = None

    @property
    def slowdown(self) -> float:
        """How many times as long as modelled a step takes, as the input cannot be faster; 1: it suffices."""
        limits = [self.cores / self.vcpus] if self.cores and self.vcpus else []
        return max(1.0, self.thread or 0.0, *limits)


def host_input(plan: Plan, cost: InputCost | None) -> Input:
    """Of a plan whose step is modelled. Args: cost: of a sample, as measured; None: rows are those of the plan."""
    hosts, vcpus = plan.place.hosts, host_vcpus(plan.place)
    rows = plan.rows / plan.step_seconds / hosts
    if cost is None:
        found = plan.statistics
        return Input(hosts, rows * found.samples, rows * found.images, vcpus)
    samples, images = rows * cost.samples_of_row(plan.config), cost.mean("images")
    return Input(
        hosts,
        samples,
        samples * images,
        vcpus,
        images_per_core=images / cost.core,
        cores=samples * cost.core,
        thread=samples * cost.mean(*IN_TRAINER),
        bytes=samples * cost.mean("bytes"),
    )


def text(plan: Plan, cost: InputCost | None) -> str:
    """Lines on the input of a plan whose step is modelled, with a warning where the hosts cannot keep up."""
    found = host_input(plan, cost)
    cpus = f"{found.vcpus} vCPUs" if found.vcpus else "CPUs"
    needs = (
        f"input: each of {found.hosts} hosts needs {_rate(found.images)} images/s ({_rate(found.samples)} samples/s)"
    )
    if cost is None or found.cores is None or found.thread is None or found.bytes is None:
        return (
            f"{needs} of the simulated rows;\n  what that takes of its {cpus}: call data doctor with this recipe, and "
            "then this with --input OUT/input.json"
        )
    workers = math.ceil(found.cores)
    lines = [
        f"{needs} of the measured data; measured {_rate(found.images_per_core or 0)} images/s a core: {workers:,} of "
        f"{cpus}; {found.bytes / 1e6:,.1f} MB/s from the bucket",
        "  a sample takes " + ", ".join(f"{stage} {1e3 * cost.mean(stage):.2f}" for stage in STAGES) + " ms",
        f"  packing keeps one thread of the trainer busy {found.thread:.0%} of the time",
    ]
    if workers > max(1, plan.config.data.workers):
        lines.append(f"  set config.data.workers={workers}, which is {plan.config.data.workers}")
    if found.slowdown > 1:
        step = plan.step_seconds
        lines.append(
            f"WARNING: the input does not keep up, a step takes {step * found.slowdown:.3f} s and not {step:.3f} s. "
            "What helps: images made smaller when data are converted, fewer chips for each host, smaller max_patches"
        )
    return "\n".join(lines)


def figures(plan: Plan, cost: InputCost | None) -> dict[str, Any]:
    """The same for programs."""
    found = host_input(plan, cost)
    return {**dataclasses.asdict(found), "slowdown": found.slowdown}


def cell(plan: Plan, cost: InputCost | None) -> str:
    """The same in a table of plans. Example: 28 of 208"""
    found = host_input(plan, cost)
    if found.cores is None:
        return f"{_rate(found.images)} images/s"
    late = ", too slow" if found.slowdown > 1 else ""
    return f"{math.ceil(found.cores):,} of {found.vcpus or '?'}{late}"


def _rate(value: float) -> str:
    """Example: 2310.4 -> 2,310;  3.14 -> 3.1"""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}"
