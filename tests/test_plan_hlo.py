"""Reading compiled programs: small texts in the form that the TPU compiler writes."""

import pytest

from navil_jax.plan.hlo import Collective, Kernel, Program, summarise
from navil_jax.plan.worker import exhausted_bytes

CYCLES = 'backend_config={{"window_config":{{"estimated_cycles":"{}"}}}}'


def fusion(name: str, cycles: int, path: str = "") -> str:
    where = f', metadata={{op_name="{path}"}}' if path else ""
    config = CYCLES.format(cycles)
    return f"  %{name} = bf16[8,8]{{1,0:T(8,128)(2,1)}} fusion(%a), kind=kLoop, calls=%inner{where}, {config}"


def program(*computations: str) -> Program:
    inner = "%inner (p: bf16[8,8]) -> bf16[8,8] {\n  ROOT %p = bf16[8,8]{1,0} parameter(0)\n}"
    return summarise("\n\n".join(["HloModule jit_f, is_scheduled=true", inner, *computations]))


def computation(head: str, *lines: str) -> str:
    return "\n".join([f"{head} (p: bf16[8,8]) -> bf16[8,8] {{", *lines, "}"])


def condition(name: str, limit: int) -> str:
    return computation(
        f"%{name}",
        "  %i = s32[]{:T(128)} get-tuple-element(%p), index=0",
        f"  %limit = s32[]{{:T(128)}} constant({limit})",
        "  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT",
    )


def loop(name: str, condition: str, body: str) -> str:
    shape = "(s32[]{:T(128)}, bf16[1,8,8]{2,1,0:T(8,128)(2,1)S(1)}, /*index=2*/(bf16[2]{0}, s32[]))"
    return f"  %{name} = {shape} while(%tuple), condition=%{condition}, body=%{body}"


def test_cycles_count_as_often_as_loops_run():
    read = program(
        condition("c24", 24),
        condition("c3", 3),
        computation("%inside", fusion("f1", 10)),
        computation("%body", fusion("f2", 100), loop("w2", "c3", "inside")),
        computation("ENTRY %main", fusion("f3", 1000), loop("w", "c24", "body")),
    )
    assert {one.name: (one.runs, one.cycles) for one in read.loops} == {
        "main": (1, {"other": 1000}),
        "body": (24, {"other": 100}),
        "inside": (72, {"other": 10}),
    }


def test_a_trip_count_inside_a_fusion_of_the_condition():
    fused = condition("fused", 7)
    outer = computation("%cond", "  ROOT %f = pred[] fusion(%p), kind=kLoop, calls=%fused")
    read = program(
        fused, outer, computation("%body", fusion("f", 1)), computation("ENTRY %main", loop("w", "cond", "body"))
    )
    assert [one.runs for one in read.loops if one.name == "body"] == [7]


def test_branches_and_calls_are_followed():
    branch = "  %c = bf16[8] conditional(%i, %a, %b), branch_computations={%one, %two}"
    read = program(
        computation("%one", fusion("f", 1)),
        computation("%two", fusion("f", 2)),
        computation("%three", fusion("f", 4)),
        computation("ENTRY %main", branch, "  %d = bf16[8] call(%a), to_apply=%three"),
    )
    assert sum(sum(one.cycles.values()) * one.runs for one in read.loops) == 7


GATHER = "all-gather(%p), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}"


