"""Reads the text of a program compiled for TPU: what every loop executes, and how often.

The compiler's own `cost_analysis` counts a loop's body once. Here each control-flow computation (the entry, bodies of
loops, branches) is one `Loop` with the number of times that it runs, which follows from the trip counts. Of its
instructions it holds

    cycles       the compiler's estimate for fusions, copies and so on, by the named scope they come from
    collectives  each once, also where it is spread over several fusions that overlap it with products
    kernels      Pallas calls, of whose inside the compiler says nothing
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
PARTS = ("vision", "connector", "decoder", "head", "optimizer")  # named scopes of the model and the step
SCOPES = ("embed", "unshard", "qkv", "attention", "out", "ffn", "mlp", "reading_order")  # those inside them
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"\b(pred|bf16|f8\w*|[suf]\d+|c64|c128)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective operation."""

    kind: str  # of KINDS
    bytes: float  # of the whole array on a device: gathered, or before it is scattered
    devices: tuple[int, ...]  # one of its groups, as places in the mesh
    overlapped: bool  # it runs beside other work, as far as there is some
    label: str


class Kernel(NamedTuple):
    """One Pallas call."""

    name: str
    operands: tuple[str, ...]  # shapes, such as bf16[16,8192,128]
    settings: str  # JSON of what the kernel says of itself, or empty
    label: str


