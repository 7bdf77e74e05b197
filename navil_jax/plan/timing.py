"""The time of a step, modelled from what its compiled program executes.

Three sources, told apart in every report:
  compiler  cycles of fusions and copies (its estimate, at the chip's clock)
  schedule  attention kernels: the cycles that the compiler schedules for a step of their grid (`plan/kernels.py`),
            times the steps that simulated rows need, times measured over static time
  model     collectives: bytes over the links between the devices of a group, rings and lines of the slice's torus
Collectives that the compiler runs beside other work are taken to be hidden as far as the work of their own loop goes.
Devices meet in collectives in every layer, so that in each tower all of them wait for the one whose rows hold the most
attention; how much heavier than the mean that is follows from the simulated rows.
Left out: the host, contention with other jobs on the network between slices, and slow chips.
"""

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from navil_jax.model.kernels.flash import LANES
from navil_jax.model.kernels.spare_rows import ROWS
from navil_jax.plan.hlo import Collective, Kernel, Loop, Program
from navil_jax.plan.kernels import PRODUCTS, case_of, cycles
from navil_jax.plan.statistics import BatchStatistics, executed_pairs
from navil_jax.plan.topology import Generation, Slice

HOP_SECONDS = 1e-6  # of a message from chip to chip
DRAWS = 200  # of rows for all devices, to find the heaviest one
REGISTER = 1024  # numbers that are written in a cycle


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one step on a device."""

    compute: dict[str, float]  # by label, from the compiler's cycles
    kernels: dict[str, float]  # by tower, of a device with mean rows
    waiting: float  # for the attention kernels of the device with the heaviest rows
    collectives: dict[str, float]  # by kind, were nothing hidden
    exposed: float  # of the collectives, what no work hides
    kernel_flops: dict[str, float]  # executed by the attention kernels of a device, by tower
    kernel_pairs: dict[str, float]  # computed for each pair that is needed, by tower (that of the worst kernel)
    collective_bytes: dict[str, float]  # by kind
    collective_counts: dict[str, int]  # by kind

    @property
    def work(self) -> float:
        """Compute and kernels."""
        return sum(self.compute.values()) + sum(self.kernels.values())

    @property
    def step(self) -> float:
        """With collectives hidden as far as their loops' work goes."""
        return self.work + self.waiting + self.exposed

    @property
    def slowest(self) -> float:
        """Were no collective hidden."""
        return self.work + self.waiting + sum(self.collectives.values())


def model_time(
    program: Program,
    place: Slice,
    devices: Sequence[Sequence[int]],
    groups: int,
    statistics: BatchStatistics | None,
) -> Timing:
    """Models a step.

    Args:
      program: compiled for `place`.
      devices: of every place in the mesh: the device's x, y, z, core and slice.
      groups: of devices that each have rows of their own.
      statistics: what the rows hold; None: kernels take every block.
    """
    compute: dict[str, float] = defaultdict(float)
    kernels: dict[str, float] = defaultdict(float)
    flops: dict[str, float] = defaultdict(float)
    waits: dict[str, float] = defaultdict(float)
    sizes: dict[str, float] = defaultdict(float)
    pairs: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    by_row: dict[str, np.ndarray] = {}
    rows: dict[str, int] = {}
    exposed = 0.0
    for loop in program.loops:
        for label, estimate in loop.cycles.items():
            compute[label] += loop.runs * estimate / place.generation.clock
        inside = 0.0
        for kernel in loop.kernels:
            tower = kernel.label.split(" ")[0]
            cost = _kernel_cost(kernel, place.generation, statistics)
            flops[tower] += loop.runs * cost.flops
            by_row[tower] = by_row.get(tower, 0.0) + loop.runs * cost.by_row
            kernels[tower] += loop.runs * cost.seconds
            rows[tower] = cost.rows
            pairs[tower] = max(pairs[tower], cost.pairs)
            inside += cost.seconds
        exposed += loop.runs * _exposed(loop, place, devices, inside)
        for collective in loop.collectives:
            waits[collective.kind] += loop.runs * collective_seconds(collective, place, devices)
            sizes[collective.kind] += loop.runs * collective.bytes
            counts[collective.kind] += loop.runs
    return Timing(
        compute=dict(compute),
        kernels=dict(kernels),
        waiting=sum(
            heaviest(costs, rows[tower], groups, place.hosts, statistics) - kernels[tower]
            for tower, costs in by_row.items()
            if statistics
        ),
        collectives=dict(waits),
        exposed=exposed,
        kernel_flops=dict(flops),
        kernel_pairs=dict(pairs),
        collective_bytes=dict(sizes),
        collective_counts=dict(counts),
    )


