"""The time of a step, modelled from what its compiled program executes.

Three sources, told apart in every report:
  compiler  cycles of fusions and copies (its estimate, at the chip's clock)
  model     attention kernels: FLOPs of the blocks that they compute, at a stated share of the peak, as the compiler
            says nothing of their inside
  model     collectives: bytes over the links between the devices of a group, rings and lines of the slice's torus
Collectives that the compiler runs beside other work are taken to be hidden as far as the work of their own loop goes.
Devices meet in collectives in every layer, so that in each tower all of them wait for the one whose rows hold the most
attention; how much heavier than the mean that is follows from the simulated rows.
Left out: the host, contention with other jobs on the network between slices, and slow chips.
"""

import dataclasses
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from navil_jax.plan.hlo import Collective, Kernel, Loop, Program
from navil_jax.plan.statistics import BatchStatistics, executed_pairs
from navil_jax.plan.topology import Slice

HOP_SECONDS = 1e-6  # of a message from chip to chip
EMPTY_STEP_SECONDS = 0.35e-6  # of a grid step of a kernel that computes nothing
DRAWS = 200  # of rows for all devices, to find the heaviest one
LANES = 128  # a smaller head fills the matrix unit only in part

# A splash kernel -> products of its inside, each 2 FLOPs per pair, head and feature.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


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
    efficiency: float,
) -> Timing:
    """Models a step.

    Args:
      program: compiled for `place`.
      devices: of every place in the mesh: the device's x, y, z, core and slice.
      groups: of devices that each have rows of their own.
      statistics: what the rows hold; None: kernels take every block.
      efficiency: share of the peak that attention kernels reach with heads of 128.
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
        for label, cycles in loop.cycles.items():
            compute[label] += loop.runs * cycles / place.generation.clock
        inside = 0.0
        for kernel in loop.kernels:
            tower = kernel.label.split(" ")[0]
            cost = _kernel_cost(kernel, place, statistics, efficiency)
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


def _kernel_cost(kernel: Kernel, place: Slice, statistics: BatchStatistics | None, efficiency: float) -> _KernelCost:
    products = next((count for word, count in _PRODUCTS.items() if f"_{word}" in kernel.name), 0)
    shapes = [_ARRAY.fullmatch(operand) for operand in kernel.operands]
    grids, queries = (
        [_sizes(shape) for shape in shapes if shape and (shape[1][0] == "s") == table] for table in (True, False)
    )
    if not products or not grids or not queries:
        return _KernelCost(0.0, np.zeros(1), 1, 0.0)
    heads, places, features = queries[0]
    settings = json.loads(kernel.settings) if kernel.settings else {}
    suffix = {"fwd": "", "dq": "_dq", "dkv": "_dkv"}[next(word for word in _PRODUCTS if f"_{word}" in kernel.name)]
    block_q, block_kv = settings.get(f"block_q{suffix}", 512), settings.get(f"block_kv{suffix}", 512)
    rows, pairs, needed = _pairs(kernel, statistics, places, block_q, block_kv)
    work = 2.0 * products * pairs * heads * features
    passed = math.prod(grids[0]) / rows - pairs / (block_q * block_kv)
    share = efficiency * min(1.0, features / LANES)
    seconds = work / (place.generation.peak * share) + heads * np.maximum(passed, 0.0) * EMPTY_STEP_SECONDS
    return _KernelCost(rows * float(work.mean()), seconds, rows, float(pairs.mean()) / needed if needed else 0.0)


_ARRAY = re.compile(r"([a-z]\w*)\[(\d+,\d+,\d+(?:,\d+)?)\]")  # with three dimensions, or heads in groups


def _sizes(shape: re.Match[str]) -> tuple[int, int, int]:
    """The three dimensions of an array, those of groups of heads as one."""
    *heads, rows, columns = (int(size) for size in shape[2].split(","))
    return math.prod(heads), rows, columns


def _pairs(
    kernel: Kernel, statistics: BatchStatistics | None, places: int, block_q: int, block_kv: int
) -> tuple[int, np.ndarray, float]:
    """Rows of a device, pairs that the kernel computes for each head in each simulated row, and the mean of needed."""
    if statistics is None:
        return 1, np.array([float(places) ** 2]), 0.0
    causal = not kernel.label.startswith("vision")
    lengths = statistics.token_lengths if causal else statistics.patch_lengths
    slots = statistics.token_slots if causal else statistics.patch_slots
    needed = statistics.counts.token_pairs if causal else statistics.counts.patch_pairs
    rows = places // (-(-slots // block_q) * block_q)
    return rows, executed_pairs(lengths, slots, block_q, block_kv, causal), needed