@dataclasses.dataclass(frozen=True)
class Loop:
    """What one run of a control-flow computation executes, without the loops inside it."""

    name: str
    runs: int  # per step
    cycles: dict[str, float]
    collectives: tuple[Collective, ...]
    kernels: tuple[Kernel, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program."""

    loops: tuple[Loop, ...]


class _Instruction(NamedTuple):
    name: str
    shape: str
    operation: str
    text: str  # from the operands on


def summarise(text: str) -> Program:
    """Reads a compiled module's text (`jax.stages.Compiled.as_text()`).

    Example: a loop of 24 runs whose body holds a fusion of 1,000 cycles -> Loop(runs=24, cycles={"other": 1000}, ...)
    """
    module = _Module(text)
    runs: Counter[str] = Counter()
    module.count_runs(module.entry, 1, runs)
    return Program(tuple(module.loop(name, count) for name, count in runs.items()))


class _Module:
    def __init__(self, text: str):
        self._computations, self.entry = _computations(text)

    def count_runs(self, name: str, times: int, runs: Counter[str]) -> None:
        runs[name] += times
        for instruction in self._computations.get(name, ()):
            if instruction.operation == "while":
                body, condition = (_called(instruction.text, key) for key in ("body", "condition"))
                self.count_runs(body, times * self._trip_count(condition), runs)
            elif instruction.operation == "conditional":
                for branch in _branches(instruction.text):
                    self.count_runs(branch, times, runs)
            elif instruction.operation == "call":
                self.count_runs(_called(instruction.text, "to_apply"), times, runs)

    def _trip_count(self, condition: str) -> int:
        """Loops count from 0 and compare with a constant, which may be inside a fusion of the condition."""
        limits = []
        for instruction in self._computations.get(condition, ()):
            if instruction.operation == "constant" and instruction.shape.startswith(("s32[]", "u32[]")):
                limits.append(int(_found(r"\((-?\d+)\)", instruction.text)))
            elif "calls=" in instruction.text:
                limits.append(self._trip_count(_called(instruction.text, "calls")))
        return max(limits, default=1)

    def loop(self, name: str, runs: int) -> Loop:
        cycles: Counter[str] = Counter()
        collectives: dict[str, Collective] = {}
        kernels = []
        for instruction in self._computations[name]:
            estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.text)
            if estimate:
                cycles[_label(instruction.text)] += int(estimate[1])
            for inner, computation in self._with_called(name, instruction):
                if 'custom_call_target="tpu_custom_call"' in inner.text:
                    kernels.append(_kernel(inner, _label(inner.text)))
                key, collective = self._collective(inner, computation)
                if collective and not (key in collectives and collectives[key].overlapped):
                    collectives[key] = collective
        return Loop(name, runs, dict(cycles), tuple(collectives.values()), tuple(kernels))

    def _with_called(self, computation: str, instruction: _Instruction) -> Iterator[tuple[_Instruction, str]]:
        """The instruction, and those of the fused and asynchronous computations that it calls."""
        yield instruction, computation
        if "calls=" in instruction.text:
            called = _called(instruction.text, "calls")
            for inner in self._computations.get(called, ()):
                yield from self._with_called(called, inner)

    def _collective(self, instruction: _Instruction, computation: str) -> tuple[str, Collective | None]:
        kind = instruction.operation.removesuffix("-start")
        if kind not in KINDS:
            return "", None
        scattered = kind == "all-reduce" and "reduce-scatter" in computation  # how the TPU compiler writes it
        apart = self._asynchronous(computation) or instruction.operation.endswith("-start")
        size = _array_bytes(instruction.shape)
        if instruction.operation in ("all-gather-start", "collective-permute-start"):
            size = _largest_array(instruction.shape)  # the shape holds operand and result
        elif kind == "reduce-scatter":
            size = sum(map(_array_bytes, _operand_shapes(instruction, self._computations[computation])))
        devices = _group(instruction.text)
        channel = re.search(r"channel_id=(\d+)", instruction.text)
        key = channel[1] if channel else instruction.name
        label = _label(instruction.text)
        return key, Collective("reduce-scatter" if scattered else kind, size, devices, apart, label)

    def _asynchronous(self, computation: str) -> bool:
        instructions = self._computations[computation]
        return "async" in computation or any("AsyncCollective" in instruction.text for instruction in instructions)


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Computation -> its instructions, and the entry's name. An instruction may go over several lines."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    lines: list[str] = []

    def finish() -> None:
        if current is not None and lines and (instruction := _instruction("\n".join(lines))):
            computations[current].append(instruction)
        lines.clear()

    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            current = head[2]
            computations[current] = []
            entry = current if head[1] else entry
        elif line == "}":
            finish()
            current = None
        elif current is not None:
            if re.match(r"  (ROOT )?%", line):
                finish()
            lines.append(line)
    return computations, entry


def _instruction(text: str) -> _Instruction | None:
    found = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = ", text)
    if not found:
        return None
    rest = text[found.end() :]
    end = _tuple_end(rest) if rest.startswith("(") else 0
    operation = re.compile(r" ([a-z][a-z0-9\-]*)(?=\()").search(rest, end)
    return (
        _Instruction(found[1], rest[: operation.start()], operation[1], rest[operation.end() :]) if operation else None
    )


def _tuple_end(text: str) -> int:
    """Where the parenthesis that opens a text closes; a tuple's shape holds spaces and more parentheses."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return place
    return 0


def _called(text: str, key: str) -> str:
    return _found(rf"\b{key}=%?([\w.\-]+)", text)


def _found(pattern: str, text: str) -> str:
    """The group of a pattern that the compiler's text must hold."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"{pattern} is not in {text!r}")
    return match[1]


def _branches(text: str) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", text)
    if listed:
        return [name.strip(" %") for name in listed[1].split(",")]
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", text)


def _arrays(shape: str) -> list[float]:
    """Bytes of each array in a shape's text, without padding of the layout."""
    return [
        _dtype_bytes(dtype) * math.prod(map(int, filter(None, dims.split(","))))
        for dtype, dims in _ARRAY.findall(shape)
    ]


def _dtype_bytes(dtype: str) -> float:
    return 1 if dtype.startswith("f8") else _BYTES.get(dtype) or int(dtype[1:]) / 8


def _array_bytes(shape: str) -> float:
    return sum(_arrays(shape))


def _largest_array(shape: str) -> float:
    return max(_arrays(shape), default=0.0)


def _operand_shapes(instruction: _Instruction, computation: Sequence[_Instruction]) -> list[str]:
    names = re.findall(r"%([\w.\-]+)", instruction.text.partition(")")[0])
    return [other.shape for other in computation if other.name in names]


def _group(text: str) -> tuple[int, ...]:
    """The devices of the first group of a collective, as places in the mesh.

    Examples: replica_groups={{0,2},{1,3}} -> 0 2; [2,2]<=[2,2]T(1,0) -> 0 2; mesh['a'=2,'b'=2] {'a'} -> 0 2;
    source_target_pairs={{0,3},{1,0}} -> 0 3
    """
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", text):
        return tuple(int(number) for number in found[1].split(","))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        sizes = [int(size) for size in found[3].split(",")]
        devices = np.arange(math.prod(sizes)).reshape(sizes)
        if found[4]:
            devices = devices.transpose([int(axis) for axis in found[4].split(",")])
        return tuple(devices.reshape(int(found[1]), int(found[2]))[0].tolist())
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", text):
        axes = re.findall(r"'?([\w]+)'?=(\d+)", found[1])
        used = {name for name, *_ in re.findall(r"'?(\w+)'?(:[^,]*)?", found[3]) if name}
        devices = np.arange(math.prod(int(size) for _, size in axes)).reshape([int(size) for _, size in axes])
        whole = tuple(slice(None) if name in used else 0 for name, _ in axes)
        return tuple(np.asarray(devices[whole]).ravel().tolist())
    return ()


def _kernel(instruction: _Instruction, label: str) -> Kernel:
    shapes = re.search(r"operand_layout_constraints=\{(.*?)\}(?:, [a-z_]+=|$)", instruction.text, re.DOTALL)
    operands = tuple(f"{dtype}[{dims}]" for dtype, dims in _ARRAY.findall(shapes[1] if shapes else ""))
    settings = re.search(r'"xprof_metadata":"(\{.*?\})"', instruction.text)
    return Kernel(
        re.sub(r"[.\d]+$", "", instruction.name), operands, settings[1].replace('\\"', '"') if settings else "", label
    )


def _label(text: str) -> str:
    """The scope (`jax.named_scope`) that an instruction comes from, and in which pass, by its `op_name`.

    Examples: jit(train_step)/jvp(decoder)/while/body/ffn/dot_general -> "decoder ffn";
    jit(train_step)/transpose(jvp(vision))/while/body/checkpoint/mul -> "vision backward"
    """
    found = re.search(r'op_name="([^"]*)"', text)
    path = found[1] if found else ""
    names = re.findall(r"\w+", path)
    scopes = [next((name for name in names if name in PARTS), "other")]
    scopes += [name for name in names if name in SCOPES][-1:]
    if "transpose(" in path:
        scopes.append("backward")
    elif "rematted_computation" in path or "/checkpoint" in path:
        scopes.append("recomputed")
    return " ".join(scopes)