def heaviest(costs: np.ndarray, rows: int, groups: int, hosts: int, statistics: BatchStatistics) -> float:
    """What the heaviest of the groups of devices has to do in a step: the mean over steps of drawn rows.

    Every host draws the rows of `statistics.balance_window` steps and groups them as `data.grouping` does.

    Args:
      costs: of each simulated row, in any unit.
      rows: of a group in a step.

    Example: costs 1 1 1 5, one row for each of 64 groups -> 5; one row for a single group -> about 2
    """
    hosts = math.gcd(hosts, groups)
    own, steps = rows * groups // hosts, statistics.balance_window
    drawn = np.random.default_rng(0).integers(len(costs), size=(DRAWS, hosts, steps * own))
    order = np.argsort(np.array(statistics.costs)[drawn], axis=2).reshape(DRAWS, hosts, steps, own)
    order.sort(axis=3)  # rows of a step as they came
    drawn = np.take_along_axis(drawn, order.reshape(drawn.shape), axis=2).reshape(order.shape)
    by_group = costs[drawn].swapaxes(1, 2).reshape(DRAWS * steps, groups, rows)
    return float(by_group.sum(axis=2).max(axis=1).mean())


def _exposed(loop: Loop, place: Slice, devices: Sequence[Sequence[int]], kernels: float) -> float:
    """Seconds of one run's collectives that its work does not hide."""
    apart, between = 0.0, 0.0
    for collective in loop.collectives:
        seconds = collective_seconds(collective, place, devices)
        apart, between = (apart + seconds, between) if collective.overlapped else (apart, between + seconds)
    work = kernels + sum(loop.cycles.values()) / place.generation.clock
    return between + max(0.0, apart - work)


def collective_seconds(collective: Collective, place: Slice, devices: Sequence[Sequence[int]]) -> float:
    """Seconds of a collective, by the bandwidth of the axes of the torus that its group spans.

    A ring passes both ways, so that n devices gather V bytes in V (n-1)/n / (2 links); a line in V (n-1)/n / link.
    Several axes add up. An all-reduce is a reduce-scatter and an all-gather. Between slices every chip has its share of
    the data centre network, and only its part of the array goes there.
    """
    group = [devices[number] for number in collective.devices]
    count = len(group)
    if count < 2:
        return 0.0
    bandwidth, hops = _bandwidth(group, place)
    slices = len({device[4] for device in group})
    local = count / slices
    passes = 2 if collective.kind == "all-reduce" else 1
    if collective.kind == "collective-permute":
        if slices > 1:
            return collective.bytes / _dcn(place) + HOP_SECONDS
        return collective.bytes / place.generation.link + HOP_SECONDS
    if collective.kind == "all-to-all":
        inside = collective.bytes * local / 4 / bandwidth if bandwidth else 0.0
    else:
        inside = collective.bytes * (local - 1) / local / bandwidth if bandwidth else 0.0
    across = collective.bytes / local * (slices - 1) / slices / _dcn(place) if slices > 1 else 0.0
    return passes * (inside + across + hops * HOP_SECONDS)


def _dcn(place: Slice) -> float:
    return place.generation.dcn / place.generation.devices_per_chip