def test_a_collective_spread_over_fusions_counts_once():
    start = '  ROOT %s = (bf16[2,8], bf16[8,8]) custom-call(%g), custom_call_target="AsyncCollectiveStart"'
    done = '  ROOT %d = bf16[8,8] custom-call(%p, %g), custom_call_target="AsyncCollectiveDone"'
    gather = f"  %g = bf16[8,8]{{1,0:T(8,128)}} {GATHER}"
    read = program(
        computation("%begin", gather, start),
        computation("%async_collective_fusion.1", gather),
        computation("%end", gather, done),
        computation(
            "ENTRY %main",
            "  %s = (bf16[2,8], bf16[8,8]) fusion(%p), kind=kCustom, calls=%begin",
            "  %m = (bf16[8,8], bf16[8,8]) fusion(%s), kind=kOutput, calls=%async_collective_fusion.1",
            "  %d = bf16[8,8] fusion(%m), kind=kCustom, calls=%end",
        ),
    )
    assert [one.collectives for one in read.loops] == [
        (Collective("all-gather", 128.0, (0, 1, 2, 3), True, "other"),),
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"bf16[8,8]{{1,0}} {GATHER}", Collective("all-gather", 128.0, (0, 1, 2, 3), False, "other")),
        (
            "(f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%p), channel_id=1, replica_groups={{0,2},{1,3}}",
            Collective("all-gather", 256.0, (0, 2), True, "other"),
        ),
        (
            "f32[8,8]{1,0} all-reduce(%p), channel_id=1, replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%inner",
            Collective("all-reduce", 256.0, (0, 2), False, "other"),
        ),
        (
            "f32[2,8]{1,0} reduce-scatter(%p), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}",
            Collective("reduce-scatter", 1024.0, (0, 1, 2, 3), False, "other"),
        ),
        (
            "(u8[4]{0}, u8[4]{0}, u32[]) collective-permute-start(%p), source_target_pairs={{0,3},{1,0}}",
            Collective("collective-permute", 4.0, (0, 3), True, "other"),
        ),
    ],
)
def test_kinds_bytes_and_groups(line: str, expected: Collective):
    parameter = "  %p = f32[32,8]{1,0} parameter(0)"
    (only,) = program(computation("ENTRY %main", parameter, f"  %c = {line}")).loops
    assert only.collectives == (expected,)


def test_a_reduce_scatter_is_written_as_a_fusion():
    reduced = "  %r = f32[32,8]{1,0} all-reduce(%p), channel_id=1, replica_groups={{0,1}}, to_apply=%inner"
    read = program(
        computation("%all-reduce-scatter.3", reduced),
        computation("ENTRY %main", "  %f = f32[16,8] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3"),
    )
    assert read.loops[0].collectives == (Collective("reduce-scatter", 1024.0, (0, 1), False, "other"),)


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("jit(train_step)/jvp(decoder)/while/body/closed_call/ffn/dot_general", "decoder ffn"),
        ("jit(train_step)/transpose(jvp(vision))/while/body/checkpoint/attention/mul", "vision attention backward"),
        ("jit(train_step)/transpose(jvp())/vision/while/body/rematted_computation/mlp/erf", "vision mlp backward"),
        ("jit(train_step)/vision/while/body/rematted_computation/mlp/erf", "vision mlp recomputed"),
        ("jit(train_step)/jvp(decoder)/attention/out/dot_general", "decoder out"),
        ("jit(train_step)/optimizer/mul", "optimizer"),
        ("jit(train_step)/jit(headless)/add", "other"),
        ("", "other"),
    ],
)
def test_labels_are_the_named_scopes(path: str, label: str):
    (only,) = program(computation("ENTRY %main", fusion("f", 5, path))).loops
    assert only.cycles == {label: 5}


def test_kernels_say_their_operands_and_settings():
    call = (
        "  %splash_mha_fwd_segmented.4 = (f32[8,64]{1,0}, bf16[4,8,64]{2,1,0}) custom-call(%a, %b), "
        'custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,2,2]{2,1,0}, bf16[4,8,64]{2,1,0}}, '
        'frontend_attributes={kernel_metadata={\n"xprof_metadata":"{\\"block_q\\": 512, \\"fused\\": false}"\n}}, '
        'metadata={op_name="jit(f)/transpose(jvp())/x"}'
    )
    (only,) = program(computation("ENTRY %main", call)).loops
    settings = '{"block_q": 512, "fused": false}'
    assert only.kernels == (
        Kernel("splash_mha_fwd_segmented", ("s8[1,2,2]", "bf16[4,8,64]"), settings, "other backward"),
    )


def test_what_the_compiler_says_of_too_much_memory():
    state = {"batch": 2.0**30}
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded ..."
    assert exhausted_bytes(message, state) == 20.5 * 2**30
    message = (
        "Ran out of memory on HBM, the total memory required for HLO temporaries (25.0G) exceeds available HBM (15.75G)"
    )
    assert exhausted_bytes(message, state) == 26 * 2**30
    assert exhausted_bytes("Ran out of memory in memory space smem. Used 1.25M of 1.00M smem.", state) is None
