"""The time model: collectives over rings and lines, overlap, kernels, and what blocks attention executes."""

import dataclasses
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from navil_jax.model.blocks import needed_blocks
from navil_jax.model.flops import Counts
from navil_jax.plan import timing as timing_module
from navil_jax.plan.hlo import Collective, Kernel, Loop, Program
from navil_jax.plan.schedule import Cycles
from navil_jax.plan.statistics import BatchStatistics, executed_pairs
from navil_jax.plan.timing import HOP_SECONDS, Timing, collective_seconds, heaviest, model_time
from navil_jax.plan.topology import Slice, parse_topology

GB = 1e9


def places(place: Slice) -> list[list[int]]:
    """x, y, z, core, slice of every device, the last chip coordinate fastest."""
    shape = (*place.shape, 1)[:3]
    cores = place.generation.devices_per_chip
    grid = [[*chip, core] for chip in np.ndindex(*shape) for core in range(cores)]
    return [[*device, number] for number in range(place.slices) for device in grid]


def seconds(place: Slice, kind: str, devices: tuple[int, ...], size: float = GB) -> float:
    return collective_seconds(Collective(kind, size, devices, False, ""), place, places(place))


def test_a_ring_passes_both_ways_and_a_line_one_way():
    ring, line = parse_topology("v5p-128"), parse_topology("v5p-64")
    row = tuple(range(4))  # along z
    assert seconds(ring, "all-gather", row) == pytest.approx(0.75 * GB / 200e9 + 2 * HOP_SECONDS)
    assert seconds(line, "all-gather", row) == pytest.approx(0.75 * GB / 100e9 + 3 * HOP_SECONDS)


def test_axes_of_the_torus_add_up():
    cube = parse_topology("v5p-128")
    assert seconds(cube, "reduce-scatter", tuple(range(64))) == pytest.approx(63 / 64 * GB / 600e9 + 6 * HOP_SECONDS)


def test_kinds():
    cube, row = parse_topology("v5p-128"), tuple(range(4))
    gather = seconds(cube, "all-gather", row)
    assert seconds(cube, "all-reduce", row) == pytest.approx(2 * gather)
    assert seconds(cube, "all-to-all", row) == pytest.approx(4 * GB / 4 / 200e9 + 2 * HOP_SECONDS)
    assert seconds(cube, "collective-permute", (0, 1)) == pytest.approx(GB / 100e9 + HOP_SECONDS)
    assert seconds(cube, "all-gather", (3,)) == seconds(cube, "all-gather", ()) == 0


def test_between_slices_the_data_centre_network_counts():
    two = parse_topology("2xv5e-256")
    across = seconds(two, "all-reduce", (0, 256))
    assert across == pytest.approx(2 * (GB / 2 / 3.125e9))
    both = seconds(two, "all-reduce", tuple(range(512)))
    inside, outside = 255 / 256 * GB / 200e9, GB / 256 / 2 / 3.125e9
    assert both == pytest.approx(2 * (inside + outside + 16 * HOP_SECONDS))


@hypothesis.given(size=st.floats(1, 1e12), more=st.floats(1, 8), kind=st.sampled_from(["all-gather", "all-reduce"]))
def test_more_bytes_never_take_less(size: float, more: float, kind: str):
    place = parse_topology("v6e-64")
    assert seconds(place, kind, (0, 1, 2, 3), size) <= seconds(place, kind, (0, 1, 2, 3), size * more)