def _bandwidth(group: Sequence[Sequence[int]], place: Slice) -> tuple[float, float]:
    """Bytes/s into each device of a group inside its slice (0: it has no two chips), and the hops to its far end."""
    bandwidth, hops = 0.0, 0.0
    for axis, side in enumerate(place.shape):
        extent = len({device[axis] for device in group})
        if extent > 1:
            ring = place.wrap[axis] and extent == side
            bandwidth += place.generation.link * (2 if ring else 1)
            hops += extent / 2 if ring else extent - 1
    cores = len({device[3] for device in group})
    if not bandwidth and cores > 1:  # the two devices of a chip
        return 6 * place.generation.link, 0.0
    return bandwidth * cores / place.generation.devices_per_chip, hops


class _KernelCost(NamedTuple):
    flops: float  # of a device whose rows are the mean
    by_row: np.ndarray  # seconds of each simulated row
    rows: int  # of a device
    pairs: float  # computed for each that is needed

    @property
    def seconds(self) -> float:
        """Of a device whose rows are the mean."""
        return self.rows * float(self.by_row.mean())


def _kernel_cost(kernel: Kernel, generation: Generation, statistics: BatchStatistics | None) -> _KernelCost:
    case = case_of(kernel)
    if case is None or kernel.name.endswith("_exact"):  # the exact way runs only where scores leave their range
        return _KernelCost(0.0, np.zeros(1), 1, 0.0)
    step = cycles(case, generation.name)
    arrays = [sizes for shape in kernel.operands if shape[0] != "s" and len(sizes := _sizes(shape)) > 1]
    if case.name not in PRODUCTS:  # on every register of heads, at every position
        rows, length = arrays[0]
        steps = -(-rows // ROWS) * (length // case.block)
        found = np.array([steps * step.computed / generation.cores / generation.clock * generation.kernel_factor])
        return _KernelCost(0.0, found, 1, 0.0)
    first, splash = arrays[0], case.name.startswith("splash")
    if splash:
        heads, length = math.prod(first[:-2]), first[-2]
    else:  # the encoder's arrays are turned
        heads, length = (
            (first[0] // LANES, first[1]) if case.name.startswith("packed") else (first[1] // LANES, first[0])
        )
    rows, pairs, needed = _pairs(kernel, statistics, length, case.block)
    blocks, computed = length / rows / case.block, pairs / case.block**2
    groups = math.ceil(heads / case.heads / generation.cores)
    if not splash:
        taken = computed * step.computed + blocks * step.once
    else:
        visited = math.prod(_sizes(next(shape for shape in kernel.operands if shape[0] == "s")))
        taken = np.maximum(visited / rows, computed) * step.empty + computed * step.work + blocks * step.once
    taken = taken * groups * generation.kernel_factor / generation.clock
    if case.name in ("packed_bwd", "wide_bwd"):  # gradients of a row's queries are zeroed, and copied to HBM
        numbers = case.heads * case.width * length / rows
        copying = 4 * generation.cores / generation.bandwidth
        taken = taken + groups * numbers * (1 / REGISTER / generation.clock + copying)
    flops = 2.0 * PRODUCTS[case.name] * float(pairs.mean()) * heads * case.width
    return _KernelCost(rows * flops, taken, rows, float(pairs.mean()) / needed if needed else 0.0)


def _sizes(shape: str) -> tuple[int, ...]:
    """Example: bf16[16,8192,128] -> 16 8192 128"""
    return tuple(int(size) for size in shape.partition("[")[2].rstrip("]").split(",") if size)


def _pairs(
    kernel: Kernel, statistics: BatchStatistics | None, length: int, block: int
) -> tuple[int, np.ndarray, float]:
    """Rows of a device, pairs that the kernel computes for each head in each simulated row, and the mean of needed."""
    if statistics is None:
        return 1, np.array([float(length) ** 2]), 0.0
    causal = not kernel.label.startswith("vision")
    lengths = statistics.token_lengths if causal else statistics.patch_lengths
    slots = statistics.token_slots if causal else statistics.patch_slots
    needed = statistics.counts.token_pairs if causal else statistics.counts.patch_pairs
    return length // (-(-slots // block) * block), executed_pairs(lengths, slots, block, block, causal), needed