def test_overlap_goes_as_far_as_the_loop_has_work():
    place = parse_topology("v5p-128")
    row = (0, 1, 2, 3)
    apart, between = Collective("all-gather", GB, row, True, ""), Collective("all-gather", GB / 2, row, False, "")
    loop = Loop("body", 10, {"decoder": 1.75e6}, (apart, between), ())  # a millisecond of work
    timing = model_time(Program((loop,)), place, places(place), 1, None)
    long, short = (collective_seconds(one, place, places(place)) for one in (apart, between))
    assert timing.compute == {"decoder": pytest.approx(0.01)}
    assert timing.exposed == pytest.approx(10 * (short + long - 0.001))
    assert timing.step == pytest.approx(0.01 + timing.exposed)
    assert timing.slowest == pytest.approx(0.01 + 10 * (long + short))
    assert timing.collective_counts == {"all-gather": 20}
    assert timing.collective_bytes == {"all-gather": pytest.approx(15 * GB)}
    busy = dataclasses.replace(loop, cycles={"decoder": 1.75e9})
    assert model_time(Program((busy,)), place, places(place), 1, None).exposed == pytest.approx(10 * short)


def statistics(
    tokens: list[tuple[int, ...]], patches: list[tuple[int, ...]], slots: int, costs: tuple[int, ...], steps: int = 1
) -> BatchStatistics:
    counts = Counts(0, 1024**2 + 512**2, 0, 0, 0, 1024**2 / 2 + 512**2 / 2, 0)
    return BatchStatistics(counts, 1, 1, {}, None, slots, slots, tuple(tokens), tuple(patches), costs, steps, "")


SETTINGS = json.dumps({f"block_{axis}{pass_}": 512 for axis in ("q", "kv") for pass_ in ("", "_dq", "_dkv")})


@pytest.fixture
def step_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> Cycles:
    step = Cycles(empty=200, work=3000, once=500, matrix=0.9)
    monkeypatch.setattr(timing_module, "cycles", lambda case, generation: step)
    return step


@pytest.mark.parametrize(("name", "products"), [("splash_mha_fwd", 2), ("splash_mha_dq", 3), ("splash_mha_dkv", 4)])
@pytest.mark.parametrize(
    ("tower", "queries"),
    [("decoder", "bf16[16,4096,128]"), ("vision", "bf16[16,4096,128]"), ("vision", "bf16[2,8,4096,128]")],
)
def test_splash_kernels_by_hand(name: str, products: int, tower: str, queries: str, step_of_a_kernel: Cycles):
    """Rows of 2,048 positions in blocks of 512, two on a device; segments of 1,024 and 512 positions."""
    place, step = parse_topology("v5p-8"), step_of_a_kernel
    kernel = Kernel(
        name,
        ("s32[1,8,4]", "s32[1,8,4]", queries, "bf16[8,4096,128]", "s32[4096,128]"),
        SETTINGS,
        f"{tower} attention",
    )
    found = model_time(
        Program((Loop("body", 3, {}, (), (kernel,)),)),
        place,
        places(place),
        4,
        statistics([(1024, 512)], [(1024, 512)], 2048, (1,)),
    )
    computed = 2 * (5 if tower == "decoder" else 6)  # 3 or 4, 1, and the empty one with itself, in both rows
    flops = 2 * products * computed * 512**2 * 16 * 128
    assert found.kernel_flops == {tower: pytest.approx(3 * flops)}
    assert found.kernel_pairs == {
        tower: pytest.approx(computed * 512**2 / 2 / (1.25 * 2**20 / (1 if tower == "vision" else 2)))
    }
    cycles = 8 * (8 * 4 * step.empty + computed * step.work + 8 * step.once)  # eight heads on each of two cores
    assert found.kernels == {tower: pytest.approx(3 * cycles * 1.03 / 1.75e9)}
    assert found.waiting == pytest.approx(0)  # all rows are alike


def test_packed_kernels_by_hand(step_of_a_kernel: Cycles):
    """24 heads of 64, eight a step; the grid holds no step that computes nothing."""
    place, step = parse_topology("v6e-4"), step_of_a_kernel
    sizes = {"width": 64, "block": 512, "tile": 256, "heads": 8}
    table, wide, thin = ("s32[64]",) * 3, "bf16[3072,2048]", "bf16[1536,2048]"
    rows = statistics([(1024, 512)], [(1024, 512)], 2048, (1,))

    def modelled(name: str, *operands: str, **settings: int) -> Timing:
        kernel = Kernel(name, operands, json.dumps(settings), "vision attention")
        return model_time(Program((Loop("body", 1, {}, (), (kernel,)),)), place, places(place), 4, rows)

    forward = modelled("packed_fwd_spare", *table, wide, wide, thin, **sizes)
    assert forward.kernels == {"vision": pytest.approx(3 * (6 * 3200 + 4 * 500) * 1.05 / 1.75e9)}
    assert forward.kernel_flops == {"vision": pytest.approx(2 * 2 * 6 * 512**2 * 24 * 64)}
    backward = modelled("packed_bwd_spare", *table, wide, wide, thin, thin, "f32[3,16,2048]", **sizes)
    gradients = 24 * 64 * 2048 * (1 / 1024 / 1.75e9 + 4 / 1.64e12)
    assert backward.kernels == {"vision": pytest.approx(forward.kernels["vision"] + gradients)}
    assert modelled("packed_fwd_exact", *table, wide, wide, thin, **sizes).kernels == {"vision": 0}
    widened = modelled("packed_widen_keys", thin, "f32[32,2048]", width=64, block=512)
    assert widened.kernels == {"vision": pytest.approx(4 * 6 * step.computed * 1.05 / 1.75e9)}


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    lengths=st.lists(st.integers(1, 40), min_size=0, max_size=6),
    causal=st.booleans(),
    block=st.sampled_from([4, 8, 32]),
)
def test_executed_blocks_are_those_of_the_kernel(lengths: list[int], causal: bool, block: int):
    slots = -(-(sum(lengths) + 5) // block) * block
    ids = np.zeros((1, slots), np.int32)
    ids[0, : sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    needed = np.asarray(needed_blocks(ids, block, causal))
    assert executed_pairs([lengths], slots, block, block, causal) == needed.sum() * block**2


def test_devices_wait_for_the_heaviest_rows():
    costs = (1, 1, 1, 5)
    drawn = statistics([], [], 0, costs)
    assert heaviest(np.array(costs), 1, 64, 16, drawn) == pytest.approx(5)
    assert heaviest(np.array(costs), 1, 1, 1, drawn) == pytest.approx(2, abs=0.5)
    assert heaviest(np.array(costs), 16, 64, 16, drawn) < 16 * 5
    assert heaviest(np.array([3.0]), 2, 64, 16, statistics([], [], 0, (1,))) == 6


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    costs=st.lists(st.integers(1, 100), min_size=2, max_size=20), rows=st.integers(1, 3), hosts=st.sampled_from([1, 4])
)
def test_grouping_never_makes_devices_wait_longer(costs: list[int], rows: int, hosts: int):
    mean = rows * np.mean(costs)
    apart, grouped = (
        heaviest(np.array(costs, np.float64), rows, 8, hosts, statistics([], [], 0, tuple(costs), steps))
        for steps in (1, 16)
    )
    assert 0.8 * mean <= grouped <= 1.1 * apart


def test_waiting_by_hand(step_of_a_kernel: Cycles):
    """A row of one long segment beside a row of two: with 64 devices some have the long one, at 4 : 2 blocks."""
    place = parse_topology("v5p-128")
    kernel = Kernel("splash_mha_fwd", ("s32[1,2,2]", "s32[1,2,2]", "bf16[16,1024,128]"), SETTINGS, "vision attention")
    rows = [(1024,), (512, 512)]
    program = Program((Loop("body", 1, {}, (), (kernel,)),))

    def model(steps: int) -> Timing:
        return model_time(program, place, places(place), 64, statistics(rows, rows, 1024, (4, 2), steps))

    found = model(1)
    block = 8 * step_of_a_kernel.work * 1.03 / 1.75e9
    others = 8 * (4 * step_of_a_kernel.empty + 2 * step_of_a_kernel.once) * 1.03 / 1.75e9
    assert found.kernels["vision"] == pytest.approx(3 * block + others)
    assert found.waiting == pytest.approx(block)
    assert found.step == pytest.approx(found.work + found.waiting)
    assert model(16).waiting < found.waiting / 2
